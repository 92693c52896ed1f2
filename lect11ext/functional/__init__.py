"""The fused functions, as torch.nn.functional holds torch's."""

from .autoencoder import gaussian_rsample_kl
from .random import philox_key, philox_normal

__all__ = ["gaussian_rsample_kl", "philox_key", "philox_normal"]
