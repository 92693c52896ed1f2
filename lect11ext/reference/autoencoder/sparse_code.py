"""Sparse codes in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_code(input: Tensor, k: int, *, activation: str = "relu") -> tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.topk_code`."""
    values, indices = torch.sort(input, dim=-1, descending=True, stable=True)
    values, indices = values[..., :k], indices[..., :k]
    return (torch.relu(values) if activation == "relu" else values), indices


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See :func:`lect11ext.functional.sparse_decode`; takes the memory of all named rows."""
    dtype = torch.promote_types(values.dtype, weight.dtype)
    sums = torch.einsum("...k,...kd->...d", values.to(dtype), weight[indices.long()].to(dtype))
    return sums if bias is None else sums + bias


def topk_encode(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, activation: str = "relu"
) -> tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.topk_encode`."""
    return topk_code(torch.nn.functional.linear(input, weight, bias), k, activation=activation)
