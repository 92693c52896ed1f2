"""Modules of autoencoders."""

from .corruption import Corruption
from .hashing import BinaryCode, HammingIndex
from .sparse_code import TopKAutoencoder
from .variational import GaussianLatent

__all__ = ["BinaryCode", "Corruption", "GaussianLatent", "HammingIndex", "TopKAutoencoder"]
