"""Semantic hashing in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def binarize(input: Tensor, threshold: float = 0.5) -> Tensor:
    """See :func:`lect11ext.functional.binarize`."""
    bits = torch.where(input.isnan(), input, (input > threshold).to(input.dtype))
    return input + (bits - input).detach() if input.requires_grad else bits


def pack_bits(input: Tensor, threshold: float = 0.5) -> Tensor:
    """See :func:`lect11ext.functional.pack_bits`."""
    bits = input if input.dtype == torch.bool else input > threshold
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -input.size(-1) % 8))
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=input.device)
    return (bits.unflatten(-1, (bits.size(-1) // 8, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(codes: Tensor, num_bits: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """See :func:`lect11ext.functional.unpack_bits`."""
    shifts = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8, device=codes.device)
    return (codes[..., None] >> shifts & 1).flatten(-2)[..., :num_bits].to(dtype)


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`lect11ext.functional.hamming_distance`."""
    bits = unpack_bits(torch.arange(256, dtype=torch.uint8, device=a.device)[:, None], dtype=torch.int32).sum(-1)
    differ = a[..., :, None, :] ^ b[..., None, :, :]
    return bits[differ.long()].sum(-1, dtype=torch.int32)


def hamming_topk(query: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.hamming_topk`."""
    distances, indices = hamming_distance(query, codes).sort(dim=-1, stable=True)
    return distances[:, :k], indices[:, :k]


def hamming_radius(query: Tensor, codes: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`lect11ext.functional.hamming_radius`."""
    distances = hamming_distance(query, codes)
    within = distances <= min(radius, 8 * query.size(-1))  # which int32 holds
    offsets = torch.nn.functional.pad(within.sum(-1).cumsum(0), (1, 0))
    return offsets, distances[within], within.nonzero()[:, 1]
