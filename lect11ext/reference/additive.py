"""Additive attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """See :func:`lect11ext.functional.additive_attention`. Holds ``[..., L, S, H']``."""
    pairs = query.unsqueeze(-2) + key.unsqueeze(-3)
    if attn_mask is None:
        return (pairs.tanh() @ score_weight).softmax(-1) @ value
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    mask = attn_mask.expand(*batch, query.size(-2), key.size(-2))
    visible = mask if mask.dtype == torch.bool else mask != -torch.inf
    # By selection: what is barred may be NaN, and so would its product with zero.
    scores = torch.where(visible.unsqueeze(-1), pairs, 0).tanh() @ score_weight
    if mask.dtype != torch.bool:
        scores = scores + torch.where(visible, mask, 0)
    # A query without keys is given equal scores, whose weights are then taken away.
    barred = ~visible & visible.any(-1, keepdim=True)
    weights = torch.where(visible, scores.masked_fill(barred, -torch.inf).softmax(-1), 0).to(value.dtype)
    return weights @ torch.where(visible.any(-2).unsqueeze(-1), value, 0)
