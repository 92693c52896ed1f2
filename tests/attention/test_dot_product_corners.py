"""Dot-product attention where numbers are extreme, rows are empty, operands are far apart or sequences long."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from lect11ext import functional
from tests.helpers import HERE, assert_within_rule, room

from .cases import KEY, Sizes, bool_mask, compare, judge, operands, plain_sdpa, sdpa, wide, with_gradients

SIZES = Sizes(2, 4, 2, 110, 140, 16, 8)


def barred(kind: str, dtype: torch.dtype, rows: list[int]) -> Tensor:
    """A mask that bars ``rows`` of queries from all keys, and each other query from some."""
    mask = bool_mask(2, 1, 110, 140)
    mask[..., 0] = True
    mask[:, :, rows] = False
    return mask if kind == "bool" else torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("rows", [[0], [3, 4, 96, 109], list(range(96)), list(range(110))], ids=str)
def test_rows_without_keys(kind: str, rows: list[int], dtype: torch.dtype, device: str) -> None:
    args: list[Any] = operands(SIZES, dtype, device)
    args.append(barred(kind, dtype, rows).to(device))
    compare(args)
    args[3].requires_grad_(kind == "float")
    out, lse = sdpa(*args, enable_gqa=True, return_lse=True)
    assert not out[:, :, rows].any() and (lse[:, :, rows] == -math.inf).all()
    others = [r for r in range(110) if r not in rows]
    assert lse[:, :, others].isfinite().all()
    leaves = [a for a in args if a.requires_grad]
    grads = torch.autograd.grad((out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse)))
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :, rows].any()
    if kind == "float":
        assert not grads[3][:, :, rows].any() and not grads[3][args[3] == -math.inf].any()


@pytest.mark.parametrize("queries", [7, 130])
def test_rows_before_the_first_key(queries: int, dtype: torch.dtype) -> None:
    """Causal from the bottom right with fewer keys than queries: the first rows see nothing."""
    args = operands(Sizes(1, 2, 2, queries, 5, 16, 16), dtype)
    out, lse = sdpa(*args, is_causal=True, causal_alignment="bottom_right", return_lse=True)
    assert not out[:, :, : queries - 5].any() and (lse[:, :, : queries - 5] == -math.inf).all()
    assert lse[:, :, queries - 5 :].isfinite().all()
    grads = torch.autograd.grad((out, lse), args, (torch.randn_like(out), torch.randn_like(lse)))
    assert not grads[0][:, :, : queries - 5].any() and grads[0][:, :, queries - 5 :].any()


def test_no_keys_at_all(dtype: torch.dtype) -> None:
    query, key, value = operands(Sizes(2, 3, 3, 5, 0, 8, 4), dtype)
    mask = torch.zeros(5, 0, dtype=dtype, requires_grad=True)
    out, lse = sdpa(query, key, value, mask, return_lse=True)
    assert out.shape == (2, 3, 5, 4) and not out.any() and (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value, mask))
    assert not grads[0].any() and [g.shape for g in grads[1:]] == [key.shape, value.shape, mask.shape]


# Which keys, of 140, no query of 110 sees.
UNSEEN: dict[str, tuple[slice, dict[str, Any]]] = {
    "bool": (slice(100, 120), {"attn_mask": "bool"}),
    "float": (slice(60, 70), {"attn_mask": "float"}),
    "bool of a whole block": (slice(0, 64), {"attn_mask": "bool"}),
    "causal": (slice(110, 140), {"is_causal": True}),
    "window": (slice(0, 13), {"window": (17, 3), "causal_alignment": "bottom_right"}),
    "window and mask": (slice(111, 140), {"window": (None, 2), "attn_mask": "bool"}),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_query_sees_reaches_nothing(name: str, bad: float, dtype: torch.dtype, device: str) -> None:
    where, options = UNSEEN[name]
    options = {"enable_gqa": True, "return_lse": True, **options}
    clean = [x.detach() for x in operands(SIZES, dtype, device)]
    kind = options.pop("attn_mask", None)
    if kind is not None:
        mask = torch.zeros(1, 1, 1, 140, device=device, dtype=dtype)
        mask[..., where] = -math.inf
        options["attn_mask"] = mask == 0 if kind == "bool" else mask
    dirty = [x.clone() for x in clean]
    dirty[1][:, :, where] = bad
    dirty[2][:, :, where] = bad
    directions = [torch.randn_like(x) for x in clean]
    dirty_directions = [d.masked_fill(~x.isfinite(), bad) for d, x in zip(directions, dirty, strict=True)]
    results = []
    for args, along in ((clean, directions), (dirty, dirty_directions)):
        leaves = [a.clone().requires_grad_() for a in args]
        outs = sdpa(*leaves, **options)
        torch.manual_seed(5)
        cotangents = [torch.randn(o.shape).to(o) for o in outs]
        grads = torch.autograd.grad(outs, leaves, cotangents, create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in grads), leaves)
        tangents = jvp(lambda *a: sdpa(*a, **options), tuple(args), tuple(along))[1]
        results.append([*outs, *grads, *second, *tangents])
    tolerance = 0.0 if HERE == "cpu" else 1e-4 if dtype.itemsize > 2 else 3e-2
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert a.isfinite().all() and b.isfinite().all(), i
        scale = a.float().abs().max().item()
        assert (a.float() - b.float()).abs().max().item() <= tolerance * scale, i
    for gradient in (*results[1][3:5], *results[1][6:8]):  # of key and value, first and second
        assert not gradient[:, :, where].any()


def of_a_mean(dtype: torch.dtype) -> float:
    """Of numbers of size one, whose mean is a tenth: roundings of the sum, and of 16 bits that of the result."""
    return 0.01 if dtype.itemsize == 2 else 8 * torch.finfo(dtype).eps


def test_lowest_finite_masks(dtype: torch.dtype, device: str) -> None:
    """Masks made of the type's lowest number, as many models have them: a row full of it attends evenly."""
    lowest = torch.finfo(dtype).min
    mask = torch.zeros(1, 1, 110, 140, dtype=dtype, device=device)
    mask[..., 100:] = lowest
    mask[:, :, 50] = lowest
    args = operands(SIZES, dtype, device)
    out, lse = sdpa(*args, mask, enable_gqa=True, return_lse=True)
    assert lse.isfinite().all() and (lse[:, :, 50] <= lowest / 4).all()
    if dtype != torch.float16:  # whose lowest number is near enough for scores to show beside it
        even = args[2].repeat_interleave(2, 1).double().mean(2)
        torch.testing.assert_close(out[:, :, 50].double(), even, atol=of_a_mean(dtype), rtol=0)
    # The weights of such a row cannot be had from its LSE again, but its gradients are finite, and other rows right.
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), args))

    def without_row(function: Any) -> Any:
        row = torch.tensor([50], device=device)
        return lambda *a: [x.index_fill(2, row, 0) for x in function(*a, mask, enable_gqa=True, return_lse=True)]

    ours, plain = without_row(sdpa), without_row(plain_sdpa)
    cotangents = [torch.randn(2, 4, 110, 8).to(args[0]), torch.randn(2, 4, 110, device=device)]
    judge(*(with_gradients(f, a, cotangents) for f, a in ((ours, args), (plain, args), (plain, wide(args)))), terms=140)


@pytest.mark.parametrize("size", [1.0, 2.0**8, 2.0**14, 2.0**40])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_scores(size: float, sign: float, device: str) -> None:
    """Whole numbers, so that the scores are exact, and far apart."""
    query, key = (torch.randint(-9, 10, (1, 2, n, 8), device=device).float() for n in (33, 300))
    value = torch.randn(1, 2, 300, 8, device=device)
    for args in ([query * size, key, value], [query.abs() * size * sign, key.abs(), value]):
        compare(args, backward=False, scale=1.0)
        leaves = [x.requires_grad_() for x in args]
        out, lse = sdpa(*leaves, scale=1.0, return_lse=True)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + lse.sum(), leaves))


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-60, 1e-30, -2.5, 1e4])
def test_scales(scale: float, dtype: torch.dtype, device: str) -> None:
    args = operands(Sizes(1, 2, 2, 9, 70, 8, 8), dtype, device)
    if abs(scale) < 1e3:
        compare(args, scale=scale)
    else:
        compare([a.detach().sign() for a in args], scale=scale, backward=False)
    if abs(scale) < 1e-20:
        mean = args[2].double().mean(2, keepdim=True).expand(-1, -1, 9, -1)
        torch.testing.assert_close(sdpa(*args, scale=scale).double(), mean, atol=of_a_mean(dtype), rtol=0)


def test_one_huge_score_late(dtype: torch.dtype) -> None:
    """The greatest score in the last block rescales all sums before it; one in the first makes the rest vanish."""
    for at in (0, 299, 150):
        query, key, value = (x.detach() for x in operands(Sizes(1, 1, 1, 7, 300, 16, 16), dtype))
        key[:, :, at] = query[:, :, 3] * 8
        # Of a query that sees little but one key, gradients of scores are what the output's rounding makes of them.
        compare([query.requires_grad_(), key.requires_grad_(), value.requires_grad_()], low_slack=8.0)


def test_calls_from_several_threads_at_once(dtype: torch.dtype) -> None:
    """Each has memory of its own."""
    cases = [[x.detach() for x in operands(Sizes(1, 2, 1, 50 + 40 * i, 300 - 60 * i, 16, 8), dtype)] for i in range(4)]

    def run(i: int) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in cases[i]]
        out = sdpa(*leaves, enable_gqa=True, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    expected = [run(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, got in zip(list(range(4)) * 8, pool.map(run, list(range(4)) * 8), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected[i], strict=True))


def idiom(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What everybody writes, in the inputs' type."""
    return torch.softmax(query @ key.transpose(-2, -1) / math.sqrt(query.size(-1)), -1) @ value


@pytest.mark.parametrize("sizes", [Sizes(2, 2, 2, 64, 100, 64, 64), Sizes(1, 1, 1, 200, 700, 128, 128)], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(sizes: Sizes, dtype: torch.dtype, device: str) -> None:
    """The field's rule without any slack, for output and every gradient."""
    if dtype.itemsize > 2:
        pytest.skip("the rule for the 16-bit types")
    args = operands(sizes, dtype, device)
    cotangents = [torch.randn(*args[0].shape[:-1], sizes.value_dim).to(args[0])]
    results = [with_gradients(f, a, cotangents) for f, a in ((sdpa, args), (idiom, args), (idiom, wide(args)))]
    for triple in zip(*results, strict=True):
        assert_within_rule(*triple, slack=0.0)


def test_against_torch(dtype: torch.dtype, device: str) -> None:
    args = operands(Sizes(2, 4, 2, 65, 100, 32, 32), dtype, device)
    for options in ({}, {"is_causal": True}, {"scale": 0.4}):
        expected = torch.nn.functional.scaled_dot_product_attention(*args, enable_gqa=True, **options)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(sdpa(*args, enable_gqa=True, **options), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.cpu  # of a GPU all memory is there that is asked for
def test_strides_beyond_32_bits() -> None:
    near = [x.detach() for x in operands(Sizes(2, 1, 1, 3, 70, 4, 4), torch.bfloat16)]
    mask = torch.randn(2, 1, 3, 70).bfloat16()
    space = room(2**32 + 2**26, torch.bfloat16)
    far = [
        space.as_strided((2, 1, 3, 4), (2**31 + 64, 1, 2**30 + 7, 1)).copy_(near[0]),
        space.as_strided((2, 1, 70, 4), (16, 1, 2**31 // 69 + 5, 1), 256).copy_(near[1]),
        space.as_strided((2, 1, 70, 4), (2**31, 1, 2**20, 1), 512).copy_(near[2]),
        space.as_strided((2, 1, 3, 70), (2**31 + 77, 1, 2**30 + 64, 2**12), 1031).copy_(mask),
    ]
    results = []
    for args in (far, [*near, mask]):
        leaves = [a.detach().requires_grad_() for a in args]
        out, lse = sdpa(*leaves, return_lse=True)
        grads = torch.autograd.grad(out.sum() + lse.sum(), leaves)
        tangent = jvp(sdpa, tuple(a.detach() for a in leaves), tuple(a.detach() for a in leaves))[1]
        results.append([out, lse, tangent, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


MEMORY = """
import resource, sys, torch
from torch.func import jvp
from lect11ext.functional import scaled_dot_product_attention as sdpa

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def run(length, options):
    args = [torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3)]
    slope = torch.randn(1, 1, 1, length, requires_grad=True)
    out, lse = sdpa(*args, slope, return_lse=True, **options)
    grads = torch.autograd.grad(out.sum() + lse.sum(), [*args, slope], create_graph=derivatives)
    if derivatives:
        torch.autograd.grad(sum(g.square().sum() for g in grads), args)
        detached = tuple(a.detach() for a in args)
        jvp(lambda *a: sdpa(*a, **options), detached, detached)

length, derivatives, options = int(sys.argv[1]), sys.argv[2] == "True", eval(sys.argv[3])
run(512, {})
before = peak()
run(length, options)
print(peak() - before)
"""


def megabytes(length: int, derivatives: bool, options: dict[str, Any]) -> float:
    """By which a fresh process grows: nothing else has left memory there that could be used again."""
    command = [sys.executable, "-c", MEMORY, str(length), str(derivatives), repr(options)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.cpu  # measures the process
def test_long_sequences_in_little_memory() -> None:
    """All derivatives of 2^15 positions: one byte for each pair would be 1 GiB."""
    assert megabytes(2**15, True, {"window": (70, 70)}) < 120


@pytest.mark.cpu
@pytest.mark.slow
def test_long_sequences_that_see_everything() -> None:
    assert megabytes(2**15, False, {"is_causal": True}) < 120
    assert megabytes(2**13, True, {}) < 60  # one byte for each pair: 64 MiB


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [256, 1024, 2048, 4096, 8192])
def test_16_bit_gradients_keep_the_rule_as_lengths_grow(length: int, causal: bool, dtype: torch.dtype) -> None:
    if dtype.itemsize > 2:
        pytest.skip("the rule for the 16-bit types")
    args = operands(Sizes(1, 1, 1, length, length, 64, 64), dtype)
    cotangent = torch.randn(args[0].shape).to(dtype)
    got = with_gradients(lambda *a: sdpa(*a, is_causal=causal), args, [cotangent])

    exact, rows = [x.double() for x in got], 512  # in pieces of queries: the weights of all would not fit
    for x in exact:
        x.zero_()
    for first in range(0, length, rows):
        seen = slice(0, first + rows if causal else length)
        query = args[0][:, :, first : first + rows]
        piece = [x.detach().double().requires_grad_() for x in (query, args[1][:, :, seen], args[2][:, :, seen])]
        out = plain_sdpa(*piece, is_causal=causal, causal_alignment="bottom_right")
        grads = torch.autograd.grad(out, piece, cotangent[:, :, first : first + rows].double())
        exact[0][:, :, first : first + rows], exact[1][:, :, first : first + rows] = out.detach(), grads[0]
        exact[2][:, :, seen] += grads[1]
        exact[3][:, :, seen] += grads[2]
    judge(got, [x.to(dtype) for x in exact], exact, length)


@pytest.mark.slow
def test_dropout_beyond_2_to_the_31_pairs() -> None:
    """The last rows of 2^16 × 2^15 pairs drop what they would drop alone, with their own place in the stream."""
    queries, keys, last = 2**16, 2**15 + 4, 64
    query, key, value = operands(Sizes(1, 1, 1, queries, keys, 8, 8), grad=False)
    options: dict[str, Any] = {"window": (100, 100), "dropout_p": 0.5, "causal_alignment": "bottom_right"}
    whole = sdpa(query, key, value, dropout_key=KEY, **options)
    start = KEY + torch.tensor([0, (queries - last) * -(-keys // 8)])
    alone = sdpa(query[:, :, -last:], key, value, dropout_key=start, **options)
    torch.testing.assert_close(whole[:, :, -last:], alone)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"attn_mask": torch.zeros(1, 40)}], ids=lambda o: str([*o]))
@pytest.mark.parametrize("queries", [1, 40])
def test_nan_of_a_key_that_is_seen_shows(queries: int, options: dict[str, Any], capability: str) -> None:
    value = torch.randn(1, 1, 40, 8)
    key = value.clone()
    key[..., 3, :] = math.nan
    assert functional.scaled_dot_product_attention(value[:, :, :queries], key, value, **options).isnan().all()


def relative(x: Tensor, exact: Tensor) -> Tensor:
    return (x.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize(
    ("queries", "keys", "columns"), [(1, 255, 128), (2, 64, 64), (8, 64, 61), (4, 9, 128), (16, 300, 64)]
)
@pytest.mark.parametrize("std", [1.0, 3.0, 5.0])
def test_gradients_of_few_queries_keep_the_forwards_scores(
    queries: int, keys: int, columns: int, std: float, capability: str
) -> None:
    """Keys as they lie and packed ones give scores that differ by a rounding, which must not be one of all weights."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 32, n, columns, generator=generator) for n in (queries, keys, keys))
    args, cotangent = (q * std, k * std, v), torch.randn(q.shape, generator=generator)

    def gradients(attend: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [a.to(dtype).requires_grad_() for a in args]
        return torch.autograd.grad(attend(*leaves), leaves, cotangent.to(dtype))

    torchs = torch.nn.functional.scaled_dot_product_attention
    triples = zip(
        gradients(sdpa, torch.float32), gradients(torchs, torch.float32), gradients(torchs, torch.float64), strict=True
    )
    for ours, rival, exact in triples:
        assert relative(ours, exact) <= 2 * relative(rival, exact)


@pytest.mark.parametrize("columns", [16, 24, 31, 72])
@pytest.mark.parametrize("queries", [1, 64])
def test_weights_of_a_backward_sum_to_one(columns: int, queries: int, capability: str) -> None:
    """Scores of 60 and more; in base 2 they are multiplied by a factor that is itself rounded."""
    query, key = torch.randn(64, 1, queries, columns) * 20, torch.randn(64, 1, 512, columns)
    value = torch.zeros(64, 1, 512, 1, requires_grad=True)
    (weights,) = torch.autograd.grad(sdpa(query, key, value).sum(), value)
    assert abs((weights.double().sum(2) / queries - 1).mean()) < 1.2e-6  # of 5e-6 with its rounding


def test_gradient_of_a_mask_that_very_many_scores_share() -> None:
    q, k, v = torch.randn(16, 16, 1024, 8), torch.randn(16, 16, 16, 8), torch.randn(16, 16, 16, 8) + 3
    mask, cotangent = torch.zeros(1, 1, 1, 16), torch.rand(q.shape)

    def gradient(attend: Any, dtype: torch.dtype) -> Tensor:
        leaf = mask.to(dtype).requires_grad_()
        return torch.autograd.grad(attend(q.to(dtype), k.to(dtype), v.to(dtype), leaf), leaf, cotangent.to(dtype))[0]

    exact = gradient(torch.nn.functional.scaled_dot_product_attention, torch.float64)
    assert relative(gradient(sdpa, torch.float32), exact) < 4e-6  # 1e-5 where they are added up in float32
