"""Dot-product attention in plain PyTorch, on whole tensors of queries × keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .random import philox_words

Window = tuple[int | None, int | None]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    dropout_key: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.scaled_dot_product_attention`.

    ``dropout_key`` drops what the fused function drops; without it ``torch.rand`` decides.
    """
    out_dtype, (query, key, value) = query.dtype, _widen(query, key, value)
    dropout_p = _counted(dropout_p)
    key, value = _heads(query, key, enable_gqa), _heads(query, value, enable_gqa)
    seen = _allowed(query, key, attn_mask, is_causal, window, causal_alignment)
    kept = None
    if dropout_p > 0 and dropout_key is not None:
        kept = _kept(seen.shape, dropout_p, dropout_key)
    elif dropout_p > 0:
        kept = torch.rand(seen.shape, device=query.device, generator=generator) >= dropout_p
    key, value = _used(seen, key), _used(seen, value)
    scores = _scores(query, key, attn_mask, scale, alibi_slopes, softcap, causal_alignment)
    out, lse = _attend(scores, seen, value, kept, dropout_p)
    return (out.to(out_dtype), lse) if return_lse else out.to(out_dtype)


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
    """See :func:`lect11ext.functional.attention_weights`."""
    out_dtype, (query, key) = query.dtype, _widen(query, key)
    dropout_p = _counted(dropout_p)
    key = _heads(query, key, enable_gqa)
    seen = _allowed(query, key, attn_mask, is_causal, window, causal_alignment) & (lse != -math.inf)[..., None]
    key = _used(seen, key)
    scores = _scores(query, key, attn_mask, scale, alibi_slopes, softcap, causal_alignment)
    lse = torch.where(lse == -math.inf, 0, lse)
    weights = torch.where(seen, scores - lse[..., None], -math.inf).exp()
    if dropout_p > 0 and dropout_key is not None:
        weights = _drop(weights, _kept(weights.shape, dropout_p, dropout_key), dropout_p)
    return (weights.mean(-3) if average_heads else weights).to(out_dtype)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.merge_attention`."""
    lses = torch.stack(_widen(lse_a, lse_b), -1)
    weights, lse = _softmax(lses, lses != -math.inf)
    outs = torch.stack(_widen(out_a, out_b), -1)
    return (outs * weights[..., None, :]).sum(-1).to(out_a.dtype), lse


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    dropout_key: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.varlen_attention`: one sequence after the other."""
    total, heads = query.shape[:2]
    dropout_p, kept = _counted(dropout_p), None
    if dropout_p > 0 and dropout_key is not None:
        kept = _kept(torch.Size([heads, total, key.size(0)]), dropout_p, dropout_key)
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        q, k, v = (x.transpose(0, 1) for x in _widen(query[q0:q1], key[k0:k1], value[k0:k1]))
        k, v = _heads(q, k, enable_gqa), _heads(q, v, enable_gqa)
        seen = _allowed(q, k, None, is_causal, window, causal_alignment)
        k, v = _used(seen, k), _used(seen, v)
        scores = _scores(q, k, None, scale, alibi_slopes, softcap, causal_alignment)
        out, lse = _attend(scores, seen, v, None if kept is None else kept[:, q0:q1, : k1 - k0], dropout_p)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    rest = total - starts_q[-1]  # of no sequence
    outs.append(query.new_zeros(rest, heads, value.size(-1), dtype=outs[0].dtype if outs else None))
    lses.append(outs[0].new_full((heads, rest), -math.inf))
    out, lse = torch.cat(outs).to(query.dtype), torch.cat(lses, -1)
    return (out, lse) if return_lse else out


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: float | Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    dropout_key: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.kernel_attention`: distances outright, without the identity."""
    out_dtype, (query, key, value) = query.dtype, _widen(query, key, value)
    dropout_p = _counted(dropout_p)
    key, value = _heads(query, key, enable_gqa), _heads(query, value, enable_gqa)
    seen = _allowed(query, key, attn_mask, is_causal, window, causal_alignment)
    key, value = _used(seen, key), _used(seen, value)
    distances = (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1)
    width = width if isinstance(width, (float, int)) else width[..., None, None].to(distances.dtype)
    kept = _kept(seen.shape, dropout_p, dropout_key) if dropout_p > 0 and dropout_key is not None else None
    out, lse = _attend(_add_mask(distances / (-2 * width**2), attn_mask), seen, value, kept, dropout_p)
    return (out.to(out_dtype), lse) if return_lse else out.to(out_dtype)


def _widen(*tensors: Tensor) -> list[Tensor]:
    """At least float32, as the kernels sum."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _heads(query: Tensor, x: Tensor, enable_gqa: bool) -> Tensor:
    return x.repeat_interleave(query.size(-3) // x.size(-3), -3) if enable_gqa else x


def _offsets(query: Tensor, key: Tensor, causal_alignment: str) -> Tensor:
    """j − i − diagonal, ``[L, S]``."""
    queries, keys = query.size(-2), key.size(-2)
    diagonal = keys - queries if causal_alignment == "bottom_right" else 0
    i, j = torch.arange(queries, device=query.device), torch.arange(keys, device=query.device)
    return j - i[:, None] - diagonal


def _allowed(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, window: Window | None, causal_alignment: str
) -> Tensor:
    """Which query may see which key, of the scores' whole shape."""
    offsets = _offsets(query, key, causal_alignment)
    left, right = (None, None) if window is None else window
    right = min(right or 0, 0) if is_causal else right
    seen = torch.ones_like(offsets, dtype=torch.bool)
    if left is not None:
        seen = seen & (offsets >= -left)
    if right is not None:
        seen = seen & (offsets <= right)
    if attn_mask is not None:
        seen = seen & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf)
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], seen.shape[:-2])
    return seen.expand(*lead, *offsets.shape)


def _used(seen: Tensor, x: Tensor) -> Tensor:
    """Zero for keys and values that no query may see: 0 · NaN would be NaN, in the gradient too."""
    return torch.where(seen.any(-2)[..., None], x, 0)


def _scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    causal_alignment: str,
) -> Tensor:
    scale = 1 / math.sqrt(max(query.size(-1), 1)) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * _offsets(query, key, causal_alignment).abs()
    return _add_mask(scores, attn_mask)


def _add_mask(scores: Tensor, attn_mask: Tensor | None) -> Tensor:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return scores
    return scores + torch.where(attn_mask == -math.inf, 0, attn_mask)  # −∞ is in _allowed; here it would make NaN


def _attend(
    scores: Tensor, seen: Tensor, value: Tensor, kept: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    weights, lse = _softmax(scores, seen)
    return (weights if kept is None else _drop(weights, kept, dropout_p)) @ value, lse


def _softmax(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and their log-sum-exp over the last dimension; 0 and −∞ for a row that sees nothing."""
    scores = torch.where(seen, scores, -math.inf)
    some = seen.any(-1)
    if scores.size(-1) == 0:
        top = scores.new_zeros(scores.shape[:-1])
    else:
        top = torch.where(some, scores.detach().amax(-1), 0)  # its gradient cancels
    raised = (scores - top[..., None]).exp()
    total = raised.sum(-1)
    total = torch.where(some, total, 1)
    return raised / total[..., None], torch.where(some, top + total.log(), -math.inf)


def _counted(dropout_p: float) -> float:
    """The nearest of what half words count to."""
    return math.floor(dropout_p * 2**16 + 0.5) / 2**16


def _kept(shape: torch.Size, dropout_p: float, dropout_key: Tensor) -> Tensor:
    """What dropout leaves: element j of a row takes half word j of the row's stream."""
    *lead, keys = shape
    rows, blocks = math.prod(lead), -(-keys // 8)
    seed, offset = (int(v) % 2**64 for v in dropout_key.tolist())
    halves = philox_words(seed, offset, rows * blocks).astype("<u4").view("<u2").reshape(rows, 8 * blocks)[:, :keys]
    return torch.from_numpy(halves >= dropout_p * 2**16).reshape(shape).to(dropout_key.device)


def _drop(weights: Tensor, kept: Tensor, dropout_p: float) -> Tensor:
    return torch.where(kept, weights / (1 - dropout_p), 0) if dropout_p < 1 else torch.zeros_like(weights) * weights
