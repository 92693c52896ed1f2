"""Modules, as torch.nn holds torch's: same arguments, parameter names, initialisation and ``state_dict``."""

from .attention import MultiheadAttention
from .autoencoder import BinaryCode, Corruption, GaussianLatent, HammingIndex, TopKAutoencoder
from .recurrent import GRU, LSTM, GRUCell, LSTMCell

__all__ = [
    "GRU",
    "LSTM",
    "BinaryCode",
    "Corruption",
    "GRUCell",
    "GaussianLatent",
    "HammingIndex",
    "LSTMCell",
    "MultiheadAttention",
    "TopKAutoencoder",
]
