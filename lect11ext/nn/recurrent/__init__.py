"""Recurrent modules: single steps, and whole layers."""

from .cells import GRUCell, LSTMCell
from .layers import GRU, LSTM

__all__ = ["GRU", "LSTM", "GRUCell", "LSTMCell"]
