"""Fused functions of autoencoders."""

from .variational import gaussian_rsample_kl

__all__ = ["gaussian_rsample_kl"]
