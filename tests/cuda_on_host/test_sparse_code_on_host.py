"""The kernels on sparse codes against sorting, and against float64 PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_kernels import Kernels, Output, assert_near
from torch import Tensor

from lect11ext import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
NAN, INF = float("nan"), float("inf")


class Indices:
    """What a kernel writes, watched."""

    def __init__(self, *size: int) -> None:
        self.memory = torch.full((torch.Size(size).numel() + 32,), -7)
        self.tensor = self.memory[16:-16].view(size)

    def checked(self) -> Tensor:
        assert (self.memory[:16] == -7).all() and (self.memory[-16:] == -7).all(), "written outside the output"
        return self.tensor


# --- topk_code ----------------------------------------------------------------------------------------------------


def topk(kernels: Kernels, x: Tensor, k: int, rectify: bool) -> tuple[Tensor, Tensor]:
    values, indices = Output(x.size(0), k, dtype=x.dtype), Indices(x.size(0), k)
    kernels.topk_code(
        rows=x.size(0), length=x.size(1), k=k, input=x, dtype=x.dtype, stride=x.stride(0), rectify=rectify,
        values=values, indices=indices.tensor,
    )  # fmt: skip
    return values.checked(), indices.checked()


def rows_of_every_kind(n: int, dtype: torch.dtype) -> Tensor:
    table = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.5])
    rows = [
        torch.randn(n),
        torch.randn(n),
        torch.zeros(n),
        torch.arange(n).float(),
        -torch.arange(n).float(),
        torch.full((n,), NAN),
        torch.full((n,), -INF),
        torch.randint(3, (n,)).float(),
        torch.relu(torch.randn(n) - 1),
        table[torch.randint(len(table), (n,))],
        torch.randn(n) * 1e-42,
        -torch.rand(n),
    ]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("n", [1, 2, 31, 256, 257, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk(kernels: Kernels, dtype: torch.dtype, n: int, rectify: bool) -> None:
    x = rows_of_every_kind(n, dtype)
    for k in sorted({1, 3, n // 2, n - 1, n} & set(range(1, n + 1))):
        values, indices = topk(kernels, x, k, rectify)
        expected = reference.topk_code(x, k, activation="relu" if rectify else "identity")
        assert torch.equal(indices, expected[1]), k
        assert torch.equal(values.nan_to_num(123.0), expected[0].nan_to_num(123.0))
        assert torch.equal(values.isnan(), expected[0].isnan())


def test_topk_of_the_largest_k_and_rows_apart(kernels: Kernels) -> None:
    x = torch.randn(2, 2100)
    assert torch.equal(topk(kernels, x, 2048, False)[1], reference.topk_code(x, 2048)[1])
    apart = torch.randn(5, 90)[:, 7:60]
    assert torch.equal(topk(kernels, apart, 9, False)[1], reference.topk_code(apart, 9)[1])
    repeated = torch.randn(1, 40).expand(3, 40)
    assert torch.equal(topk(kernels, repeated, 9, False)[1], reference.topk_code(repeated, 9)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_takes_no_tie_too_many(kernels: Kernels, dtype: torch.dtype) -> None:
    # Where k is a power of two the entries fill their shared memory, and one more is written beyond it.
    for k in (2, 16, 256):
        for larger in (0, 1, k // 2, k - 1):
            x = torch.zeros(1, 600).index_fill_(1, torch.randperm(600)[:larger], 1.0).to(dtype)
            assert torch.equal(topk(kernels, x, k, False)[1], reference.topk_code(x, k)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [9000, 9003])  # the second: rows that are not aligned
def test_topk_of_long_rows(kernels: Kernels, dtype: torch.dtype, n: int) -> None:
    # Most rows are done by a bound; where the largest lie in few threads' shares, or are equal, it is low.
    clustered = torch.rand(n).index_add_(0, torch.arange(0, n, 512), torch.ones(len(range(0, n, 512))))
    x = torch.stack([torch.randn(n), clustered, torch.rand(n).round_(), torch.arange(n).float()]).to(dtype)
    for k in (32, 256, 257):
        assert torch.equal(topk(kernels, x, k, False)[1], reference.topk_code(x, k)[1]), k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter(kernels: Kernels, dtype: torch.dtype) -> None:
    values = torch.randn(300, 4).to(dtype)
    indices = torch.stack([torch.randperm(9)[:4] for _ in range(300)])
    out = Output(300, 9, dtype=dtype, like=torch.zeros(300, 9))
    kernels.scatter_code(rows=300, length=9, k=4, element_bytes=dtype.itemsize, values=values, indices=indices, out=out)
    assert torch.equal(out.checked(), torch.zeros(300, 9, dtype=dtype).scatter(1, indices, values))


# --- the trilinear form -------------------------------------------------------------------------------------------

# rows, K, atoms, columns, elements between two rows beyond the columns, elements by which the memory is shifted
SIZES = [
    (1, 1, 1, 1, 0, 0), (5, 7, 11, 67, 0, 0), (4, 9, 6, 64, 0, 0), (3, 2, 5, 520, 8, 0), (3, 2, 5, 530, 6, 0),
    (70, 3, 8, 5, 3, 0), (3, 5, 4, 32, 0, 1), (2, 3, 4, 1100, 4, 0), (9, 1, 2, 16, 16, 0),
]  # fmt: skip


def matrix(rows: int, columns: int, dtype: torch.dtype, gap: int, shift: int) -> Tensor:
    """Rows of it lie apart, and NaN between them."""
    memory = torch.full((rows * (columns + gap) + shift,), NAN, dtype=dtype)
    out = memory[shift:].view(rows, columns + gap)[:, :columns]
    return out.copy_(torch.randn(rows, columns))


def compute(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def bound(dtype: torch.dtype, terms: int) -> dict[str, float]:
    return {"units": 2, "atol": 2 * terms * torch.finfo(compute(dtype)).eps}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode(kernels: Kernels, dtype: torch.dtype, size: tuple[int, ...], biased: bool) -> None:
    rows, k, atoms, columns, gap, shift = size
    values, indices = torch.randn(rows, k, dtype=compute(dtype)), torch.randint(atoms, (rows, k))
    weight = matrix(atoms, columns, dtype, gap, shift)
    bias = torch.randn(columns, dtype=compute(dtype)) if biased else None
    out = Output(rows, columns, dtype=dtype, shift=shift)
    kernels.weighted_rows(
        rows=rows, width=columns, k=k, table_rows=atoms, values=values, indices=indices, table=weight, dtype=dtype,
        stride=weight.stride(0), bias=bias, out=out, out_dtype=dtype,
    )  # fmt: skip
    exact = reference.sparse_decode(values.double(), indices, weight.double(), bias if bias is None else bias.double())
    assert_near(out.checked(), exact, **bound(dtype, 8 * k))


def test_rows_wider_than_a_grid_is_high_are_named(kernels: Kernels) -> None:
    width = 65535 * 128 + 1  # a column a thread, as of rows that do not begin at 16 bytes
    weight, indices = torch.zeros(width + 1, dtype=BF16)[1:], torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="at most 65535 blocks, but these sizes take 65536"):
        kernels.weighted_rows(
            rows=1, width=width, k=1, table_rows=1, values=torch.ones(1, 1), indices=indices, table=weight, dtype=BF16,
            stride=width, bias=None, out=torch.empty(1, width, dtype=BF16), out_dtype=BF16,
        )  # fmt: skip


def sort(indices: Tensor, atoms: int) -> tuple[Tensor, Tensor]:
    placed, order = torch.sort(indices.reshape(-1), stable=True)
    return order, torch.searchsorted(placed, torch.arange(atoms + 1))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outer(kernels: Kernels, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    rows, k, atoms, columns, gap, shift = size
    atoms += 2  # of which some have no entry
    values, indices = torch.randn(rows, k, dtype=compute(dtype)), torch.randint(atoms, (rows, k))
    dense = matrix(rows, columns, dtype, gap, shift)
    order, starts = sort(indices, atoms)
    out = Output(atoms, columns, dtype=dtype, shift=shift)
    kernels.weighted_rows(
        rows=atoms, width=columns, k=k, table_rows=rows, values=values, order=order, starts=starts, table=dense,
        dtype=dtype, stride=dense.stride(0), out=out, out_dtype=dtype,
    )  # fmt: skip
    pairs = (values.double().unsqueeze(2) * dense.double().unsqueeze(1)).flatten(0, 1)
    exact = torch.zeros(atoms, columns, dtype=F64).index_add(0, indices.flatten(), pairs)
    assert_near(out.checked(), exact, **bound(dtype, 8 * rows))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dots(kernels: Kernels, dtype: torch.dtype, size: tuple[int, ...], biased: bool) -> None:
    rows, k, atoms, columns, gap, shift = size
    indices = torch.randint(atoms, (rows, k))
    weight = matrix(atoms, columns, dtype, gap, shift)
    bias = torch.randn(atoms, dtype=compute(dtype)) if biased else None
    for dense_dtype in {dtype, F64 if dtype == F64 else F32}:
        dense = matrix(rows, columns, dense_dtype, gap, shift)
        out = Output(rows, k, dtype=dense_dtype, shift=shift)
        kernels.row_dots(
            rows=rows, width=columns, k=k, table_rows=atoms, indices=indices, table=weight, dtype=dtype,
            stride=weight.stride(0), dense=dense, dense_dtype=dense_dtype, dense_stride=dense.stride(0), bias=bias,
            out=out, out_dtype=dense_dtype,
        )  # fmt: skip
        exact = torch.einsum("bd,bkd->bk", dense.double(), weight.double()[indices])
        if bias is not None:
            exact = exact + bias.double()[indices]
        assert_near(out.checked(), exact, **bound(dtype, 4 * columns))


@pytest.mark.parametrize("index", [-1, 4, 2**40])
def test_an_index_out_of_range_shows_and_touches_nothing(kernels: Kernels, index: int) -> None:
    values, weight, dense = torch.ones(3, 2), torch.randn(4, 8), torch.randn(3, 8)
    indices = torch.tensor([[0, 1], [2, index], [3, 3]])
    shared: Any = dict(width=8, k=2, dtype=F32, stride=8, out_dtype=F32)
    out = Output(3, 8, dtype=F32)
    kernels.weighted_rows(rows=3, table_rows=4, values=values, indices=indices, table=weight, out=out, **shared)
    assert out.checked().isnan().all(1).tolist() == [False, True, False]
    out = Output(3, 2, dtype=F32)
    kernels.row_dots(
        rows=3, table_rows=4, indices=indices, table=weight, dense=dense, dense_dtype=F32, dense_stride=8, out=out,
        **shared,
    )  # fmt: skip
    assert out.checked().isnan().tolist() == [[False, False], [False, True], [False, False]]
    order, starts = sort(indices, 4)
    out = Output(4, 8, dtype=F32)
    kernels.weighted_rows(
        rows=4, table_rows=3, values=values, order=order, starts=starts, table=dense, out=out, **shared
    )
    torch.testing.assert_close(out.checked(), torch.stack([dense[0], dense[0], dense[1], 2 * dense[2]]))
    out = Output(3, 4, dtype=F32, like=torch.zeros(3, 4))
    kernels.scatter_code(rows=3, length=4, k=2, element_bytes=4, values=values, indices=indices, out=out)
    assert out.checked().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
