"""What attention's functions share: options, canonical shapes, the way to the op. What tensors must be, the op says."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._errors import (
    NUMBER,
    OPTIONAL_GENERATOR,
    OPTIONAL_NUMBER,
    OPTIONAL_TENSOR,
    TENSOR,
    check_device,
    check_finite,
    check_type,
    plain,
    wrong_type,
)
from .._load import _C
from ._dispatch import is_overridden
from .random import philox_key

Window = tuple[int | None, int | None]

_OPEN = 2**40  # a window of so many keys has no bound


class Options(NamedTuple):
    """What does not depend on the tensors, as the op takes it."""

    dropout_p: float
    scale: float | None
    window_left: int | None
    window_right: int | None
    bottom_right: bool
    softcap: float | None


class Shape(NamedTuple):
    """Of the scores, once the leading dimensions are broadcast: [*batch, heads, queries, keys]."""

    batch: torch.Size
    heads: int
    queries: int
    keys: int
    rank: int  # of the result as the caller is to see it


def check_options(
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: Window | None,
    softcap: float | None,
    causal_alignment: str,
    return_lse: bool = False,
) -> Options:
    """Raises for what is out of range; the causal bound goes into the window."""
    check_type("dropout_p", dropout_p, NUMBER)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability, from 0 to 1, but got {dropout_p}")
    check_type("is_causal", is_causal, (bool,))
    check_type("enable_gqa", enable_gqa, (bool,))
    check_type("return_lse", return_lse, (bool,))
    if scale is not None:
        check_finite("scale", scale)
    if softcap is not None:
        check_finite("softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"softcap must be positive, or None for none, but got {softcap}")
    if causal_alignment not in ("top_left", "bottom_right"):
        raise ValueError(f"causal_alignment must be 'top_left' or 'bottom_right', but got {causal_alignment!r}")
    left, right = check_window(window)
    if is_causal:
        right = 0
    return Options(dropout_p, scale, left, right, causal_alignment == "bottom_right", softcap)


def check_window(window: Window | None) -> Window:
    """(left, right), None where a side is open."""
    if window is None:
        return None, None
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(f"window must be (left, right), numbers of keys or None, but got {window!r}") from None
    for side, bound in (("left", left), ("right", right)):
        if bound is not None:
            check_type(f"window's {side} side", bound, (int,))
            if bound < 0:
                raise ValueError(f"window's {side} side must be a number of keys, or None for all, but got {bound}")
    return (None if left is None or left > _OPEN else left), (None if right is None or right > _OPEN else right)


def canonical(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, third: str = "value"
) -> tuple[Tensor, Tensor, Tensor, Shape]:
    """The three as [batch, heads, positions, columns], by views; keys and values may have fewer heads."""
    for name, x in (("query", query), ("key", key), (third, value)):
        if not isinstance(x, Tensor):
            check_type(name, x, TENSOR)
        if x.is_nested:
            raise ValueError(
                f"{name} must not be nested, but got a nested tensor: scaled_dot_product_attention takes them where "
                "query, key and value all are"
            )
        if x.dim() < 2:
            raise ValueError(f"{name} must have at least 2 dimensions, positions and columns, but got {list(x.shape)}")
    qs, ks, vs = query.shape, key.shape, value.shape
    if len(qs) == len(ks) == len(vs) == 4 and qs[:2] == ks[:2] == vs[:2] and qs[3] == ks[3] and ks[2] == vs[2]:
        return query, key, value, Shape(torch.Size(qs[:1]), qs[1], qs[2], ks[2], 4)
    if query.size(-1) != key.size(-1):
        raise ValueError(f"key must have as many columns as query, {query.size(-1)}, but got shape {list(key.shape)}")
    if key.size(-2) != value.size(-2):
        raise ValueError(
            f"{third} must have as many positions as key, {key.size(-2)}, but got shape {list(value.shape)}"
        )
    rank = max(query.dim(), key.dim(), value.dim())
    query, key, value = (_with_rank(x, max(rank, 4)) for x in (query, key, value))
    query, key, value, heads = _with_heads(query, key, value, enable_gqa, third)
    try:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"query, key and {third} must have leading dimensions that broadcast, but got shapes "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        ) from None
    query, key, value = (_with_batch(x, batch) for x in (query, key, value))
    return query, key, value, Shape(batch, heads, query.size(-2), key.size(-2), rank)


def _with_rank(x: Tensor, rank: int) -> Tensor:
    while x.dim() < rank:
        x = x.unsqueeze(0)
    return x


def _with_heads(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, third: str
) -> tuple[Tensor, Tensor, Tensor, int]:
    heads, key_heads, value_heads = query.size(-3), key.size(-3), value.size(-3)
    if heads == key_heads == value_heads:
        return query, key, value, heads
    if enable_gqa:
        for name, other in (("key", key_heads), (third, value_heads)):
            if other == 0 or heads % other:
                raise ValueError(f"{name}'s heads must divide query's, {heads}, with enable_gqa, but got {other} heads")
        if key_heads != value_heads:
            key, value = (x.repeat_interleave(heads // x.size(-3), -3) for x in (key, value))
        return query, key, value, heads
    # Compared one by one: under tracing they are tensors.
    sizes = [n for n in (heads, key_heads, value_heads) if n != 1]
    if any(n != sizes[0] for n in sizes):
        names, got = (
            (f"key and {third}", f"{key_heads} and {value_heads}") if third != "key" else ("key", f"{key_heads}")
        )
        raise ValueError(
            f"{names} must have as many heads as query, {heads}, or one, but got {got}; enable_gqa lets neighbouring "
            "heads of query share one"
        )
    heads = sizes[0]
    query = _expand(query, -3, heads)
    if key_heads != value_heads:
        key, value = _expand(key, -3, heads), _expand(value, -3, heads)
    return query, key, value, heads


def _expand(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return x.expand(shape)


def _with_batch(x: Tensor, batch: torch.Size) -> Tensor:
    if x.shape[:-3] != batch:
        x = x.expand(*batch, *x.shape[-3:])
    return x if len(batch) == 1 else x.flatten(0, -4)


def restored(x: Tensor, shape: Shape, trailing: int) -> Tensor:
    """What came out as [batch, heads, …], with the leading dimensions that went in."""
    if shape.rank < 4:
        return x.squeeze(0) if shape.rank == 3 else x.squeeze(0).squeeze(0)
    return x if shape.rank == 4 else x.reshape(*shape.batch, *x.shape[-1 - trailing :])


def canonical_mask(attn_mask: Tensor | None, shape: Shape) -> Tensor | None:
    """[batch or 1, heads or 1, queries or 1, keys or 1]; copied only if it broadcasts over some of several batches."""
    if attn_mask is None:
        return None
    check_type("attn_mask", attn_mask, TENSOR)
    target = (*shape.batch, shape.heads, shape.queries, shape.keys)
    mask = _with_rank(attn_mask, len(target))
    if len(mask.shape) > len(target) or not all(m == 1 or m == t for m, t in zip(mask.shape, target, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to {list(target[len(target) - shape.rank :])} (…, queries, keys), but got shape "
            f"{list(attn_mask.shape)}"
        )
    if len(shape.batch) == 1:
        return mask
    if any(m != 1 for m in mask.shape[: len(shape.batch)]):
        return mask.expand(*shape.batch, *mask.shape[-3:]).flatten(0, -4)
    return mask.flatten(0, -4)


def canonical_slopes(alibi_slopes: Tensor | None, shape: Shape) -> Tensor | None:
    """[heads] or [batch, heads]; float32, unless their derivative is wanted, by way of a mask."""
    if alibi_slopes is None:
        return None
    check_type("alibi_slopes", alibi_slopes, TENSOR)
    if not alibi_slopes.is_floating_point():
        raise TypeError(f"alibi_slopes must be floating-point, but got {alibi_slopes.dtype}")
    target = (*shape.batch, shape.heads)
    if not has_derivative(alibi_slopes):
        alibi_slopes = alibi_slopes.to(torch.float32)
    if alibi_slopes.shape == (shape.heads,):
        return alibi_slopes
    try:
        slopes = alibi_slopes.expand(target)
    except RuntimeError:
        raise ValueError(
            f"alibi_slopes must have shape [{shape.heads}] (heads), or one that broadcasts to {list(target)}, but got "
            f"{list(alibi_slopes.shape)}"
        ) from None
    return slopes if len(shape.batch) == 1 else slopes.flatten(0, -2)


def has_derivative(x: Tensor) -> bool:
    """Whether a gradient, or a tangent, goes with it."""
    if x.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def with_slopes(mask: Tensor | None, slopes: Tensor, query: Tensor, keys: int, bottom_right: bool) -> Tensor:
    """An additive mask that contains ALiBi's: the op takes no derivative by slopes."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    distance = offsets(query, keys, bottom_right).abs()
    bias = -slopes.to(dtype)[..., None, None] * distance
    bias = bias if bias.dim() == 4 else bias.unsqueeze(0)
    if mask is None:
        return bias
    return torch.where(mask, bias, -math.inf) if mask.dtype == torch.bool else mask + bias


def offsets(query: Tensor, keys: int, bottom_right: bool) -> Tensor:
    """j − i − diagonal, [queries, keys]."""
    queries = query.size(-2)
    i, j = torch.arange(queries, device=query.device), torch.arange(keys, device=query.device)
    return j - i[:, None] - (keys - queries if bottom_right else 0)


def dropout_key_for(
    query: Tensor, keys: int, dropout_p: float, generator: torch.Generator | None, dropout_key: Tensor | None
) -> Tensor | None:
    """The key as given or drawn; None without dropout, and then no generator is touched."""
    if generator is not None:
        check_type("generator", generator, OPTIONAL_GENERATOR)
    if dropout_key is not None:
        check_dropout_key(dropout_key, query)
    if dropout_p == 0:
        return None
    if dropout_key is None:
        rows = query.size(0) * query.size(1) * query.size(2)
        return philox_key(query, 4 * rows * ((keys + 7) // 8), generator)  # four words a block
    return dropout_key


def check_dropout_key(dropout_key: Tensor, query: Tensor) -> None:
    check_type("dropout_key", dropout_key, OPTIONAL_TENSOR)
    if dropout_key.dtype != torch.int64:
        raise TypeError(f"dropout_key must be an int64 tensor [seed, offset], but got {dropout_key.dtype}")
    if dropout_key.dim() != 1 or dropout_key.size(0) != 2:
        raise ValueError(f"dropout_key must have shape [2] ([seed, offset]), but got {list(dropout_key.shape)}")
    check_device("dropout_key", dropout_key, query)


def check_softcap(softcap: float | None, query: Tensor) -> None:
    """Raises for one by which the kernels, which sum in float32, cannot divide."""
    if softcap is None or query.dtype == torch.float64:
        return
    numbers = torch.finfo(torch.float32)
    if not numbers.tiny <= plain(softcap) <= numbers.max:
        raise ValueError(
            f"softcap must be in float32's range, from {numbers.tiny:.3g} to {numbers.max:.3g}, but got {softcap}"
        )


def call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_key: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    check_softcap(options.softcap, query)
    args: tuple[Any, ...] = (query, key, value, mask, slopes, cu_seqlens_q, cu_seqlens_k, dropout_key, *options)
    if torch.compiler.is_compiling() or is_overridden(query, key, value, mask):
        return torch.ops.lect11ext.attention(*args)
    try:
        return _C.attention(*args)
    except TypeError as error:
        raise wrong_type(
            error, query=(query, TENSOR), key=(key, TENSOR), value=(value, TENSOR), attn_mask=(mask, OPTIONAL_TENSOR),
            alibi_slopes=(slopes, OPTIONAL_TENSOR), scale=(options.scale, OPTIONAL_NUMBER),
        ) from None  # fmt: skip


def call_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    dropout_key: Tensor | None,
    options: Options,
    average_heads: bool,
) -> Tensor:
    check_softcap(options.softcap, query)
    args: tuple[Any, ...] = (query, key, lse, mask, slopes, dropout_key, *options, average_heads)
    if torch.compiler.is_compiling() or is_overridden(query, key, lse, mask):
        return torch.ops.lect11ext.attention_weights(*args)
    try:
        return _C.attention_weights(*args)
    except TypeError as error:
        raise wrong_type(
            error, query=(query, TENSOR), key=(key, TENSOR), attn_mask=(mask, OPTIONAL_TENSOR),
            alibi_slopes=(slopes, OPTIONAL_TENSOR), dropout_key=(dropout_key, OPTIONAL_TENSOR),
            scale=(options.scale, OPTIONAL_NUMBER),
        ) from None  # fmt: skip


def call_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    dropout_key: Tensor | None,
    options: Options,
    average_heads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    args: tuple[Any, ...] = (query, key, value, mask, slopes, dropout_key, *options, average_heads)
    if torch.compiler.is_compiling() or is_overridden(query, key, value, mask):
        return torch.ops.lect11ext.attention_with_weights(*args)
    return _C.attention_with_weights(*args)
