"""Sequences one behind the other: dot-product attention with cu_seqlens against a loop of single sequences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vjp

from lect11ext import functional, reference
from tests.helpers import same_for_any_threads

from .cases import KEY, finite, judge, op_arguments, sdpa, wide, with_gradients

varlen = functional.varlen_attention
LENGTHS = {
    "some": ([3, 0, 8, 1], [4, 2, 4, 0]),
    "one": ([5], [9]),
    "empty ends": ([0, 0, 6, 0], [3, 0, 6, 0]),
    "nothing": ([0], [0]),
    "none": ([], []),
    "no keys": ([2, 3], [0, 0]),
    "long": ([100, 1, 97, 200], [130, 65, 1, 600]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal-bottom": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"window": (3, 1), "scale": 0.4},
    "everything": {
        "window": (20, None), "causal_alignment": "bottom_right", "softcap": 2.0,
        "alibi_slopes": torch.tensor([0.1, 0.5]),
    },
}  # fmt: skip


def starts_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def operands(name: str, dtype: torch.dtype, kv_heads: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    queries, keys = LENGTHS[name]
    shapes = [(sum(queries), 2, 16), (sum(keys), kv_heads, 16), (sum(keys), kv_heads, 8)]
    args = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    return args, starts_of(queries), starts_of(keys)


def looped(starts_q: Tensor, starts_k: Tensor, attend: Callable[..., Any] = sdpa, **options: Any) -> Callable[..., Any]:
    """One call a sequence."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        zero = 0 * (query.sum() + key.sum() + value.sum())  # what depends on them where there is no sequence
        outs = [query.new_zeros(0, query.size(1), value.size(2)) + zero]
        lses = [torch.zeros(query.size(1), 0, dtype=torch.promote_types(query.dtype, torch.float32)) + zero]
        for (q0, q1), (k0, k1) in zip(pairs(starts_q), pairs(starts_k), strict=True):
            q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            out, lse = attend(q, k, v, return_lse=True, enable_gqa=True, **options)
            outs.append(out.transpose(0, 1))
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, 1)

    return run


def pairs(starts: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts.tolist()))


def packed(starts_q: Tensor, starts_k: Tensor, **options: Any) -> Callable[..., Any]:
    return lambda *a: varlen(*a, starts_q, starts_k, return_lse=True, enable_gqa=True, **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_against_single_sequences(lengths: str, name: str, kv_heads: int, dtype: torch.dtype) -> None:
    """By the rule, with the reference's loop for the exact values."""
    args, starts_q, starts_k = operands(lengths, dtype, kv_heads)
    cotangents = [torch.randn(args[0].size(0), 2, 8), torch.randn(2, args[0].size(0))]
    plain = looped(starts_q, starts_k, reference.scaled_dot_product_attention, **OPTIONS[name])
    results = [
        with_gradients(f, a, cotangents)
        for f, a in ((packed(starts_q, starts_k, **OPTIONS[name]), args), (plain, args), (plain, wide(args)))
    ]
    judge(*results, terms=1000)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_int32_and_strided_starts(index: torch.dtype) -> None:
    args, starts_q, starts_k = operands("some", torch.float32)
    expected = packed(starts_q, starts_k)(*args)
    strided = torch.stack([starts_q.to(index), starts_k.to(index)], 1)
    for a, b in zip(packed(strided[:, 0], strided[:, 1])(*args), expected, strict=True):
        assert torch.equal(a, b)


def test_every_capability(dtype: torch.dtype, capability: str) -> None:
    args, starts_q, starts_k = operands("long", dtype, 1)
    for name in ("causal-bottom", "everything"):
        got = finite(packed(starts_q, starts_k, **OPTIONS[name])(*args))
        plain, exact = (
            finite(looped(starts_q, starts_k, reference.scaled_dot_product_attention, **OPTIONS[name])(*a))
            for a in (args, wide(args))
        )
        judge(got, plain, exact, terms=700)


def test_dropout_of_a_sequence_is_that_of_its_rows() -> None:
    args, starts_q, starts_k = operands("long", torch.float32)
    options: dict[str, Any] = {"dropout_p": 0.4, "dropout_key": KEY, "enable_gqa": True, "return_lse": True}
    cotangents = [torch.randn(args[0].size(0), 2, 8), torch.randn(2, args[0].size(0))]
    results = [
        with_gradients(lambda *a, m=m: m.varlen_attention(*a, starts_q, starts_k, **options), a, cotangents)
        for m, a in ((functional, args), (reference, args), (reference, wide(args)))
    ]
    judge(*results, terms=1000)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("lengths", ["some", "empty ends", "long"])
def test_derivatives_against_single_sequences(lengths: str, name: str) -> None:
    """Tangents, double backward and forward over reverse."""
    args, starts_q, starts_k = operands(lengths, torch.float64, 1)
    detached = tuple(a.detach() for a in args)
    torch.manual_seed(1)
    directions = tuple(torch.randn_like(a) for a in detached)
    cotangents = (torch.randn(args[0].size(0), 2, 8).double(), torch.randn(2, args[0].size(0)).double())
    results = []
    for make in (packed, looped):
        function = make(starts_q, starts_k, **OPTIONS[name])
        outs = finite(function(*args))
        grads = torch.autograd.grad(outs, args, cotangents, create_graph=True)
        second = torch.autograd.grad(grads, args, directions)
        tangents = finite(jvp(function, detached, directions)[1])

        def backward(*a: Tensor, function: Any = function) -> Any:
            return vjp(lambda *b: tuple(finite(function(*b))), *a)[1](cotangents)

        over = jvp(backward, detached, directions)[1]
        results.append([*outs, *grads, *second, *tangents, *over])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_and_third_order() -> None:
    args = [torch.randn(n, 2, 2, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6)]
    starts = starts_of([2, 0, 3]), starts_of([3, 1, 2])
    for name in ("plain", "everything"):
        function = packed(*starts, **OPTIONS[name])
        assert torch.autograd.gradcheck(function, args, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True, fast_mode=True)
        results = []
        for make in (packed, looped):
            loss = sum(o.pow(3).sum() for o in make(*starts, **OPTIONS[name])(*args))
            for _ in range(2):
                loss = sum(g.pow(2).sum() for g in torch.autograd.grad(loss, args, create_graph=True))
            results.append(torch.autograd.grad(loss, args))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_sequences_do_not_see_each_other() -> None:
    """NaN stays in its own sequence, and in keys that it may not see it does nothing at all."""
    args, starts_q, starts_k = operands("long", torch.float32)
    args = [a.detach() for a in args]
    clean = [a.clone().requires_grad_() for a in args]
    args[1][130 + 65 + 1 :] = math.nan  # of the last sequence
    args[2][100:130] = math.nan  # behind the last query of the first
    dirty = [a.requires_grad_() for a in args]
    results = []
    for given_ in (clean, dirty):
        out = varlen(*given_, starts_q, starts_k, is_causal=True)
        results.append([out, *torch.autograd.grad(out[:198].sum(), given_)])
    (out, *grads), (expected, *expected_grads) = results[1], results[0]
    assert out[198:].isnan().all()
    torch.testing.assert_close(out[:198], expected[:198])
    torch.testing.assert_close(grads[0][:198], expected_grads[0][:198])
    for g, e in zip(grads[1:], expected_grads[1:], strict=True):
        torch.testing.assert_close(g[:196], e[:196])


def test_threads_and_repeats_give_the_same_bits(dtype: torch.dtype) -> None:
    args, starts_q, starts_k = operands("long", dtype)

    def results() -> Sequence[Tensor]:
        out, lse = packed(starts_q, starts_k, is_causal=True)(*args)
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), args)]

    same_for_any_threads(results)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    causal=st.booleans(),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
    left=st.one_of(st.none(), st.integers(0, 5)),
    seed=st.integers(0, 2**32),
)
def test_any_lengths(lengths: list[tuple[int, int]], causal: bool, alignment: str, left: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    starts = [starts_of([pair[i] for pair in lengths]) for i in (0, 1)]
    total_q, total_k = (int(s[-1]) for s in starts)
    args = [torch.randn(n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (total_q, total_k, total_k)]
    options: dict[str, Any] = {"is_causal": causal, "causal_alignment": alignment, "window": (left, None)}
    cotangents = [torch.randn(total_q, 2, 4), torch.randn(2, total_q)]
    got, expected = (with_gradients(make(*starts, **options), args, cotangents) for make in (packed, looped))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_views_of_packed_projections() -> None:
    """Query, key and value cut from one tensor, as projections leave them: gradients arrive there."""
    starts = starts_of([4, 9])
    together = torch.randn(13, 3, 2, 8, requires_grad=True)
    out = varlen(*together.unbind(1), starts, starts)
    (got,) = torch.autograd.grad(out.square().sum(), together)
    apart = [x.detach().contiguous().requires_grad_() for x in together.unbind(1)]
    expected = torch.autograd.grad(varlen(*apart, starts, starts).square().sum(), apart)
    torch.testing.assert_close(got, torch.stack(expected, 1))


def test_op_takes_the_starts_of_its_schema() -> None:
    args, starts_q, starts_k = operands("some", torch.float32)
    canonical = [a.detach().transpose(0, 1)[None] for a in args]
    output, lse = torch.ops.lect11ext.attention(*op_arguments(*canonical, starts=(starts_q, starts_k)))
    expected, expected_lse = packed(starts_q, starts_k)(*args)
    assert torch.equal(output[0].transpose(0, 1), expected) and torch.equal(lse[0], expected_lse)
    assert output.stride() == (12 * 2 * 8, 8, 16, 1)
