"""Modules of autoencoders."""

from .variational import GaussianLatent

__all__ = ["GaussianLatent"]
