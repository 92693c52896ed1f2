"""Values, derivatives and corners of the ops on sparse codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lect11ext import functional, reference
from tests.helpers import assert_within_rule, check, flat, same_for_any_threads

NAN, INF = float("nan"), float("inf")
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
# rows, K, atoms, columns
SIZES = [
    (1, 1, 1, 1), (3, 2, 5, 7), (4, 4, 1, 8), (2, 5, 3, 1), (5, 7, 11, 67), (9, 32, 300, 128), (2, 3, 4, 1031),
    (0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 4, 0), (64, 6, 9, 33),
]  # fmt: skip


def code(rows: int, k: int, atoms: int, dtype: torch.dtype, device: str | None = None) -> tuple[Tensor, Tensor]:
    """With duplicates in a row wherever chance has it."""
    return torch.randn(rows, k).to(device, dtype).requires_grad_(), torch.randint(atoms, (rows, k), device=device)


def operands(size: tuple[int, int, int, int], dtype: torch.dtype, device: str | None = None) -> list[Tensor]:
    rows, k, atoms, columns = size
    weight = torch.randn(atoms, columns).to(device, dtype).requires_grad_()
    return [*code(rows, k, atoms, dtype, device), weight, torch.randn(columns).to(device, dtype).requires_grad_()]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) and torch.equal(a != a, b != b)


def rows_of_every_kind(n: int, dtype: torch.dtype) -> Tensor:
    """Rows that are hard for a selection, among ordinary ones."""
    ordinary = torch.randn(3, n)
    rows = [
        *ordinary,
        torch.zeros(n),
        torch.arange(n).float(),
        -torch.arange(n).float(),
        torch.full((n,), -INF),
        torch.full((n,), NAN),
        torch.randint(3, (n,)).float(),
        torch.relu(torch.randn(n) - 2),
        torch.where(torch.rand(n) < 0.1, torch.tensor(NAN), torch.randn(n)),
        torch.where(torch.rand(n) < 0.3, torch.tensor(-INF), torch.randn(n)),
        torch.where(torch.rand(n) < 0.3, torch.tensor(INF), torch.randn(n)),
        torch.where(torch.rand(n) < 0.5, torch.tensor(-0.0), torch.tensor(0.0)),
        torch.where(torch.arange(n) % 256 == 5, 10 + torch.randn(n), torch.randn(n)),
        torch.randn(n) * 1e-42,
    ]
    return torch.stack(rows).to(dtype)


# --- topk_code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("n", [1, 2, 15, 17, 64, 255, 512, 777, 4096])
def test_topk_is_the_stable_sort(n: int, activation: str, dtype: torch.dtype, device: str) -> None:
    x = rows_of_every_kind(n, dtype).to(device)
    for k in sorted({0, 1, 2, n // 7, n // 2, n - 1, n} & set(range(n + 1))):
        values, indices = functional.topk_code(x, k, activation=activation)
        expected = reference.topk_code(x, k, activation=activation)
        assert torch.equal(indices, expected[1]), (n, k)
        assert indices.dtype == torch.int64 and same_bits(values, expected[0])


def test_topk_of_every_capability(dtype: torch.dtype, capability: str) -> None:
    for n, k in [(300, 20), (1029, 33), (1029, 400), (4096, 32)]:
        x = rows_of_every_kind(n, dtype)
        values, indices = functional.topk_code(x, k, activation="identity")
        expected = reference.topk_code(x, k, activation="identity")
        assert torch.equal(indices, expected[1]) and same_bits(values, expected[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 700))
def test_topk_of_few_distinct_values(data: Any, n: int) -> None:
    levels = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(0, n))
    table = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.5])
    x = table[torch.randint(len(table), (levels,))][torch.randint(levels, (n,))]
    values, indices = functional.topk_code(x, k, activation="identity")
    expected = reference.topk_code(x, k, activation="identity")
    assert torch.equal(indices, expected[1]) and same_bits(values, expected[0])


def test_topk_of_any_strides(dtype: torch.dtype) -> None:
    big = torch.randn(6, 40, 5).to(dtype)
    for x in (
        big,
        big.transpose(1, 2),
        big[::2, 3:20],
        big[..., :1].expand(6, 40, 9),
        big[0, 0],
        big[0, :1].expand(7, 5),
    ):
        ours, plain = functional.topk_code(x, 3 if x.size(-1) > 3 else 1), None
        plain = reference.topk_code(x, ours[0].size(-1))
        assert torch.equal(ours[1], plain[1]) and torch.equal(ours[0], plain[0])


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_topk_gradient_is_exact(activation: str, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 300).to(device, dtype).requires_grad_()
    with torch.no_grad():
        x[0] = -x[0].abs()
        x[1] = 0.0
    grad = torch.randn(5, 9).to(device, dtype)
    ours = torch.autograd.grad(functional.topk_code(x, 9, activation=activation)[0], x, grad)[0]
    plain = torch.autograd.grad(reference.topk_code(x, 9, activation=activation)[0], x, grad)[0]
    assert torch.equal(ours, plain)
    if activation == "relu":
        assert not ours[:2].any()


# --- the trilinear form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decode_and_its_gradients(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    args = operands(size, dtype, device)
    check(functional.sparse_decode, reference.sparse_decode, args)
    check(functional.sparse_decode, reference.sparse_decode, args[:3])


def test_decode_of_every_capability(dtype: torch.dtype, capability: str) -> None:
    for size in [(5, 7, 11, 67), (3, 9, 20, 256)]:
        check(functional.sparse_decode, reference.sparse_decode, operands(size, dtype))


def dots(dense: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.lect11ext.sparse_dots(dense, indices, weight, bias)


def plain_dots(dense: Tensor, indices: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("...d,...kd->...k", dense, weight[indices.long()]) + bias[indices.long()]


def outer(values: Tensor, indices: Tensor, dense: Tensor, atoms: int) -> Tensor:
    return torch.ops.lect11ext.sparse_outer(values, indices, dense, atoms)


def plain_outer(values: Tensor, indices: Tensor, dense: Tensor, atoms: int) -> Tensor:
    pairs = (values.unsqueeze(-1) * dense.unsqueeze(-2)).flatten(0, -2)
    return pairs.new_zeros(atoms, dense.size(-1)).index_add(0, indices.long().reshape(-1), pairs)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dots_and_outer_and_their_gradients(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    values, indices, weight, _ = operands(size, dtype, device)
    dense = torch.randn(size[0], size[3]).to(device, dtype).requires_grad_()
    bias = torch.randn(size[2]).to(device, dtype).requires_grad_()
    check(dots, plain_dots, [dense, indices, weight, bias])
    check(outer, plain_outer, [values, indices, dense, size[2]])


def test_outer_leaves_atoms_without_entries_zero() -> None:
    indices = torch.tensor([[4, 1], [4, 4]])
    out = outer(torch.ones(2, 2), indices, torch.tensor([[1.0, 2.0], [10.0, 20.0]]), 6)
    assert out.tolist() == [[0, 0], [1, 2], [0, 0], [0, 0], [21, 42], [0, 0]]


def test_leading_dimensions_and_index_types(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 12).to(dtype).requires_grad_()
    for lead in [(), (3,), (2, 3), (2, 0, 3)]:
        indices = torch.randint(7, (*lead, 4))
        values = torch.randn(*lead, 4).to(dtype).requires_grad_()
        check(functional.sparse_decode, reference.sparse_decode, [values, indices, weight])
        assert torch.equal(
            functional.sparse_decode(values, indices.int(), weight), functional.sparse_decode(values, indices, weight)
        )


def test_any_strides(dtype: torch.dtype) -> None:
    values, indices, weight, bias = (t.detach() for t in operands((6, 4, 9, 21), dtype))
    shapes = {
        "transposed weight": (values, indices, torch.randn(21, 9).to(dtype).t(), bias),
        "rows apart": (values, indices, torch.randn(9, 40).to(dtype)[:, 3:24], bias),
        "every other": (values, indices, torch.randn(9, 42).to(dtype)[:, ::2], bias[:1].expand(21)),
        "one atom for all": (values, indices, weight[:1].expand(9, 21), bias),
        "one value for all": (values[:1, :1].expand(6, 4), indices[:1].expand(6, 4), weight, bias),
        "transposed code": (torch.randn(4, 6).to(dtype).t(), torch.randint(9, (4, 6)).t(), weight, bias),
    }
    for args in shapes.values():
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in args]
        check(functional.sparse_decode, reference.sparse_decode, leaves)
        out = functional.sparse_decode(*leaves)
        got = torch.autograd.grad(out.sum(), leaves[2])[0]  # of an expanded cotangent
        plain = torch.autograd.grad(reference.sparse_decode(*leaves).sum(), leaves[2])[0]
        wide = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in leaves]
        exact = torch.autograd.grad(reference.sparse_decode(*wide).sum(), wide[2])[0]
        assert_within_rule(got, plain, exact)


@pytest.mark.parametrize("types", [(0, 2, 0), (2, 0, 2), (2, 3, 0), (0, 1, 0), (3, 1, 2), (1, 2, 0)], ids=str)
def test_mixed_types(types: tuple[int, int, int]) -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    values, indices, weight, bias = operands((5, 4, 9, 21), torch.float64)
    args = [values, indices, weight, bias]
    for i, kind in zip((0, 2, 3), types, strict=True):
        args[i] = args[i].detach().to(kinds[kind]).requires_grad_()
    out = functional.sparse_decode(*args)
    leaves = [args[i] for i in (0, 2, 3)]
    wide = [a.detach().double().requires_grad_() if a.is_floating_point() else a for a in args]
    exact = reference.sparse_decode(*wide)
    expected = kinds[types[0]]
    for kind in types[1:]:
        expected = torch.promote_types(expected, kinds[kind])
    assert out.dtype == expected
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=16 * torch.finfo(expected).eps)
    grads = torch.autograd.grad(out.sum(), leaves)
    wide_grads = torch.autograd.grad(exact.sum(), [wide[i] for i in (0, 2, 3)])
    for leaf, got, want in zip(leaves, grads, wide_grads, strict=True):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=32 * torch.finfo(leaf.dtype).eps)


def test_nan_stays_in_its_rows() -> None:
    values, indices = torch.ones(3, 2), torch.tensor([[0, 1], [2, 3], [1, 1]])
    weight = torch.randn(4, 37)
    weight[2, 36] = NAN
    out = functional.sparse_decode(values, indices, weight)
    assert out.isnan().nonzero().tolist() == [[1, 36]]
    values[2, 0] = NAN
    dense = torch.randn(3, 37)
    assert outer(values, indices, dense, 4).isnan().all(1).tolist() == [False, True, False, False]


# --- encoding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_encoding_is_topk_of_linear(activation: str, dtype: torch.dtype) -> None:
    """Where rounding does not change what is selected: entries are apart by more."""
    atoms, columns = 40, 12
    weight = torch.zeros(atoms, columns)
    weight[torch.arange(atoms), torch.arange(atoms) % columns] = 1.0
    bias = (torch.randperm(atoms).float() - 25) * 8
    args = [(torch.randint(-4, 4, (6, columns)) / 2), weight, bias]
    args = [a.to(dtype).requires_grad_() for a in args]

    def run(module: Any) -> Any:
        return lambda x, w, b: module.topk_encode(x, w, b, k=20, activation=activation)[0]

    check(run(functional), run(reference), args)
    assert torch.equal(
        functional.topk_encode(*args, k=20, activation=activation)[1],
        reference.topk_encode(*args, k=20, activation=activation)[1],
    )


def test_encoding_forms_no_dense_gradient() -> None:
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    values, _ = functional.topk_encode(x, weight, k=2)
    names = set()
    pending = [values.grad_fn]
    while pending:
        node = pending.pop()
        names.add(node.name())
        pending += [n for n, _ in node.next_functions if n is not None]
    assert names <= {"ReluBackward0", "SparseDotsBackward", "torch::autograd::AccumulateGrad"}


# --- determinism --------------------------------------------------------------------------------------------------


def test_threads_and_repeats_give_the_same_bits() -> None:
    args = [a.requires_grad_() if a.is_floating_point() else a for a in operands((500, 9, 70, 130), torch.float32)]
    x = torch.randn(200, 3000, requires_grad=True)

    def results() -> Sequence[Tensor]:
        out = functional.sparse_decode(*args)
        leaves = [a for a in args if a.is_floating_point()]
        grads = torch.autograd.grad(out, leaves, torch.arange(1.0, len(out) + 1)[:, None].expand_as(out))
        values, indices = functional.topk_code(x, 17)
        return [out, *grads, values, indices, *torch.autograd.grad(values.sum(), x)]

    same_for_any_threads(results)


def test_encode_promotes() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(7, 4), torch.randn(7)
    for types in ((BF16, F32, F32), (F32, F64, F32), (F32, F32, F64), (BF16, BF16, F32), (BF16, torch.float16, BF16)):
        args = [a.to(t).requires_grad_() for a, t in zip((x, weight, bias), types, strict=True)]
        values, indices = functional.topk_encode(*args, k=2, activation="identity")
        dtype = torch.promote_types(torch.promote_types(types[0], types[1]), types[2])
        expected = reference.topk_encode(*(a.double() for a in args), k=2, activation="identity")
        assert values.dtype == dtype and torch.equal(indices, expected[1])
        torch.testing.assert_close(values, expected[0].to(dtype), rtol=2e-2 if dtype == BF16 else 1e-5, atol=1e-5)
        assert [g.dtype for g in torch.autograd.grad(values.sum(), args)] == list(types)


def test_threads_agree_on_the_bias_of_one_column() -> None:
    values, indices = torch.randn(70000, 2), torch.randint(5, (70000, 2))
    weight, bias = torch.randn(5, 1), torch.zeros(1, requires_grad=True)
    grad = torch.randn(70000, 1)
    same_for_any_threads(
        lambda: torch.autograd.grad(functional.sparse_decode(values, indices, weight, bias), bias, grad), (1, 2, 3)
    )


@pytest.mark.slow
def test_every_size(dtype: torch.dtype, capability: str) -> None:
    for columns in (*range(1, 70), 127, 513, 1025):
        for k in (1, 3, 4, 5, 8):
            check(functional.sparse_decode, reference.sparse_decode, operands((3, k, 7, columns), dtype))
    for n in (*range(1, 70), 255, 256, 511, 512, 513, 1100, 5000):
        x = rows_of_every_kind(n, dtype)
        for k in {1, 2, n // 3, n - 1, n} & set(range(n + 1)):
            for a, b in zip(flat(functional.topk_code(x, k)), flat(reference.topk_code(x, k)), strict=True):
                assert same_bits(a, b)
