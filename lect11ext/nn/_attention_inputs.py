"""What torch.nn.MultiheadAttention's arguments are to the op: masks, rotated and padded tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._errors import TENSOR, check_device, check_type
from ..functional._attention import Window

LEAST_BASE, MOST_BASE = 1e-20, 1e38  # of rotate: beyond them an angle would be infinite in float32, and its sine NaN


def merged_masks(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    band: Window | None,
    query: Tensor,
    keys: int,
    appended: int,
    batched: bool,
) -> Tensor | None:
    """The masks as one of the op's: True lets through. None where nothing is barred.

    ``query`` is ``[N, H, L, D]``. The ``appended`` keys, after the ``keys``, are seen by all.
    """
    batch, heads, queries, _ = query.shape
    masks = []
    if key_padding_mask is not None:
        shape = (batch, keys) if batched else (keys,)
        _check_mask("key_padding_mask", key_padding_mask, query, shape)
        masks.append(key_padding_mask.reshape(batch, 1, 1, keys))
    if attn_mask is not None:
        check_attn_mask(attn_mask, query, keys)
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else torch.unflatten(attn_mask, 0, (batch, heads)))
    if band is not None:
        left, right = band
        offsets = torch.arange(keys, device=query.device) - torch.arange(queries, device=query.device)[:, None]
        barred = torch.zeros_like(offsets, dtype=torch.bool)
        barred = barred if left is None else barred | (offsets < -left)
        masks.append((barred if right is None else barred | (offsets > right))[None, None])
    if appended:
        masks = [pad(mask, (0, appended)) for mask in masks]
    bars = added = None
    for mask in masks:
        if mask.dtype == torch.bool:
            bars = mask if bars is None else bars | mask
        else:
            # Of the query's type, or float32: what the op takes.
            mask = mask if mask.dtype == torch.float32 and query.dtype != torch.float64 else mask.to(query.dtype)
            added = mask if added is None else added + mask
    if added is None:
        return None if bars is None else ~bars
    return added if bars is None else torch.where(bars, -math.inf, added)


def check_attn_mask(mask: Tensor | None, query: Tensor, keys: int) -> None:
    """``query`` is ``[N, H, L, D]``."""
    batch, heads, queries, _ = query.shape
    _check_mask("attn_mask", mask, query, (queries, keys), (batch * heads, queries, keys))


def _check_mask(name: str, mask: Tensor | None, query: Tensor, *shapes: tuple[int, ...]) -> None:
    check_type(name, mask, TENSOR)
    assert mask is not None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating-point, but got {mask.dtype}")
    if not any(_same(mask.shape, shape) for shape in shapes):
        words = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {words}, but got {list(mask.shape)}")
    check_device(name, mask, query)


def _same(shape: torch.Size, other: tuple[int, ...]) -> bool:
    """One size after the other: torch.compile compares symbolic ones so, and not whole shapes with a list of them."""
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotary embedding of ``[…, L, D]``: columns m and m + D / 2 are a pair, turned by position · base^(−2m / D)."""
    half = x.size(-1) // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    angles = positions.to(wide)[:, None] * (base ** (steps.to(wide) / -half))
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def padded(x: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """``[tokens, …] → [sequences, longest, …]``, and which of it are tokens; the rest is zero."""
    lengths = starts.diff()
    places = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=x.device)
    within = places < lengths[:, None]
    out = x.new_zeros(*within.shape, *x.shape[1:])
    return out.index_put((within,), x), within


def batch_first(x: Tensor) -> Tensor:
    """[N, L, heads, head_dim] → [N, heads, L, head_dim]; the next two alike."""
    return x.transpose(1, 2)


def positions_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


def one_sequence(x: Tensor) -> Tensor:
    return x.transpose(0, 1).unsqueeze(0)


def positions_of(starts: Tensor, total: int) -> Tensor:
    """Of every token within its sequence."""
    every = torch.arange(total, device=starts.device)
    return every - starts[torch.searchsorted(starts, every, right=True) - 1]
