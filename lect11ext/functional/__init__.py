"""The fused functions, as torch.nn.functional holds torch's."""

from .additive import additive_attention
from .autoencoder import gaussian_rsample_kl
from .random import philox_key, philox_normal
from .recurrent import gru, gru_cell, lstm, lstm_cell

__all__ = [
    "additive_attention",
    "gaussian_rsample_kl",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "philox_key",
    "philox_normal",
]
