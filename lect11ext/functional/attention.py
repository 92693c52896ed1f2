"""Fused dot-product attention, and what is built of it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .._errors import TENSOR, check_device, check_type, wrong_type
from .._load import _C
from . import _attention as common
from ._attention import Window
from ._dispatch import is_overridden


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
) -> Any:
    r"""Attention in one op that never holds a tensor of queries × keys: torch.nn.functional's, and more.

    .. math::
        s_{ij} &= \text{scale} \cdot q_i \cdot k_j, \qquad
        t_{ij} = \text{softcap} \cdot \tanh(s_{ij} / \text{softcap}) - \text{slope} \cdot |i + d - j| + m_{ij} \\
        \text{lse}_i &= \ln \sum_j e^{t_{ij}}, \qquad
        \text{out}_i = \sum_j z_{ij} \, e^{t_{ij} - \text{lse}_i} \, v_j

    over the keys j that query i may see. d is 0, or keys − queries with ``causal_alignment="bottom_right"``; z is
    dropout's 0 or 1 / (1 − p). A query that sees no key has output 0, LSE −∞ and no gradient. NaN or inf in a key or
    value that every query of its sequence is barred from reaches neither output nor gradient.

    Args:
        query: ``[*, H, L, D]``, also ``[*, L, D]`` and ``[L, D]``; float32, float64, bfloat16 or float16, any strides
            (only the last dimension's other than 1 costs a copy). Or jagged nested tensors ``[B, H, j, D]``.
        key, value: ``[*, H, S, D]`` and ``[*, H, S, Dv]``. Leading dimensions broadcast, without a copy.
        attn_mask: broadcast to ``[*, H, L, S]``, without a copy (but where it broadcasts over some of several batch
            dimensions): bool, True where a query may see a key; or of the query's type, added to the scores, and
            float32 with 16-bit types too. What it and ``is_causal`` or ``window`` bar is barred.
        dropout_p: probability with which a weight is dropped, to the nearest multiple p of 2⁻¹⁶; what is
            kept is divided by 1 − p.
        is_causal: query i sees keys j ≤ i + d.
        scale: of the scores; None for 1/√D.
        enable_gqa: neighbouring H / Hk heads of query share a head of key and value. (One head of key and value is
            shared by all without this too.)
        window: ``(left, right)``, inclusive: query i sees keys i + d − left ≤ j ≤ i + d + right; None is open.
        alibi_slopes: ``[H]`` or ``[*, H]``, taken as float32 (Press et al. 2022). Slopes that require a gradient become
            a part of the mask, which is then held, ``[H, L, S]``, in float32 (float64 for float64).
        softcap: bound of the scaled scores, before ALiBi and mask; in float32's range, unless the query is float64.
        causal_alignment: which corner ``is_causal``, ``window`` and ALiBi start from: ``"top_left"`` or
            ``"bottom_right"``.
        return_lse: whether the log-sum-exp is returned too, for :func:`merge_attention` and :func:`attention_weights`.
        generator: where dropout's key is drawn from, by default the device's default generator.
        dropout_key: int64 ``[seed, offset]`` that makes dropout explicit (:func:`philox_key`); then no generator is
            touched. ``torch.compile(fullgraph=True)`` takes no generator: draw a key from it outside.

    Returns:
        ``[*, H, L, Dv]`` in the query's type; with ``return_lse`` ``(output, lse)``, lse ``[*, H, L]``, a natural
        logarithm, float32 (float64 for float64).

    Gradients: through output and LSE to query, key, value, an additive mask (reduced over what it broadcasts over)
    and slopes, of any order; forward-mode AD; ``vmap`` (``randomness=`` decides whether samples share dropout).
    Deterministic: the same bits in every run. Sums are kept in float32 (float64 for float64). Under autocast it runs in
    autocast's type. Dropout's noise is regenerated in the backward, never stored.

    Scores of any size give finite gradients. A backward makes the weights again from the LSE, which is rounded like any
    number: where scores exceed 10⁴, and on CUDA 16 queries or fewer share a head of the keys, they are off by a
    rounding of the score; and where a mask is one huge number for a whole row (−10⁹, the lowest one), the row's keys
    each count once in the gradients, not 1/S. −inf, or False, bars a row.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Vaswani et al. 2017; Dao et al. 2022 and Milakov & Gimelshein 2018 (online softmax).

    Example::

        >>> import torch, lect11ext
        >>> query, key, value = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 4)
        >>> lect11ext.functional.scaled_dot_product_attention(
        ...     query, key, value, is_causal=True, enable_gqa=True, causal_alignment="bottom_right"
        ... ).shape
        torch.Size([2, 8, 5, 4])
    """
    # The plain case first, in few steps: what is checked here is all that the general way would check.
    if (
        not torch.compiler.is_compiling()
        and attn_mask is None
        and type(dropout_p) is float
        and dropout_p == 0.0
        and window is None
        and alibi_slopes is None
        and softcap is None
        and generator is None
        and dropout_key is None
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and causal_alignment == "top_left"
        and type(is_causal) is type(enable_gqa) is type(return_lse) is bool
        and not is_overridden(query, key, value)
        and _fit(query, key, value, enable_gqa)
    ):
        try:
            out = _C.attention(
                query, key, value, None, None, None, None, None, 0.0, scale, None, 0 if is_causal else None, False, None
            )
        except TypeError as error:  # of what has the sizes, and is no tensor
            raise wrong_type(error, query=(query, TENSOR), key=(key, TENSOR), value=(value, TENSOR)) from None
        return out if return_lse else out[0]
    if getattr(query, "is_nested", False):
        return _jagged(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window=window,
            alibi_slopes=alibi_slopes, softcap=softcap, causal_alignment=causal_alignment, return_lse=return_lse,
            generator=generator, dropout_key=dropout_key,
        )  # fmt: skip
    options = common.check_options(
        dropout_p, is_causal, scale, enable_gqa, window, softcap, causal_alignment, return_lse
    )
    q, k, v, shape = common.canonical(query, key, value, enable_gqa)
    mask = common.canonical_mask(attn_mask, shape)
    slopes = common.canonical_slopes(alibi_slopes, shape)
    if slopes is not None and common.has_derivative(slopes):
        mask, slopes = common.with_slopes(mask, slopes, q, shape.keys, options.bottom_right), None
    drop = common.dropout_key_for(q, shape.keys, dropout_p, generator, dropout_key)
    output, lse = common.call(q, k, v, mask, slopes, None, None, drop, options)
    output = common.restored(output, shape, 2)
    return (output, common.restored(lse, shape, 1)) if return_lse else output


def _fit(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the three are the op's own operands."""
    if torch._C._is_tracing():  # sizes are tensors then, which may not be compared without a warning
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return bool(_have_sizes_of_the_op(query, key, value, enable_gqa))
    return _have_sizes_of_the_op(query, key, value, enable_gqa)


def _have_sizes_of_the_op(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    try:
        (b, h, _, d), (kb, kh, s, kd), (vb, vh, vs, _) = query.shape, key.shape, value.shape
    except (ValueError, RuntimeError, AttributeError):  # of another rank; nested; no tensor
        return False
    same_heads = h == kh or (enable_gqa and kh > 0 and h % kh == 0)
    return same_heads and b == kb == vb and kh == vh and d == kd and s == vs


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    r"""Attention over two sets of keys from the attention over each: for keys that lie apart, on pages or machines.

    .. math::
        \text{lse} = \ln(e^{\text{lse}_a} + e^{\text{lse}_b}), \qquad
        \text{out} = e^{\text{lse}_a - \text{lse}} \, \text{out}_a + e^{\text{lse}_b - \text{lse}} \, \text{out}_b

    Args:
        out_a, out_b: ``[*, L, Dv]``, as :func:`scaled_dot_product_attention` returns them.
        lse_a, lse_b: ``[*, L]``; −∞ where a query saw no key, and then its row of out is not used: it may be NaN.

    Returns:
        ``(out, lse)``: out in the type of out_a, lse in float32 (float64 for float64). A query that saw no key in
        either has 0 and −∞; one with an LSE of +∞, which only infinite scores give, NaN.

    Gradients: to all four, of any order; forward-mode AD; ``vmap``; plain PyTorch, in float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Example::

        >>> import torch, lect11ext
        >>> attend = lect11ext.functional.scaled_dot_product_attention
        >>> query, key, value = torch.randn(3, 5, 8), torch.randn(3, 6, 8), torch.randn(3, 6, 8)
        >>> parts = [attend(query, key[:, part], value[:, part], return_lse=True) for part in (slice(2), slice(2, 6))]
        >>> out, lse = lect11ext.functional.merge_attention(*parts[0], *parts[1])
        >>> torch.allclose(out, attend(query, key, value), atol=1e-6)
        True
    """
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        check_type(f"out_{name}", out, TENSOR)
        check_type(f"lse_{name}", lse, TENSOR)
        for part, x in ((f"out_{name}", out), (f"lse_{name}", lse)):
            check_device(part, x, out_a, "out_a")
            if not x.is_floating_point():
                raise TypeError(f"{part} must be floating-point, but got {x.dtype}")
        if out.shape[:-1] != lse.shape:
            raise ValueError(
                f"lse_{name} must have the shape of out_{name} without its last dimension, {list(out.shape[:-1])}, "
                f"but got {list(lse.shape)}"
            )
    if out_a.shape != out_b.shape:
        raise ValueError(f"out_b must have the shape of out_a, {list(out_a.shape)}, but got {list(out_b.shape)}")
    dtype = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    lse_a, lse_b = lse_a.to(dtype), lse_b.to(dtype)
    none_a, none_b = lse_a == -math.inf, lse_b == -math.inf
    top = torch.maximum(lse_a, lse_b).detach()  # its gradient cancels
    top = torch.where(none_a & none_b, 0, top)
    # Where a side is −∞ its difference would be too, or NaN; what stands there has no part in the result.
    share_a = torch.where(none_a, 0, torch.where(none_a, 0, lse_a - top).exp())
    share_b = torch.where(none_b, 0, torch.where(none_b, 0, lse_b - top).exp())
    total = torch.where(none_a & none_b, 1, share_a + share_b)
    out_a, out_b = torch.where(none_a[..., None], 0, out_a), torch.where(none_b[..., None], 0, out_b)
    out = (share_a / total)[..., None] * out_a + (share_b / total)[..., None] * out_b
    return out.to(out_a.dtype), torch.where(none_a & none_b, -math.inf, top + total.log())


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
    generator: torch.Generator | None = None,
    dropout_key: Tensor | None = None,
) -> Any:
    r"""Attention of sequences of several lengths that lie one behind the other, each to its own keys alone.

    Sequence n has the queries ``cu_seqlens_q[n] … cu_seqlens_q[n + 1] − 1``, and keys alike. What is computed stands in
    :func:`scaled_dot_product_attention`, with positions i and j counted within a sequence.

    Args:
        query: ``[queries, H, D]``, of all sequences together.
        key, value: ``[keys, H, D]`` and ``[keys, H, Dv]``.
        cu_seqlens_q, cu_seqlens_k: int64 or int32 ``[sequences + 1]`` on the query's device: from 0, ascending.
        alibi_slopes: ``[H]``, without gradient.
        dropout_p, is_causal, scale, enable_gqa, window, softcap, causal_alignment, generator, dropout_key: as in
            :func:`scaled_dot_product_attention`.
        return_lse: whether the log-sum-exp is returned too.

    Returns:
        ``[queries, H, Dv]`` in the query's type; with ``return_lse`` ``(output, lse)``, lse ``[H, queries]``.

    Gradients, determinism, autocast and errors as in :func:`scaled_dot_product_attention`.

    Example::

        >>> import torch, lect11ext
        >>> tokens, starts = torch.randn(7, 2, 8), torch.tensor([0, 3, 7])  # three tokens, and four
        >>> lect11ext.functional.varlen_attention(tokens, tokens, tokens, starts, starts, is_causal=True).shape
        torch.Size([7, 2, 8])
    """
    options = common.check_options(
        dropout_p, is_causal, scale, enable_gqa, window, softcap, causal_alignment, return_lse
    )
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_type(name, x, TENSOR)
        if x.dim() != 3:
            raise ValueError(f"{name} must be [positions, heads, columns], but got shape {list(x.shape)}")
    for name, starts in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_type(name, starts, TENSOR)
        if starts.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, but got {starts.dtype}")
        if starts.dim() != 1 or starts.size(0) == 0:
            raise ValueError(f"{name} must have shape [sequences + 1], but got {list(starts.shape)}")
    if cu_seqlens_q.size(0) != cu_seqlens_k.size(0):
        raise ValueError(
            f"cu_seqlens_k must have as many items as cu_seqlens_q, {cu_seqlens_q.size(0)}, but got "
            f"{cu_seqlens_k.size(0)}"
        )
    if value.size(0) != key.size(0):  # here, since its sizes are about to be exchanged
        raise ValueError(f"value must have as many positions as key, {key.size(0)}, but got shape {list(value.shape)}")
    q, k, v, shape = common.canonical(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), enable_gqa)
    slopes = common.canonical_slopes(alibi_slopes, shape)
    if slopes is not None and (slopes.dim() != 1 or common.has_derivative(slopes)):
        raise ValueError(f"alibi_slopes must have shape [{shape.heads}] and no gradient where there are cu_seqlens")
    drop = common.dropout_key_for(q, shape.keys, dropout_p, generator, dropout_key)
    output, lse = common.call(q, k, v, None, slopes, cu_seqlens_q, cu_seqlens_k, drop, options)
    output = output.squeeze(0).transpose(0, 1)
    return (output, lse.squeeze(0)) if return_lse else output


def _jagged(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, *args: Any, **kwargs: Any) -> Any:
    """[batch, heads, j, columns], as torch.nn.functional takes nested tensors, through varlen_attention."""
    if attn_mask is not None:
        raise ValueError("attn_mask must be None with nested tensors")
    parts = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_type(name, x, TENSOR)
        if not x.is_nested or x.layout != torch.jagged or x.dim() != 4:
            raise ValueError(
                f"{name} must be a nested tensor of layout torch.jagged, [batch, heads, j, columns], as query is, but "
                f"got {'nested, ' if x.is_nested else ''}layout {x.layout}, {x.dim()} dimensions"
            )
        parts.append(jagged_parts(name, x.transpose(1, 2)))
    (q, starts_q), (k, starts_k), (v, starts_v) = parts
    check_sequences(starts_q, starts_k, starts_v)
    out = varlen_attention(q, k, v, starts_q, starts_k, *args, **kwargs)
    nested = torch.nested.nested_tensor_from_jagged
    if not kwargs["return_lse"]:
        return nested(out, starts_q).transpose(1, 2)
    return nested(out[0], starts_q).transpose(1, 2), nested(out[1].transpose(0, 1), starts_q).transpose(1, 2)


def check_sequences(starts_q: Tensor, starts_k: Tensor, starts_v: Tensor) -> None:
    """That nested query, key and value have as many sequences, and the last two the same lengths."""
    if starts_q.size(0) != starts_k.size(0):
        raise ValueError(
            f"key must have as many sequences as query, {starts_q.size(0) - 1}, but got {starts_k.size(0) - 1}"
        )
    if starts_v is not starts_k and not torch.equal(starts_v, starts_k):
        raise ValueError("value must have key's lengths, but got others")


def jagged_parts(name: str, x: Any) -> tuple[Tensor, Tensor]:
    """The values, one sequence behind the other, and the starts of a nested tensor [batch, j, …]."""
    if not x.is_nested:
        raise ValueError(f"{name} must all be nested tensors, or none")
    if x.layout != torch.jagged:
        parts = x.unbind()
        lengths = torch.tensor([0, *(part.size(0) for part in parts)], device=x.device)
        return torch.cat(parts), lengths.cumsum(0)
    if x._ragged_idx != 1 or x.lengths() is not None:
        raise ValueError(f"{name} must be nested along the sequences, without holes; contiguous() fills them")
    return x.values(), x.offsets()
