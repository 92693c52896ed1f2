"""Every fused function in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

Names, arguments and meaning are those of :mod:`lect11ext.functional`, on any device and dtype, with all derivatives.
Arguments are not checked. Noise comes from NumPy, or is handed over (`noise=`), so what draws runs neither under
`torch.vmap` nor `torch.compile`.
"""

from .additive import additive_attention
from .attention import (
    attention_weights,
    kernel_attention,
    merge_attention,
    scaled_dot_product_attention,
    varlen_attention,
)
from .autoencoder import gaussian_rsample_kl
from .random import philox_normal
from .recurrent import gru_cell, gru_layer, lstm_cell, lstm_layer

__all__ = [
    "additive_attention",
    "attention_weights",
    "gaussian_rsample_kl",
    "gru_cell",
    "gru_layer",
    "kernel_attention",
    "lstm_cell",
    "lstm_layer",
    "merge_attention",
    "philox_normal",
    "scaled_dot_product_attention",
    "varlen_attention",
]
