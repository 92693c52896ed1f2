"""The fused functions, as torch.nn.functional holds torch's."""

from .autoencoder import gaussian_rsample_kl
from .random import philox_key, philox_normal
from .recurrent import gru_cell, lstm_cell

__all__ = ["gaussian_rsample_kl", "gru_cell", "lstm_cell", "philox_key", "philox_normal"]
