"""Fused recurrent functions: single steps, and whole layers."""

from .cells import gru_cell, lstm_cell
from .layers import gru, lstm

__all__ = ["gru", "gru_cell", "lstm", "lstm_cell"]
