"""The weights of an attention, after it: their mean over the heads, or each head's."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from .._errors import TENSOR, check_device, check_type
from . import _attention as common
from ._attention import Options, Window
from ._dispatch import is_autocast
from .attention import scaled_dot_product_attention
from .random import in_functorch

_OP_DEVICES = ("cpu", "meta")  # where there is the op; elsewhere plain PyTorch
_CHUNK = 2**20  # scores that are held at a time, unless those of one query are more: 4 MiB


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    causal_alignment: str = "top_left",
    average_heads: bool = True,
    dropout_key: Tensor | None = None,
) -> Tensor:
    r"""The weights of an attention whose log-sum-exp is known, in a second pass: :math:`e^{t_{ij} - \text{lse}_i}`.

    One op on the CPU, ``lect11ext::attention_weights``. Where their mean over the heads is asked for, what holds all of
    ``[*, H, L, S]`` is never there; the backward makes the weights again. On other devices the same in plain PyTorch,
    for some queries at a time.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa, window, alibi_slopes, softcap, causal_alignment: what
            :func:`scaled_dot_product_attention` was given.
        lse: ``[*, H, L]``, as it returned it; −∞ gives a row of zeros.
        dropout_p, dropout_key: with both the weights are as dropout left them, as torch.nn.MultiheadAttention
            returns them. Without ``dropout_key`` ``dropout_p`` must be 0.
        average_heads: whether the weights' mean over the heads is returned, or each head's.

    Returns:
        ``[*, L, S]``, or ``[*, H, L, S]``, in the query's type.

    Gradients: to query, key, lse, an additive mask and slopes, of any order; forward-mode AD; ``vmap``. The first order
    is a kernel of its own on the CPU; tangents and what is beyond hold ``[*, H, L, S]``. Sums are made in float32
    (float64 for float64), and do not depend on the number of threads.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Example::

        >>> import torch, lect11ext
        >>> query, key, value = torch.randn(2, 8, 5, 16), torch.randn(2, 8, 7, 16), torch.randn(2, 8, 7, 16)
        >>> out, lse = lect11ext.functional.scaled_dot_product_attention(query, key, value, return_lse=True)
        >>> lect11ext.functional.attention_weights(query, key, lse).shape
        torch.Size([2, 5, 7])
    """
    options = common.check_options(dropout_p, is_causal, scale, enable_gqa, window, softcap, causal_alignment)
    if dropout_p > 0 and dropout_key is None:
        raise ValueError("dropout_key must be given where dropout_p is not 0: it says which weights were dropped")
    check_type("average_heads", average_heads, (bool,))
    check_type("lse", lse, TENSOR)
    q, k, _, shape = common.canonical(query, key, key, enable_gqa, "key")
    if dropout_key is not None:
        common.check_dropout_key(dropout_key, query)
    if not lse.is_floating_point():
        raise TypeError(f"lse must be floating-point, but got {lse.dtype}")
    whole = (*shape.batch, shape.heads, shape.queries)
    expected = whole[-shape.rank + 1 :]
    if len(lse.shape) != len(expected) or any(a != b for a, b in zip(lse.shape, expected, strict=True)):
        raise ValueError(f"lse must have shape {list(expected)}, but got {list(lse.shape)}")
    lse = lse.expand(*whole)
    lse = lse if len(shape.batch) == 1 else lse.flatten(0, -3)
    mask = common.canonical_mask(attn_mask, shape)
    slopes = common.canonical_slopes(alibi_slopes, shape)
    if q.device.type in _OP_DEVICES and not is_traceable_wrapper_subclass(q):  # DTensor has no rule for the op
        if slopes is not None and common.has_derivative(slopes):
            mask, slopes = common.with_slopes(mask, slopes, q, shape.keys, options.bottom_right), None
        lse = lse.to(torch.promote_types(q.dtype, torch.float32))
        drop = dropout_key if dropout_p > 0 else None
        weights = common.call_weights(q, k, lse, mask, slopes, drop, options, average_heads)
        return _restored(weights, shape, average_heads)
    _check(q, k, lse, mask, slopes, options)
    with _without_autocast(query):
        plain = _Weights(q, k, lse, mask, slopes, dropout_key, options)
        weights = plain.mean() if average_heads else plain.of_rows(0, None)
        return _restored(weights.to(query.dtype), shape, average_heads)


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    window: Window | None = None,
    dropout_key: Tensor | None = None,
    average_heads: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(output, weights)`` in one pass where there is the op for it: as the two functions give them, for a module."""
    given: dict[str, Any] = {
        "dropout_p": dropout_p,
        "is_causal": is_causal,
        "enable_gqa": enable_gqa,
        "window": window,
        "dropout_key": dropout_key,
    }
    if query.device.type not in _OP_DEVICES or is_traceable_wrapper_subclass(query):
        output, lse = scaled_dot_product_attention(query, key, value, attn_mask, **given, return_lse=True)
        return output, attention_weights(query, key, lse, attn_mask, **given, average_heads=average_heads)
    options = common.check_options(dropout_p, is_causal, None, enable_gqa, window, None, "top_left")
    q, k, v, shape = common.canonical(query, key, value, enable_gqa)
    mask = common.canonical_mask(attn_mask, shape)
    drop = dropout_key if dropout_p > 0 else None
    output, _, weights = common.call_with_weights(q, k, v, mask, None, drop, options, average_heads)
    return common.restored(output, shape, 2), _restored(weights, shape, average_heads)


def _restored(weights: Tensor, shape: common.Shape, averaged: bool) -> Tensor:
    if averaged:
        return weights.reshape(*(shape.batch if shape.rank > 3 else ()), shape.queries, shape.keys)
    return common.restored(weights, shape, 2)


def _check(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, slopes: Tensor | None, options: Options
) -> None:
    """What the op refuses, where there is none."""
    for name, x in (("key", key), ("lse", lse), ("attn_mask", mask), ("alibi_slopes", slopes)):
        if x is not None:
            check_device(name, x, query)
    dtype = query.dtype
    if not query.is_floating_point():
        raise TypeError(f"query must be floating-point, but got {dtype}")
    if not is_autocast(query):  # which makes them one type
        if key.dtype != dtype:
            raise TypeError(f"key must have the type of query, {dtype}, but got {key.dtype}")
        wide = mask is not None and mask.dtype == torch.float32 and dtype != torch.float64
        if mask is not None and mask.dtype not in (torch.bool, dtype) and not wide:
            raise TypeError(f"attn_mask must be bool, float32 or of query's type, {dtype}, but got {mask.dtype}")
    common.check_softcap(options.softcap, query)
    if options.scale is not None and dtype != torch.float64 and not -1e30 <= options.scale <= 1e30:
        raise ValueError(f"scale must be from -1e+30 to 1e+30 for a query of {dtype}, but got {options.scale}")


def _without_autocast(like: Tensor) -> Any:
    return torch.autocast(like.device.type, enabled=False) if is_autocast(like) else nullcontext()


class _Weights:
    """All that the weights are made of, in canonical shapes, in plain PyTorch: for devices without the op."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        slopes: Tensor | None,
        dropout_key: Tensor | None,
        options: Options,
    ) -> None:
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.shape = *query.shape[:3], key.size(2)
        self.dropout_key, self.options = dropout_key, options
        self.seen = _seen(query, key, mask, options)
        if slopes is not None:
            mask = common.with_slopes(mask, slopes, query, key.size(-2), options.bottom_right)
        self.mask = None if mask is None or mask.dtype == torch.bool else mask.to(dtype)
        scale = 1 / math.sqrt(max(1, query.size(-1))) if options.scale is None else options.scale
        query, key, lse = query.to(dtype), key.to(dtype), lse.to(dtype)
        if self.seen is not None:  # a key that no query may see is not used: 0 · NaN would be NaN, in the gradient too
            key = torch.where(_used(self.seen, query.size(1) // max(1, key.size(1)))[..., None], key, 0)
        # e to the power of minus this is 0, and its products with zeros are zeros, as those of −∞ are not.
        most = torch.finfo(dtype).max / 4
        self.lse = torch.nan_to_num(lse, nan=math.nan, posinf=math.inf, neginf=most)[..., None]
        if options.softcap is None:  # one product gives scale · q·k − lse
            query, key = torch.cat([query * scale, self.lse], -1), pad(key, (0, 1), value=-1.0)
        else:
            query = query * (scale / options.softcap)
        self.query, self.key = query, key

    def mean(self) -> Tensor:
        """[batch, queries, keys]: over the heads, some queries at a time."""
        batch, heads, queries, keys = self.shape
        if torch.compiler.is_exporting() or batch * heads * queries * keys <= _CHUNK:
            return self._mean_of_rows(0, None)
        some = max(1, _CHUNK // (batch * heads * keys))
        # The graph keeps what goes into a chunk, and not its scores. (functorch has no way to leave them out.)
        again = torch.is_grad_enabled() and not in_functorch()
        parts = []
        for first in range(0, queries, some):
            chunk = first, min(first + some, queries)
            if again:
                parts.append(checkpoint(self._mean_of_rows, *chunk, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._mean_of_rows(*chunk))
        return torch.cat(parts, 1)

    def _mean_of_rows(self, first: int, last: int | None) -> Tensor:
        return self.of_rows(first, last).mean(1)

    def of_rows(self, first: int, last: int | None) -> Tensor:
        """[batch, heads, last − first, keys]; all where last is None."""
        options, key = self.options, self.key
        rows = _of_rows(self.query, first, last)
        if key.size(1) == rows.size(1):
            scores = rows @ key.transpose(2, 3)
        else:  # heads that share keys are rows of one product
            together = torch.unflatten(rows, 1, (key.size(1), -1)).flatten(2, 3)
            scores = (together @ key.transpose(2, 3)).view(*rows.shape[:3], key.size(2))
        if options.softcap is not None:
            scores = options.softcap * scores.tanh() - _of_rows(self.lse, first, last)
        if self.mask is not None:
            scores = scores + _of_rows(self.mask, first, last)
        if self.seen is not None:
            scores = torch.where(_of_rows(self.seen, first, last), scores, -math.inf)
        weights = scores.exp() if torch.is_grad_enabled() else scores.exp_()
        if options.dropout_p == 0 or self.dropout_key is None:
            return weights
        kept = _kept(self.dropout_key, options.dropout_p, self.shape, first, last)
        dropped = _threshold(options.dropout_p) / 2**16
        return torch.where(kept, weights / max(1 - dropped, 1e-30), 0)


def _of_rows(x: Tensor, first: int, last: int | None) -> Tensor:
    return x if last is None or x.size(2) == 1 else x[:, :, first:last]


def _seen(query: Tensor, key: Tensor, mask: Tensor | None, options: Options) -> Tensor | None:
    """Which query may see which key, [batch or 1, heads or 1, queries or 1, keys]; None if every one every one."""
    seen = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask != -math.inf
        seen = seen.expand(*seen.shape[:-1], key.size(-2))
    left, right = options.window_left, options.window_right
    if left is not None or right is not None:
        offsets = common.offsets(query, key.size(-2), options.bottom_right)
        band = torch.ones_like(offsets, dtype=torch.bool)
        if left is not None:
            band = band & (offsets >= -left)
        if right is not None:
            band = band & (offsets <= right)
        seen = band[None, None] if seen is None else seen & band
    return seen


def _used(seen: Tensor, group: int) -> Tensor:
    """[batch or 1, key heads or 1, keys]: the keys that any query sees."""
    used = seen.any(-2)
    return used if group == 1 or used.size(1) == 1 else torch.unflatten(used, 1, (-1, group)).any(2)


_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def _threshold(dropout_p: float) -> int:
    return math.floor(dropout_p * 2**16 + 0.5)


def _kept(dropout_key: Tensor, dropout_p: float, shape: tuple[int, ...], first: int, last: int | None) -> Tensor:
    """What dropout leaves, as the op draws it: half words of Philox4x32-10 (docs/random.md), on any device."""
    batch, heads, queries, keys = shape
    blocks, device = (keys + 7) // 8, dropout_key.device
    rows = torch.arange(batch * heads * queries, device=device).view(batch, heads, queries)[..., first:last]
    seed, offset = dropout_key.unbind()
    counter = offset + rows[..., None] * blocks + torch.arange(blocks, device=device)
    c0, c1 = counter & _LOW, counter >> 32 & _LOW
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # of 64 bits, whatever the sign
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _W0 & _LOW, k1 + _W1 & _LOW
    halves = torch.stack([half for c in (c0, c1, c2, c3) for half in (c & 0xFFFF, c >> 16)], -1)
    return halves.flatten(-2)[..., :keys] >= _threshold(dropout_p)
