"""Values of semantic hashing's functions: codes, distances, look-up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lect11ext import functional, reference
from tests.helpers import room, same_for_any_threads

NAN = float("nan")
BYTES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 20, 24, 31, 32, 33, 40, 48, 56, 63, 64, 65, 100, 128, 200, 1024]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def random_codes(count: int, size: int, device: str | None = None) -> Tensor:
    return torch.randint(0, 256, (count, size), dtype=torch.uint8, device=device)


def same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def check_search(query: Tensor, codes: Tensor, ks: list[int], radii: list[int]) -> None:
    distance = functional.hamming_distance(query, codes)
    same([distance], [reference.hamming_distance(query, codes)])
    for k in ks:
        same(functional.hamming_topk(query, codes, k), reference.hamming_topk(query, codes, k))
    for radius in radii:
        same(functional.hamming_radius(query, codes, radius), reference.hamming_radius(query, codes, radius))


# --- codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1000), (2, 3, 17), (0, 4), (4, 0), (5, 1027)], ids=str)
def test_binarize(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.randn(shape).to(device, dtype)
    for threshold in (0.5, 0.0, -1.0, float("inf"), float("-inf"), 0.1):
        same([functional.binarize(x, threshold)], [(x > threshold).to(dtype)])


def test_binarize_keeps_nan_and_rounds_its_threshold(dtype: torch.dtype, capability: str) -> None:
    x = torch.tensor([NAN, float("inf"), -float("inf"), 0.1, 0.0, 1.0, 0.5] * 9, dtype=dtype)
    got = functional.binarize(x, 0.1)
    assert torch.equal(got.isnan(), x.isnan())
    assert got[1:7].tolist() == [1, 0, 0, 0, 1, 1]  # 0.1 of the type is not above 0.1
    assert functional.pack_bits(x[:7], 0.1).tolist() == [0b01000110]


def test_binarize_is_the_identity_to_derivatives() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(functional.binarize(x), x, incoming, create_graph=True)
    assert torch.equal(grad, incoming)
    (second,) = torch.autograd.grad((grad * incoming).sum(), incoming)
    assert torch.equal(second, 2 * incoming)
    # With a function behind it, second derivatives are the function's.
    out = functional.binarize(x).add(x).pow(3).sum()
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    (again,) = torch.autograd.grad(first.sum(), x)
    y = functional.binarize(x) + x
    torch.testing.assert_close(first, 2 * 3 * y.square())
    torch.testing.assert_close(again, 4 * 6 * y)
    value, tangent = torch.func.jvp(functional.binarize, (x.detach(),), (incoming.detach(),))
    assert torch.equal(tangent, incoming) and torch.equal(value, functional.binarize(x))


@pytest.mark.parametrize("bits", [0, 1, 7, 8, 9, 16, 63, 64, 65, 100, 511, 512, 513, 1100])
def test_pack_is_numpys(bits: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, bits).to(device, dtype)
    expected = np.packbits((x > 0.25).cpu().numpy(), axis=-1)
    got = functional.pack_bits(x, 0.25)
    assert got.dtype == torch.uint8 and np.array_equal(got.cpu().numpy(), expected)
    same([got], [reference.pack_bits(x, 0.25)])
    back = functional.unpack_bits(got, bits, dtype)
    same([back], [(x > 0.25).to(dtype)])


@pytest.mark.parametrize("bits", [1, 20, 64, 129, 600])
def test_codes_on_every_capability(bits: int, dtype: torch.dtype, capability: str) -> None:
    x = torch.randn(70, bits).to(dtype)
    x[3, bits // 2] = NAN
    same([functional.pack_bits(x, 0.1)], [reference.pack_bits(x, 0.1)])
    same([functional.unpack_bits(functional.pack_bits(x), bits, dtype)], [(x > 0.5).to(dtype)])
    got = functional.binarize(x, 0.1)
    assert torch.equal(got.isnan(), x.isnan()) and torch.equal(
        got.nan_to_num(7), ((x > 0.1) + 7.0 * x.isnan()).to(dtype)
    )


@pytest.mark.parametrize("kind", INTEGERS, ids=str)
def test_integers_and_bools(kind: torch.dtype, device: str) -> None:
    x = torch.arange(-20, 21, device=device).to(kind)
    for threshold in (0.5, 0.0, -0.5, 3.0, 3.5, 1e30, -1e30, float("inf"), float("-inf")):
        expected = np.packbits(x.cpu().numpy().astype(object) > threshold)
        assert np.array_equal(functional.pack_bits(x, threshold).cpu().numpy(), expected), threshold
    truth = x > 3
    same([functional.pack_bits(truth, 5.0)], [functional.pack_bits(truth.float())])
    same([functional.unpack_bits(functional.pack_bits(truth), 41, kind)], [truth.to(kind)])
    same([functional.unpack_bits(functional.pack_bits(truth), 41, torch.bool)], [truth])


def test_integers_beyond_what_a_float_tells_apart() -> None:
    x = torch.tensor([2**53, 2**53 + 1, 2**63 - 1, -(2**63)])
    assert functional.pack_bits(x, float(2**53)).tolist() == [0b01100000]


def test_views_of_any_strides(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(12, 40, 6).to(device, dtype)
    for view in (x, x.mT, x.permute(2, 0, 1), x[::2, 1:38:3], x[:1].expand(4, 40, 6), x[..., :1].expand(12, 40, 9)):
        same([functional.pack_bits(view)], [reference.pack_bits(view)])
        same([functional.binarize(view)], [(view > 0.5).to(dtype)])
        same([functional.pack_bits(view > 0.3)], [reference.pack_bits(view, 0.3)])
    codes = random_codes(6, 10, device)
    for view in (codes.T, codes[::2, ::3], codes[:1].expand(5, 10)):
        same([functional.unpack_bits(view)], [reference.unpack_bits(view)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4), order=st.randoms(use_true_random=False))
def test_any_shape(shape: list[int], order: Any) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = torch.randn(shape).permute(axes)
    same([functional.pack_bits(x)], [reference.pack_bits(x)])
    same([functional.unpack_bits(functional.pack_bits(x), x.size(-1))], [(x > 0.5).float()])


def test_many_dimensions() -> None:
    x = torch.randn([2] * 10).permute(9, 1, 8, 3, 6, 5, 4, 7, 2, 0)
    same([functional.pack_bits(x), functional.binarize(x)], [reference.pack_bits(x), (x > 0.5).float()])


@pytest.mark.cpu  # of a GPU all memory is there that is asked for
def test_strides_beyond_32_bits() -> None:
    near = torch.randn(2, 19).bfloat16()
    far = room(2**31 + 64, torch.bfloat16).as_strided((2, 19), (2**31 + 11, 1)).copy_(near)
    same([functional.pack_bits(far)], [reference.pack_bits(near)])


# --- look-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BYTES)
def test_every_number_of_bytes(size: int, capability: str) -> None:
    query, codes = random_codes(5, size), random_codes(333, size)
    codes[7] = codes[200] = query[3]
    codes[90, -1] ^= 1
    check_search(query, codes, [1, 2, 10, 333], [0, 1, 4 * size - 2, 4 * size, 8 * size, 8 * size + 9])


@pytest.mark.parametrize("size", [3, 8, 16, 32, 50, 100])
@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 2048, 5000])
def test_every_number_of_codes(count: int, size: int, device: str) -> None:
    query, codes = random_codes(3, size, device), random_codes(count, size, device)
    check_search(query, codes, sorted({1, min(7, count), count}), [0, 3 * size, 4 * size])


@pytest.mark.parametrize("queries", [1, 7, 8, 9, 64, 65, 200])
def test_every_number_of_queries(queries: int, device: str) -> None:
    check_search(random_codes(queries, 8, device), random_codes(3000, 8, device), [1, 20], [0, 24])


def test_ties_go_to_the_lower_index(capability: str) -> None:
    for size in (1, 8, 16, 30, 80):
        base = random_codes(3, size)
        codes = base[torch.randint(0, 3, (4000,))]
        check_search(base[:2], codes, [1, 100, 1500, 4000], [0, 8 * size])


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_sorted_codes(order: str, capability: str) -> None:
    """Descending: every code is nearer than all before it, and what was found must be thrown away again and again."""
    bits = (torch.arange(257)[:, None] > torch.arange(256)).repeat_interleave(30, 0)
    codes = functional.pack_bits(bits.flip(0) if order == "descending" else bits)
    query = torch.zeros(2, 32, dtype=torch.uint8)
    check_search(query, codes, [1, 10, 100, 7710], [0, 5, 100, 256])


def test_nothing_to_find(device: str) -> None:
    some, none = random_codes(4, 8, device), random_codes(0, 8, device)
    check_search(some, none, [0], [0, 3])
    check_search(none, some, [0, 2], [0, 3])
    check_search(none, none, [0], [0])
    check_search(some, some, [0, 4], [0])
    empty = torch.zeros(3, 0, dtype=torch.uint8, device=device)  # codes of no bits
    check_search(empty, empty, [0, 1, 3], [0, 1])


def test_strided_and_expanded_codes(device: str) -> None:
    store = random_codes(400, 50, device)
    for size in (4, 8, 13, 16, 32):
        query = store[:6, :size]
        for codes in (
            store[:, 3 : 3 + size],
            store[::3, :size],
            store[:1, :size].expand(90, size),
            store[:, :1].expand(400, size),
            store[:50].T[:, :size],
            store.flatten()[1 : 1 + 200 * size].view(200, size),  # misaligned
        ):
            check_search(query, codes, [1, 5], [3 * size])
            check_search(codes[:3], codes, [5], [3 * size])


def test_batches_of_distances(device: str) -> None:
    for a, b in (
        ((2, 5, 9), (2, 7, 9)),
        ((1, 5, 9), (3, 7, 9)),
        ((5, 9), (2, 3, 7, 9)),
        ((4, 1, 5, 9), (3, 7, 9)),
        ((2, 5, 9), (0, 1, 7, 9)),
        ((1,) * 9 + (2, 5, 9), (2,) * 9 + (2, 7, 9)),
    ):
        x, y = (torch.randint(0, 256, s, dtype=torch.uint8, device=device) for s in (a, b))
        same([functional.hamming_distance(x, y)], [reference.hamming_distance(x, y)])
    x, y = (torch.randint(0, 256, (3, 4, n, 8), dtype=torch.uint8, device=device) for n in (70, 2100))
    view = x.transpose(0, 1)[:, :1]
    same([functional.hamming_distance(view, y[0])], [reference.hamming_distance(view, y[0])])
    same([functional.hamming_distance(x.mT[..., :8], y)], [reference.hamming_distance(x.mT[..., :8], y)])


@pytest.mark.parametrize(
    ("queries", "count", "size"), [(1, 40000, 8), (3, 40000, 20), (150, 20000, 4), (20, 30000, 128)]
)
def test_threads_give_the_same_result(queries: int, count: int, size: int) -> None:
    query, codes = random_codes(queries, size), random_codes(count, size)
    radius = 4 * size - size // 2

    def results() -> Sequence[Tensor]:
        return [
            functional.hamming_distance(query, codes[:999]),
            *functional.hamming_topk(query, codes, 13),
            *functional.hamming_topk(query, codes, count),
            *functional.hamming_radius(query, codes, radius),
            *functional.hamming_radius(query, codes, 8 * size),
            functional.pack_bits(codes),
        ]

    first = same_for_any_threads(results, (1, 2, 2, 3, 7))
    same([first[0]], [reference.hamming_distance(query, codes[:999])])
    distances, indices = first[3:5]
    same([distances, indices], functional.hamming_distance(query, codes).sort(dim=-1, stable=True))


def test_nearest_codes_are_those_of_a_large_search() -> None:
    query, codes = random_codes(9, 8), random_codes(60000, 8)
    check_search(query, codes, [10], [12])


def test_codes_are_those_of_faiss() -> None:
    faiss = pytest.importorskip("faiss")
    codes = functional.pack_bits(torch.randn(500, 64), 0.0)
    index = faiss.IndexBinaryFlat(64)
    index.add(codes.cpu().numpy())
    distances, _ = index.search(codes[:7].cpu().numpy(), 20)
    assert np.array_equal(functional.hamming_topk(codes[:7], codes, 20)[0].cpu().numpy(), distances)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    queries=st.integers(0, 10), count=st.integers(0, 300), size=st.integers(0, 70), k=st.integers(0, 300),
    radius=st.integers(0, 600), values=st.sampled_from([2, 256]),
)  # fmt: skip
def test_any_search(queries: int, count: int, size: int, k: int, radius: int, values: int) -> None:
    query, codes = (torch.randint(0, values, (n, size), dtype=torch.uint8) for n in (queries, count))
    check_search(query, codes, [min(k, count)], [radius])


@pytest.mark.slow
def test_the_longest_codes(capability: str) -> None:
    query, codes = random_codes(3, 8191), random_codes(300, 8191)
    codes[17] = ~query[1]
    check_search(query, codes, [1, 9, 300], [0, 32764, 65528])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_at_the_ends_of_their_types(dtype: torch.dtype) -> None:
    ends = torch.iinfo(dtype)
    x = torch.tensor([[ends.min, 0, 1, 2, 3, 5, ends.max - 1, ends.max]], dtype=dtype)
    for threshold in (-1e30, -129.0, -1.0, -0.5, 0.0, 0.5, 1.0, 127.0, 254.5, 255.0, 256.0, float(ends.max), 1e30):
        bits = functional.unpack_bits(functional.pack_bits(x, threshold=threshold), 8)[0]
        assert [bool(bit) for bit in bits] == [value > threshold for value in x[0].tolist()]
