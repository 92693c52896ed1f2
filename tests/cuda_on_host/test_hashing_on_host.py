"""Packing bits and searching by Hamming distance: the same integers as plain PyTorch's."""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import pytest
import torch
from hashing_structs import CodeRows
from host_kernels import Integers, Kernels, Output, make_views
from torch import Tensor
from view_structs import MAX_DIMS, Shape

from lect11ext import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ONES = {1: 1, 2: 0x3C00, 4: 0x3F800000, 8: 0x3FF0000000000000}
SIZED = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.float64}


def rows_of(codes: Tensor) -> CodeRows:
    return CodeRows(codes.data_ptr(), codes.size(-2), codes.stride(-2))


def random_codes(*size: int) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8)


# --- codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 8, 31, 32, 33, 70, 300])
def test_binarize_and_pack(kernels: Kernels, bits: int, dtype: torch.dtype) -> None:
    whole = torch.randn(9, 3, bits).to(dtype)
    whole[2, 1, bits // 2] = torch.nan
    for x in (whole, whole.transpose(0, 1), whole[::2, :, : bits // 2 + 1], whole[:, :1].expand(9, 4, bits)):
        threshold = torch.tensor(0.1, dtype=dtype).item()
        shape, views = make_views(x.shape, x)
        out = Output(*x.shape, dtype=dtype)
        kernels.binarize(shape=shape, input=views[0], threshold=threshold, out=out)
        expected = reference.binarize(x, 0.1)
        assert torch.equal(out.checked().nan_to_num(7), expected.nan_to_num(7))
        codes = Integers(*x.shape[:-1], (x.size(-1) + 7) // 8, dtype=torch.uint8)
        rows, columns = x.numel() // x.size(-1), x.size(-1)
        common = dict(rows=rows, columns=columns, codes=codes.tensor, threshold=threshold)
        kernels.pack_bits(**common, shape=shape, input=views[0])
        assert torch.equal(codes.checked(), reference.pack_bits(x, 0.1))
        truth = (x > 0.1).contiguous()
        codes.tensor.fill_(77)
        kernels.pack_bits(**common, bits=truth)
        assert torch.equal(codes.checked(), reference.pack_bits(truth))


@pytest.mark.parametrize("item_size", SIZED)
@pytest.mark.parametrize("bits", [1, 8, 13, 64, 200])
def test_unpack(kernels: Kernels, bits: int, item_size: int) -> None:
    codes = random_codes(5, 26)
    out = Integers(5, bits, dtype=SIZED[item_size])
    kernels.unpack_bits(
        rows=5, columns=bits, bytes=26, codes=codes, one=ONES[item_size], item_size=item_size, out=out.tensor
    )
    assert torch.equal(out.checked(), reference.unpack_bits(codes, bits, SIZED[item_size]))


# --- distances ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3, 4, 8, 16, 21, 32, 128, 131, 300])
@pytest.mark.parametrize(("queries", "count"), [(1, 1), (16, 256), (17, 300)])
def test_distance(kernels: Kernels, queries: int, count: int, size: int) -> None:
    for a, b in (
        (random_codes(queries, size + 3)[:, 3:], random_codes(count, size)),
        (random_codes(2, 1, queries, size), random_codes(3, count, size)),
    ):
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        x, y = a.expand(*batch, queries, size), b.expand(*batch, count, size)
        out = Integers(*batch, queries, count, dtype=torch.int32)

        def steps(t: Tensor, batch: Any = batch) -> Any:
            return (c_int64 * MAX_DIMS)(*t.stride()[: len(batch)])

        kernels.hamming_distance(
            bytes=size, batches=Shape(batch.numel(), len(batch), (c_int64 * MAX_DIMS)(*batch)), query=rows_of(x),
            codes=rows_of(y), query_steps=steps(x), codes_steps=steps(y), out=out.tensor,
        )  # fmt: skip
        assert torch.equal(out.checked(), reference.hamming_distance(a, b))


# --- searches -----------------------------------------------------------------------------------------------------


def search_fields(query: Tensor, codes: Tensor, segment: int) -> dict[str, Any]:
    segments = -(-codes.size(0) // segment)
    return dict(
        bytes=query.size(1), query=rows_of(query), codes=rows_of(codes), segment=segment, segments=segments
    )  # fmt: skip


def topk(kernels: Kernels, query: Tensor, codes: Tensor, k: int, segment: int) -> tuple[Tensor, Tensor]:
    """As hashing_search.cpp's cuda_topk."""
    fields = search_fields(query, codes, segment)
    n, segments, bins = query.size(0), fields["segments"], 8 * query.size(1) + 1
    counts, limits = Integers(n, segments, bins, dtype=torch.int32), Integers(n, dtype=torch.int32)
    totals = Integers(n, bins, dtype=torch.int64)
    for sums in (counts, totals):
        sums.tensor.zero_()
    kernels.hamming_histogram(**fields, k=k, counts=counts.tensor, totals=totals.tensor)
    starts, ties = Integers(n * segments + 1, dtype=torch.int64), Integers(n, segments, dtype=torch.int64)
    kernels.hamming_plan(
        queries=n, segments=segments, bins=bins, k=k, counts=counts.checked(), totals=totals.checked(),
        limits=limits.tensor, starts=starts.tensor, ties=ties.tensor,
    )  # fmt: skip
    distances, indices = Integers(n, k, dtype=torch.int32), Integers(n, k, dtype=torch.int64)
    kernels.hamming_fill(
        **fields, limits=limits.checked(), starts=starts.checked(), ties=ties.checked(), distances=distances.tensor,
        indices=indices.tensor,
    )  # fmt: skip
    found = indices.checked()
    assert torch.equal(found, found.sort(-1).values), "not in ascending order of the index"
    ordered, order = distances.checked().sort(dim=-1, stable=True)
    return ordered, found.gather(-1, order)


def radius_search(kernels: Kernels, query: Tensor, codes: Tensor, radius: int, segment: int) -> tuple[Tensor, ...]:
    fields = search_fields(query, codes, segment)
    n, segments = query.size(0), fields["segments"]
    counts = Integers(n, segments, dtype=torch.int64)
    kernels.hamming_count(**fields, limit=radius + 1, counts=counts.tensor)
    ends = torch.nn.functional.pad(counts.checked().flatten().cumsum(0), (1, 0))
    total = int(ends[-1])
    distances, indices = Integers(total, dtype=torch.int32), Integers(total, dtype=torch.int64)
    kernels.hamming_fill(
        **fields, limit=radius + 1, starts=ends, distances=distances.tensor, indices=indices.tensor
    )  # fmt: skip
    return ends[::segments], distances.checked(), indices.checked()


def check_search(kernels: Kernels, query: Tensor, codes: Tensor, k: int, radius: int, segment: int) -> None:
    got = topk(kernels, query, codes, k, segment)
    for a, b in zip(got, reference.hamming_topk(query, codes, k), strict=True):
        assert torch.equal(a, b)
    found = radius_search(kernels, query, codes, radius, segment)
    for a, b in zip(found, reference.hamming_radius(query, codes, radius), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 8, 16, 21, 32, 131])
@pytest.mark.parametrize("segment", [1000, 256, 100])
def test_searches(kernels: Kernels, segment: int, size: int) -> None:
    store = random_codes(1000, size + 4)
    for codes in (store[:, :size].contiguous(), store[:700, 1 : 1 + size]):
        query = torch.cat([codes[17:18], random_codes(2, size)])
        for k in (1, 10, codes.size(0)):
            check_search(kernels, query, codes, k, 4 * size, segment)


@pytest.mark.parametrize("size", [1, 8])
def test_ties(kernels: Kernels, size: int) -> None:
    base = random_codes(3, size)
    codes = base[torch.randint(0, 3, (900,))]
    for k in (1, 5, 300, 301, 700, 900):
        check_search(kernels, base[:2], codes, k, 0, 256)


def test_histograms_larger_than_the_shared_memory(kernels: Kernels) -> None:
    for size in (1500, 2000):
        query, codes = random_codes(2, size), random_codes(300, size)
        check_search(kernels, query, codes, 20, 4 * size, 128)
