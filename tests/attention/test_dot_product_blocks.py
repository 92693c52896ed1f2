"""Masks by blocks, few queries, what is broadcast over the batch, scores of any size: the CPU's ways of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from tests.attention.cases import KEY, Sizes, compare, operands, same_of_any_layout, sdpa

ops = torch.ops.lect11ext
BLOCK, TILE = 256, 96  # keys and queries, of csrc/attention/dot_product_cpu.h


def padding(lengths: list[int], keys: int) -> Tensor:
    return (torch.arange(keys) < torch.tensor(lengths)[:, None])[:, None, None]


def chessboard(queries: int, keys: int) -> Tensor:
    i, j = torch.arange(queries)[:, None] // TILE, torch.arange(keys) // BLOCK
    return ((i + j) % 2 == 0)[None, None]


def last_block(queries: int, keys: int) -> Tensor:
    """One key barred, and one query that sees nothing."""
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    mask[..., queries // 2, keys - 1] = False
    mask[..., 0, :] = False
    return mask


MASKS: dict[str, Any] = {
    "padding": lambda b, h, q, k: padding([k, k // 3][:b], k),
    "padding that bars all": lambda b, h, q, k: padding([0, k][:b], k),
    "chessboard": lambda b, h, q, k: chessboard(q, k),
    "one key": lambda b, h, q, k: last_block(q, k),
    "of heads": lambda b, h, q, k: (torch.arange(h) % 2 == 0)[:, None, None] & padding([k, k // 2][:b], k),
    "of queries": lambda b, h, q, k: (torch.arange(q) % 3 != 0)[None, None, :, None],
    "with a stride": lambda b, h, q, k: (torch.arange(2 * k) < k)[None, None, None, ::2],
    "additive": lambda b, h, q, k: torch.where(padding([k, k // 3][:b], k), 0.0, -math.inf),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", [Sizes(2, 2, 1, 100, 700, 16, 16), Sizes(2, 4, 2, 3, 700, 64, 64)], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 2.0}], ids=str)
def test_masks(name: str, sizes: Sizes, options: dict[str, Any], dtype: torch.dtype) -> None:
    mask = MASKS[name](sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    mask = mask if mask.dtype == torch.bool else mask.to(dtype)
    compare([*operands(sizes, dtype), mask], **options)
    compare([*operands(sizes, dtype, grad=False), mask], backward=False, **options)


@pytest.mark.parametrize("name", ["padding", "chessboard", "one key"])
def test_tangents_of_masks(name: str) -> None:
    args = [x.detach().double() for x in operands(Sizes(2, 2, 1, 100, 600, 8, 8))]
    mask = MASKS[name](2, 2, 100, 600)
    along = tuple(torch.randn_like(x) for x in args)
    other = torch.where(mask, 0.0, -math.inf).double()
    results = [jvp(lambda *a, m=m: sdpa(*a, m, enable_gqa=True), tuple(args), along) for m in (mask, other)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_same_bits_by_bytes_other_than_one() -> None:
    """A bool tensor that was bytes: whatever is not zero lets through."""
    query, key, value = operands(Sizes(1, 1, 1, 100, 300, 8, 8), grad=False)
    allowed = torch.rand(100, 300) < 0.7
    allowed[:, :256] = True
    odd = (allowed.byte() * 6).view(torch.bool)
    assert torch.equal(sdpa(query, key, value, odd), sdpa(query, key, value, allowed))


@pytest.mark.parametrize("columns", [(16, 16), (32, 64), (64, 128), (128, 130), (256, 64), (33, 64)])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 3), (7, 1), (5, 3)])
def test_few_queries(rows: tuple[int, int], columns: tuple[int, int], dtype: torch.dtype, capability: str) -> None:
    """Rows in registers and not, keys and columns in whole steps of the vectors and not."""
    queries, group = rows
    for keys in (3, 67, 301):
        compare(operands(Sizes(1, 2 * group, 2, queries, keys, *columns), dtype, grad=False), backward=False)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("keys", [64, 70])
def test_rows_that_lie_packed(queries: int, keys: int, dtype: torch.dtype) -> None:
    """Values in place and copied, with what is not finite behind a mask, beyond a window, and seen."""
    query, key, value = operands(Sizes(2, 2, 2, queries, keys, 16, 32), dtype, grad=False)
    apart = torch.empty(2, 2, keys, 40, dtype=dtype)[..., :32].copy_(value)
    causal: dict[str, Any] = {"is_causal": True}
    options: list[dict[str, Any]] = [{}, causal, {"window": (3, 3)}, {"dropout_p": 0.5, "dropout_key": KEY}]
    for given in options:
        assert torch.equal(sdpa(query, key, value, **given), sdpa(query, key, apart, **given))
    dirty = value.clone()
    dirty[:, :, 50] = math.inf
    assert sdpa(query, key, dirty).isinf().all()
    assert torch.equal(sdpa(query, key, dirty, **causal), sdpa(query, key, value, **causal))
    mask = torch.arange(keys) != 50
    assert same_of_any_layout(*(sdpa(query, key, v, mask) for v in (dirty, value)), dtype)


@pytest.mark.parametrize("keys", [64, 300])
@pytest.mark.parametrize("queries", [1, 40])
def test_broadcast_over_the_batch(queries: int, keys: int, dtype: torch.dtype) -> None:
    query = torch.randn(3, 4, queries, 16).to(dtype)
    key, value = (torch.randn(1, 2, keys, 16).to(dtype).requires_grad_() for _ in range(2))
    results = []
    for k, v in ((key, value), (key.repeat(3, 1, 1, 1), value.repeat(3, 1, 1, 1))):
        out = sdpa(query, k, v, enable_gqa=True)
        one = sdpa(query, k[:1], v, enable_gqa=True)  # one of them broadcast here
        weights = ops.attention_with_weights(query, k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), *[None] * 3, 0.0,
                                             *[None] * 3, False, None, True)  # fmt: skip
        results.append([out, one, *weights, *torch.autograd.grad(out.sum() + one.sum(), (key, value))])
    for a, b in zip(*(r[:-2] for r in results), strict=True):
        assert same_of_any_layout(a, b, dtype)
    for a, b in zip(*(r[-2:] for r in results), strict=True):
        tolerance = 0.01 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("queries", [1, 3, 16, 40])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e12])
def test_weights_of_large_scores_sum_to_one(size: float, queries: int) -> None:
    """However scores are rounded, the backward makes the weights that the forward had."""
    query, key = torch.randn(1, 1, queries, 64), torch.randn(1, 1, 50, 64) * size
    value = torch.randn(1, 1, 50, 16)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out = sdpa(*leaves)
    total = torch.autograd.grad(out[..., 0].sum(), value, retain_graph=True)[0].sum()
    torch.testing.assert_close(total, torch.tensor(float(queries)), rtol=1e-4, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
    with torch.no_grad():
        saved = ops.attention(*leaves, *[None] * 5, 0.0, *[None] * 3, False, None)
    given = (
        torch.ones_like(out),
        None,
        *leaves,
        *[None] * 5,
        0.0,
        *[None] * 3,
        False,
        None,
        *saved,
        [True] * 3 + [False],
    )
    assert all(g is None or g.isfinite().all() for g in ops.attention_backward(*given))


def test_of_no_queries_nothing_is_packed() -> None:
    query = torch.empty(1, 1, 0, 8).expand(2**40, 1, 0, 8)
    key = torch.empty(1, 1, 5, 8).expand(2**40, 1, 5, 8)
    assert sdpa(query, key, key).shape == query.shape


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((torch.zeros(0, dtype=torch.int64), [2, 3], 0.5), ValueError, r"key must have shape \[2\]"),
        ((torch.zeros(2), [2, 3], 0.5), TypeError, "key must be an int64 tensor"),
        ((KEY, [], 0.5), ValueError, "size must have a dimension"),
        ((KEY, [2, -3], 0.5), ValueError, "size must be nonnegative"),
        ((KEY, [2, 3], 1.5), ValueError, r"p must be in \[0, 1\], but got 1.5"),
        ((KEY, [2, 3], math.nan), ValueError, r"p must be in \[0, 1\], but got nan"),
    ],
)
def test_wrong_calls_of_the_dropout_mask(arguments: tuple[Any, ...], kind: type[Exception], message: str) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(kind, match=message):
            ops.attention_dropout_mask(arguments[0].to(device), *arguments[1:])


def test_a_wrong_dropout_key_is_named() -> None:
    query = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"dropout_key must have shape \[2\]"):
        ops.attention(query, query, query, *[None] * 4, torch.tensor([1]), 0.5, *[None] * 3, False, None)
