"""The fused functions, as torch.nn.functional holds torch's."""

from ._attention_weights import attention_weights
from .additive import additive_attention
from .attention import merge_attention, scaled_dot_product_attention, varlen_attention
from .autoencoder import (
    binarize,
    contractive_linear,
    corrupt,
    gaussian_rsample_kl,
    hamming_distance,
    hamming_radius,
    hamming_topk,
    jacobian_penalty,
    pack_bits,
    reconstruction_loss,
    sparse_activation,
    sparse_decode,
    tangent_directions,
    topk_code,
    topk_encode,
    unpack_bits,
)
from .kernel import kernel_attention
from .random import philox_key, philox_normal
from .recurrent import gru, gru_cell, lstm, lstm_cell

__all__ = [
    "additive_attention",
    "attention_weights",
    "binarize",
    "contractive_linear",
    "corrupt",
    "gaussian_rsample_kl",
    "gru",
    "gru_cell",
    "hamming_distance",
    "hamming_radius",
    "hamming_topk",
    "jacobian_penalty",
    "kernel_attention",
    "lstm",
    "lstm_cell",
    "merge_attention",
    "pack_bits",
    "philox_key",
    "philox_normal",
    "reconstruction_loss",
    "scaled_dot_product_attention",
    "sparse_activation",
    "sparse_decode",
    "tangent_directions",
    "topk_code",
    "topk_encode",
    "unpack_bits",
    "varlen_attention",
]
