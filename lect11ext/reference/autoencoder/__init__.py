"""The functions of autoencoders in plain PyTorch."""

from .variational import gaussian_rsample_kl

__all__ = ["gaussian_rsample_kl"]
