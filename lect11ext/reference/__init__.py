"""Every fused function in plain PyTorch: the oracle of the tests and the baseline of the benchmarks.

Names, arguments and meaning are those of :mod:`lect11ext.functional`, on any device and dtype, with all derivatives;
of the recurrent layers there is one layer of one direction, :func:`lstm_layer` and :func:`gru_layer`, which the tests
put together. Arguments are not checked. Noise comes from NumPy, or is handed over (`noise=`), so what draws runs
neither under `torch.vmap` nor `torch.compile`.
"""

from .additive import additive_attention
from .attention import (
    attention_weights,
    kernel_attention,
    merge_attention,
    scaled_dot_product_attention,
    varlen_attention,
)
from .autoencoder import (
    binarize,
    contractive_linear,
    corrupt,
    gaussian_rsample_kl,
    hamming_distance,
    hamming_radius,
    hamming_topk,
    pack_bits,
    reconstruction_loss,
    sparse_activation,
    sparse_decode,
    topk_code,
    topk_encode,
    unpack_bits,
)
from .random import philox_normal
from .recurrent import gru_cell, gru_layer, lstm_cell, lstm_layer

__all__ = [
    "additive_attention",
    "attention_weights",
    "binarize",
    "contractive_linear",
    "corrupt",
    "gaussian_rsample_kl",
    "gru_cell",
    "gru_layer",
    "hamming_distance",
    "hamming_radius",
    "hamming_topk",
    "kernel_attention",
    "lstm_cell",
    "lstm_layer",
    "merge_attention",
    "pack_bits",
    "philox_normal",
    "reconstruction_loss",
    "scaled_dot_product_attention",
    "sparse_activation",
    "sparse_decode",
    "topk_code",
    "topk_encode",
    "unpack_bits",
    "varlen_attention",
]
