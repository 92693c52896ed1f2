"""Fused functions of autoencoders."""

from .corruption import corrupt
from .hashing import binarize, hamming_distance, hamming_radius, hamming_topk, pack_bits, unpack_bits
from .jacobian import jacobian_penalty, tangent_directions
from .penalties import contractive_linear, sparse_activation
from .reconstruction import reconstruction_loss
from .sparse_code import sparse_decode, topk_code, topk_encode
from .variational import gaussian_rsample_kl

__all__ = [
    "binarize",
    "contractive_linear",
    "corrupt",
    "gaussian_rsample_kl",
    "hamming_distance",
    "hamming_radius",
    "hamming_topk",
    "jacobian_penalty",
    "pack_bits",
    "reconstruction_loss",
    "sparse_activation",
    "sparse_decode",
    "tangent_directions",
    "topk_code",
    "topk_encode",
    "unpack_bits",
]
