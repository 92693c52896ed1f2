"""Modules of autoencoders."""

from .corruption import Corruption
from .hashing import BinaryCode, HammingIndex
from .penalties import ContractiveLinear, SparseActivation
from .sparse_code import TopKAutoencoder
from .stacked import StackedAutoencoder
from .variational import ConditionalGaussianLatent, GaussianLatent

__all__ = [
    "BinaryCode",
    "ConditionalGaussianLatent",
    "ContractiveLinear",
    "Corruption",
    "GaussianLatent",
    "HammingIndex",
    "SparseActivation",
    "StackedAutoencoder",
    "TopKAutoencoder",
]
