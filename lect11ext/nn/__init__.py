"""Modules, as torch.nn holds torch's: same arguments, parameter names, initialisation and ``state_dict``."""

from .attention import MultiheadAttention
from .autoencoder import (
    BinaryCode,
    ConditionalGaussianLatent,
    ContractiveLinear,
    Corruption,
    GaussianLatent,
    HammingIndex,
    SparseActivation,
    StackedAutoencoder,
    TopKAutoencoder,
)
from .recurrent import GRU, LSTM, GRUCell, LSTMCell

__all__ = [
    "GRU",
    "LSTM",
    "BinaryCode",
    "ConditionalGaussianLatent",
    "ContractiveLinear",
    "Corruption",
    "GRUCell",
    "GaussianLatent",
    "HammingIndex",
    "LSTMCell",
    "MultiheadAttention",
    "SparseActivation",
    "StackedAutoencoder",
    "TopKAutoencoder",
]
