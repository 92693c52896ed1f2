"""The fused functions, as torch.nn.functional holds torch's."""

from ._attention_weights import attention_weights
from .additive import additive_attention
from .attention import merge_attention, scaled_dot_product_attention, varlen_attention
from .autoencoder import gaussian_rsample_kl
from .kernel import kernel_attention
from .random import philox_key, philox_normal
from .recurrent import gru, gru_cell, lstm, lstm_cell

__all__ = [
    "additive_attention",
    "attention_weights",
    "gaussian_rsample_kl",
    "gru",
    "gru_cell",
    "kernel_attention",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "philox_key",
    "philox_normal",
    "scaled_dot_product_attention",
    "varlen_attention",
]
