"""Operands of dot-product attention, and how its results are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lect11ext import functional, reference
from tests.helpers import HERE, ONE_STEP, assert_within_rule, flat

sdpa = functional.scaled_dot_product_attention
plain_sdpa = reference.scaled_dot_product_attention
KEY = torch.tensor([2**40 + 3, -9])  # the stream's offset wraps around within a few rows
GRADIENTS = ("query", "key", "value", "attn_mask")


class Sizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


def operands(
    sizes: Sizes, dtype: torch.dtype = torch.float32, device: str | None = None, grad: bool = True
) -> list[Tensor]:
    """Query, key and value."""
    b, h, hk, queries, keys, d, dv = sizes
    shapes = [(b, h, queries, d), (b, hk, keys, d), (b, hk, keys, dv)]
    return [torch.randn(s).to(device, dtype).requires_grad_(grad) for s in shapes]


def bool_mask(*shape: int, share: float = 0.7, device: str | None = None) -> Tensor:
    """True for about ``share`` of the elements."""
    return (torch.rand(shape) < share).to(device)


def float_mask(
    *shape: int, dtype: torch.dtype = torch.float32, barred: float = 0.2, device: str | None = None
) -> Tensor:
    """Numbers, and −∞ for about ``barred`` of the elements."""
    return torch.randn(shape).masked_fill(torch.rand(shape) < barred, -math.inf).to(device, dtype)


def judge(
    got: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor], terms: int, low_slack: float = 2.0
) -> None:
    """``terms``: of the longest sum. float32 is given oneDNN's bound for that: where gradients cancel, plain PyTorch's
    error can be zero by luck. 16-bit results of the reference are rounded once; the kernels round weights too."""
    for triple in zip(got, plain, exact, strict=True):
        assert not triple[0].isnan().any()
        assert_within_rule(*triple, low_slack if triple[0].dtype.itemsize == 2 else ONE_STEP * terms.bit_length())


def same_of_any_layout(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """The same bits. Of 16-bit inputs on a GPU nearly: sm_90a has kernels of its own, which leave what is broadcast,
    misaligned or not finite behind a mask to the others. Both round the weights and the result once."""
    if HERE == "cpu" or dtype.itemsize > 2:
        return torch.equal(a, b)
    if a.dtype == torch.float32:
        return torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    return a.shape == b.shape and bool((a - b).abs().max() <= torch.finfo(dtype).eps * b.abs().max())


def finite(outs: Any) -> list[Tensor]:
    """−∞ replaced: a difference of infinities says nothing."""
    return [torch.where(x == -math.inf, -77.0, x) for x in flat(outs)]


def wide(args: Sequence[Any]) -> list[Any]:
    """In float64, as leaves of their own; what is not floating-point, as it is."""
    return [
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]


def with_gradients(function: Callable[..., Any], args: Sequence[Any], cotangents: Sequence[Tensor] | None) -> Any:
    outs = finite(function(*args))
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    if cotangents is None or not leaves:
        return outs
    return [*outs, *torch.autograd.grad(outs, leaves, [c.to(o) for c, o in zip(cotangents, outs, strict=True)])]


def at_least(x: Tensor, least: float) -> Tensor:
    return torch.cat([x.flatten(), x.new_tensor([least])]) if x.numel() else x


def in_pieces(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by plain PyTorch, so many at a time; None for the op, where the device has one."""
    if chunk is not None:
        monkeypatch.setattr("lect11ext.functional._attention_weights._OP_DEVICES", ())
        monkeypatch.setattr("lect11ext.functional._attention_weights._CHUNK", chunk)


def compare(
    args: Sequence[Any],
    ours: Callable[..., Any] = sdpa,
    plain: Callable[..., Any] = plain_sdpa,
    backward: bool = True,
    low_slack: float = 2.0,
    least: float = 0.0,
    **options: Any,
) -> None:
    """Output, LSE and all gradients by the rule. ``args`` are query, key, value and, where there is one, the mask.

    ``least``: what the greatest number of a result is taken to be at least: an error is judged by that number.
    """
    options = {"return_lse": True, "enable_gqa": args[0].size(1) != args[1].size(1), **options}
    cotangents = None
    if backward:
        q, v = args[0], args[2]
        cotangents = [torch.randn(*q.shape[:-1], v.size(-1)).to(q), torch.randn(q.shape[:-1]).to(q.device)]
        cotangents = cotangents if options["return_lse"] else cotangents[:1]
    results = [
        with_gradients(lambda *a, f=f: f(*a, **options), a, cotangents)
        for f, a in ((ours, args), (plain, args), (plain, wide(args)))
    ]
    if args[0].dtype.itemsize == 2 and len(results[0]) > 5:  # a float32 mask's gradient is as good as the inputs are
        for result in results[:2]:
            result[5] = result[5].to(args[0].dtype)
    for result in results:  # weights' relative error is the LSE's absolute one
        result[:] = [at_least(x, 1.0 if i == 1 else least) for i, x in enumerate(result)]
    judge(*results, sum(args[1].shape[-2:]) + args[2].size(-1) + args[0].size(-2), low_slack)


def op_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    slopes: Tensor | None = None,
    starts: tuple[Tensor | None, Tensor | None] = (None, None),
    dropout_p: float = 0.0,
    dropout_key: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    bottom_right: bool = False,
    softcap: float | None = None,
) -> tuple[Any, ...]:
    """The fourteen arguments that all of attention's ops share."""
    if dropout_p > 0 and dropout_key is None:
        dropout_key = KEY.to(query.device)
    return (
        query, key, value, attn_mask, slopes, *starts, dropout_key, dropout_p, scale, *window, bottom_right, softcap
    )  # fmt: skip
