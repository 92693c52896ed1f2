"""Fused dot-product attention, and what is built of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from .._errors import NUMBER, TENSOR, check_type
from .._load import _C
from . import _attention as common
from ._attention import Window


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
        dropout_p: probability with which a weight is dropped.
        is_causal: query i sees keys j ≤ i + d.
        scale: of the scores; None for 1/√D.
        enable_gqa: neighbouring H / Hk heads of query share a head of key and value. (One head of key and value is
            shared by all without this too.)
        window: ``(left, right)``, inclusive: query i sees keys i + d − left ≤ j ≤ i + d + right; None is open.
        alibi_slopes: ``[H]`` or ``[*, H]``, taken as float32 (Press et al. 2022). Slopes that require a gradient become
            a part of the mask, which is then held: ``[H, L, S]``.
        softcap: bound of the scaled scores, before ALiBi and mask.
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

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

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
        attn_mask is None
        and dropout_p == 0.0
        and window is None
        and alibi_slopes is None
        and softcap is None
        and generator is None
        and dropout_key is None
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
        and causal_alignment == "top_left"
        and type(is_causal) is type(enable_gqa) is bool
        and not has_torch_function_variadic(query, key, value)
        and not torch.compiler.is_compiling()
        and _fit(query, key, value, enable_gqa)
    ):
        out = _C.attention(
            query, key, value, None, None, None, None, None, 0.0, scale, None, 0 if is_causal else None, False, None
        )
        return out if return_lse else out[0]
    if getattr(query, "is_nested", False):
        return _jagged(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, window=window,
            alibi_slopes=alibi_slopes, softcap=softcap, causal_alignment=causal_alignment, return_lse=return_lse,
            generator=generator, dropout_key=dropout_key,
        )  # fmt: skip
    options = common.check_options(dropout_p, is_causal, scale, enable_gqa, window, softcap, causal_alignment)
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
        lse_a, lse_b: ``[*, L]``; −∞ where a query saw no key.

    Returns:
        ``(out, lse)``: out in the type of out_a, lse in float32 (float64 for float64). A query that saw no key in
        either has 0 and −∞.

    Gradients: to all four, of any order; forward-mode AD; ``vmap``; plain PyTorch, in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

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
    options = common.check_options(dropout_p, is_causal, scale, enable_gqa, window, softcap, causal_alignment)
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
    if starts_v is not starts_k and not torch.equal(starts_v, starts_k):
        raise ValueError("value must have key's lengths, but got others")
    out = varlen_attention(q, k, v, starts_q, starts_k, *args, **kwargs)
    nested = torch.nested.nested_tensor_from_jagged
    if not kwargs["return_lse"]:
        return nested(out, starts_q).transpose(1, 2)
    return nested(out[0], starts_q).transpose(1, 2), nested(out[1].transpose(0, 1), starts_q).transpose(1, 2)


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
    generator: torch.Generator | None = None,
    dropout_key: Tensor | None = None,
) -> Any:
    r"""Nadaraya–Watson regression with a Gaussian kernel, as a case of :func:`scaled_dot_product_attention`.

    .. math::
        \text{out}_i = \frac{\sum_j e^{-\|q_i - k_j\|^2 / 2 w^2} \, v_j}{\sum_j e^{-\|q_i - k_j\|^2 / 2 w^2}}, \qquad
        -\frac{\|q - k\|^2}{2 w^2} = \frac{q \cdot k}{w^2} - \frac{\|k\|^2}{2 w^2} - \frac{\|q\|^2}{2 w^2}

    The last term is the same for all keys of a query, and falls out of the quotient; so this is a dot-product attention
    with the scale 1/w² and an additive mask −‖k_j‖²/2w². Queries and keys are first shifted by the
    queries' mean, which changes no distance and keeps the digits of points far from the origin.

    Args:
        query, key, value: as in :func:`scaled_dot_product_attention`; ``[L, D]``, ``[S, D]`` and ``[S, Dv]`` for plain
            regression.
        width: the kernel's, w: a positive number, or a tensor that broadcasts to the leading dimensions ``[*, H]``,
            with gradient.
        attn_mask: bool or additive; joined with the mask above in a tensor of its own shape, float32 (float64 for
            float64).
        dropout_p, is_causal, enable_gqa, window, causal_alignment, generator, dropout_key: as there.
        return_lse: whether :math:`\ln \sum_j e^{-\|q_i - k_j\|^2 / 2 w^2}` is returned too.

    Returns:
        ``[*, H, L, Dv]`` in the query's type, or ``(output, lse)``.

    Gradients, determinism, autocast and errors as in :func:`scaled_dot_product_attention`.

    Source: Nadaraya 1964; Watson 1964.

    Example::

        >>> import torch, lect11ext
        >>> x = torch.linspace(0, 5, 50)[:, None]
        >>> y = lect11ext.functional.kernel_attention(torch.tensor([[2.5]]), x, x.sin(), width=0.2)
        >>> torch.allclose(y, torch.tensor([[2.5]]).sin(), atol=0.02)
        True
    """
    for name, x in (("query", query), ("key", key)):
        check_type(name, x, TENSOR)
    if isinstance(width, Tensor):
        inverse: Any = width[..., None, None] ** -2
    else:
        check_type("width", width, (*NUMBER, Tensor))
        if not 0 < width < math.inf:
            raise ValueError(f"width must be positive, but got {width}")
        inverse = float(width) ** -2
    if query.dim() > 1 and key.dim() > 1 and query.size(-1) == key.size(-1):
        centre = torch.where(query.isfinite(), query, 0).detach().mean(tuple(range(query.dim() - 1)))
        query, key = query - centre, key - centre
    bias = _half_squares(key)
    if enable_gqa and key.dim() > 2 and query.dim() > 2 and key.size(-3) and query.size(-3) % key.size(-3) == 0:
        bias = bias.repeat_interleave(query.size(-3) // key.size(-3), -3)
    bias = (bias * -inverse).to(bias.dtype)
    if attn_mask is not None:
        check_type("attn_mask", attn_mask, TENSOR)
        bias = torch.where(attn_mask, bias, -math.inf) if attn_mask.dtype == torch.bool else bias + attn_mask
    half_squares = _half_squares(query) if return_lse else None
    scale = inverse
    if isinstance(width, Tensor):
        query, scale = (query * inverse).to(query.dtype), 1.0
    out = scaled_dot_product_attention(
        query, key, value, bias, dropout_p, is_causal, scale, enable_gqa, window=window,
        causal_alignment=causal_alignment, return_lse=return_lse, generator=generator, dropout_key=dropout_key,
    )  # fmt: skip
    if not return_lse:
        return out
    output, lse = out
    return output, (lse - (half_squares * inverse).squeeze(-2)).to(lse.dtype)


def _half_squares(x: Tensor) -> Tensor:
    """½‖x‖² of the rows, [*, 1, rows], at least float32. What is not finite shows in the product as well, where it is
    seen; where it is not, it must not come in by the mask."""
    x = torch.where(x.isfinite(), x, 0).to(torch.promote_types(x.dtype, torch.float32))
    return x.square().sum(-1).div(2).unsqueeze(-2)
