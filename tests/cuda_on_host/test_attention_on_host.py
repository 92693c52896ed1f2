"""Dot-product attention: the kernels of CUDA, emulated, against plain PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_case import OPEN, Attention
from cell_operands import BF16, F16, F32, F64, far_apart
from host_kernels import Kernels
from torch import Tensor

CAUSAL = (OPEN, 0)
# Of the largest value, in the type's epsilons: weights and values are rounded to 16 bits, sums are of up to 200 terms.
UNITS = {F32: 16.0, F64: 16.0, BF16: 2.0, F16: 2.0}


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, units: float = 1.0) -> None:
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in different places"
    assert torch.equal(actual.isinf(), expected.isinf()), "infinite in different places"
    finite = expected.isfinite()
    error = (actual.double() - expected)[finite].abs().max().item() if finite.any() else 0.0
    largest = expected[finite].abs().max().item() if finite.any() else 0.0
    bound = units * UNITS[dtype] * torch.finfo(dtype).eps * max(largest, 1e-3)
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"


def check_forward(kernels: Kernels, case: Attention) -> None:
    out, lse = case.forward(kernels)
    wide = case.wide()
    expected, expected_lse = case.attend(wide["query"], wide["key"], wide["value"], wide.get("mask"))
    units = max(1.0, case.spread**2)  # a score's error is of the score's size
    near(out, expected, case.dtype, units)
    near(lse, expected_lse, F64 if case.dtype == F64 else F32)


SIZES = {
    "plain": {},
    "one": {"queries": 1, "keys": 1, "dim": 1, "value_dim": 1},
    "odd": {"queries": 33, "keys": 70, "dim": 7, "value_dim": 13, "aligned": False},
    "wide": {"queries": 5, "keys": 70, "dim": 72, "value_dim": 100, "heads": 1, "kv_heads": 1},
    "widest": {"queries": 3, "keys": 40, "dim": 256, "value_dim": 256, "heads": 1, "kv_heads": 1},
    "narrow value": {"queries": 70, "keys": 33, "dim": 40, "value_dim": 8},
    "groups": {"heads": 4, "kv_heads": 2, "queries": 19},
    "groups of many": {"heads": 4, "kv_heads": 2, "queries": 70, "keys": 90},
    "causal": {"queries": 90, "keys": 90, "window": CAUSAL},
    "causal at the bottom": {"queries": 40, "keys": 75, "window": CAUSAL, "bottom_right": True},
    "causal, more queries": {"queries": 75, "keys": 40, "window": CAUSAL, "bottom_right": True},
    "window": {"queries": 140, "keys": 150, "window": (9, 20)},
    "window ahead": {"queries": 70, "keys": 80, "window": (-3, 5)},
    "negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0},
    "scale too small for a float": {"scale": 1e-50},
    "large": {"spread": 6.0, "scale": 1.0},
}
FEATURES = {
    "bool": {"mask": "bool"},
    "bool of keys": {"mask": "bool", "batch": 2, "mask_size": (2, 1, 1, 37)},
    "storage": {"mask": "storage", "window": CAUSAL},
    "float": {"mask": "float", "mask_size": (1, 2, 20, 37)},
    "alibi": {"alibi": True, "bottom_right": True, "batch": 2},
    "softcap": {"softcap": 1.5, "window": (20, 0)},
    "dropout": {"dropout": 0.3, "batch": 2, "keys": 41},
    "groups": {"heads": 4, "kv_heads": 1, "mask": "bool", "alibi": True, "dropout": 0.2, "queries": 9},
    "starts": {"lengths": [(5, 9), (0, 3), (30, 40), (7, 0), (1, 1)], "dropout": 0.4},
    "causal starts": {"lengths": [(70, 90), (33, 20)], "window": CAUSAL, "bottom_right": True, "alibi": True},
}


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("name", SIZES)
def test_forward(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    check_forward(kernels, Attention(dtype=dtype, **SIZES[name]))


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("name", FEATURES)
def test_features(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    if name == "float" and dtype in (F32, F64):
        pytest.skip("a mask of float is of another type than 16-bit queries only")
    check_forward(kernels, Attention(dtype=dtype, **FEATURES[name]))


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("heads", [1, 4])
def test_one_query_is_cut_along_the_keys(kernels: Kernels, heads: int, dtype: torch.dtype) -> None:
    kernels.library.set_device(20, 227 * 1024, 9)
    try:
        check_forward(kernels, Attention(dtype=dtype, heads=heads, kv_heads=1, queries=1, keys=333, dim=24))
        check_forward(kernels, Attention(dtype=dtype, heads=heads, kv_heads=1, queries=3, keys=150, mask="bool"))
        lengths = [(1, 200), (2, 0), (1, 90), (1, 1)]
        check_forward(
            kernels, Attention(dtype=dtype, heads=heads, kv_heads=1, lengths=lengths, window=(70, 5), dropout=0.2)
        )
    finally:
        kernels.library.set_device(1, 227 * 1024, 8)


@pytest.fixture(params=[1, 20], ids=lambda n: f"{n} multiprocessors")
def cut(request: pytest.FixtureRequest, kernels: Kernels) -> Iterator[None]:
    """Keys as a whole, and cut among blocks."""
    kernels.library.set_device(request.param, 227 * 1024, 9)
    yield
    kernels.library.set_device(1, 227 * 1024, 8)


def whole_numbers(*size: int) -> Tensor:
    return torch.randint(-9, 10, size).float()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("size", [1.0, 2.0**8, 2.0**14, 2.0**40])
def test_huge_scores(kernels: Kernels, size: float, dtype: torch.dtype) -> None:
    """Whole numbers, so that the scores are exact, and far apart."""
    case = Attention(dtype=dtype, queries=33, keys=300, dim=8, scale=1.0)
    for same_sign in (False, True):
        query, key = whole_numbers(1, 2, 33, 8), whole_numbers(1, 2, 300, 8)
        query, key = (query.abs(), key.abs()) if same_sign else (query, key)
        case.tensors |= {"query": case.spaced((query * size).to(dtype)), "key": case.spaced(key.to(dtype))}
        check_forward(kernels, case)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
@pytest.mark.parametrize("size", [1e2, 1e6, 1e12])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_the_backward_makes_the_weights_that_the_forward_had(
    kernels: Kernels, queries: int, size: float, dtype: torch.dtype
) -> None:
    """However large scores are, and though they are rounded: those of a query sum to one."""
    if dtype == F16 and size > 1e2:
        pytest.skip("beyond its range")
    case = Attention(dtype=dtype, queries=queries, keys=250, dim=64, heads=1, kv_heads=1)
    case.tensors["key"] *= size
    case.tensors["grad_out"].fill_(1.0)
    grads = case.backward(kernels, saved=case.forward(kernels))
    assert all(g.isfinite().all() for g in grads.values())
    total = grads["value"][0, 0].double().sum(0)
    torch.testing.assert_close(
        total, torch.full_like(total, queries), rtol=1e-4 if dtype in (F32, F64) else 1e-2, atol=0
    )


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_little_shared_memory(kernels: Kernels, dtype: torch.dtype) -> None:
    kernels.library.set_device(1, 99 * 1024, 8)
    try:
        check_forward(kernels, Attention(dtype=dtype, queries=70, keys=70, dim=256, value_dim=256, heads=1, kv_heads=1))
    finally:
        kernels.library.set_device(1, 227 * 1024, 8)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("mask", [None, "bool", "storage"])
def test_what_nobody_sees_may_be_nan(kernels: Kernels, mask: str | None, dtype: torch.dtype) -> None:
    case = Attention(dtype=dtype, queries=20, keys=50, window=(30, 3), mask=mask, mask_size=(1, 1, 20, 50))
    if mask is not None:
        barred = {"bool": False}.get(mask, -math.inf)
        case.tensors["mask"][:, :, :, 5:8] = barred
        case.tensors["mask"][:, :, 7] = barred  # a query that sees nothing
        for name in ("key", "value"):
            case.tensors[name][:, :, 5:8] = math.nan
    for name in ("key", "value"):
        case.tensors[name][:, :, 24:] = math.inf
        case.tensors[name][:, :, 30:] = math.nan
    check_forward(kernels, case)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("keys", [70, 140])
def test_a_mask_of_the_least_number_is_no_bar(kernels: Kernels, keys: int, dtype: torch.dtype) -> None:
    case = Attention(dtype=dtype, mask="storage", queries=5, keys=keys, mask_size=(1, 1, 5, keys))
    case.tensors["mask"].zero_()
    case.tensors["mask"][:, :, 1:3, 9:] = torch.finfo(dtype).min
    case.tensors["mask"][:, :, 3] = torch.finfo(dtype).min  # alone: scores are lost beside it, and all keys count alike
    out, lse = case.forward(kernels)
    near(out[:, :, 3], case.wide()["value"].mean(2), dtype)
    assert lse[:, :, 3].isfinite().all()
    case.tensors["mask"][:, :, 3] = 0
    check_forward(kernels, case)


MOST_SPLIT = float.fromhex("0x1.ffcp127")  # kMostSplit, beyond which a float is not taken for finite
FLAG_BYTES = 256


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(
    "bad", [None, math.inf, math.nan, MOST_SPLIT, math.nextafter(MOST_SPLIT, math.inf), -0.0, 1e-42]
)
@pytest.mark.parametrize("where", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("options", [{}, {"window": CAUSAL}, {"mask": "bool"}, {"dropout": 0.2}], ids=str)
def test_floats_known_to_be_finite_have_the_same_bits(
    kernels: Kernels, options: dict[str, Any], where: str, bad: float | None
) -> None:
    """Rows that lie askew are not asked whether they are finite (FloatScan in dot_product_finite.cuh)."""
    results, scratch = [], []
    for aligned in (True, False):
        case = Attention(queries=40, keys=70, dim=24, value_dim=20, aligned=aligned, **options)
        if bad is not None:
            case.tensors[where][0, 1, 11, 3] = torch.tensor(bad, dtype=torch.float64).to(F32)
        saved = case.forward(kernels)
        scratch.append([kernels.library.scratch_bytes()])
        results.append([*saved, *case.backward(kernels, saved=saved).values()])
        scratch[-1].append(kernels.library.scratch_bytes())
    assert [a - b for a, b in zip(*scratch, strict=True)] == [FLAG_BYTES, FLAG_BYTES], "nobody asks"
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))
        assert bad not in (None, -0.0, 1e-42) or one.isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [{"queries": 1}, {"dim": 23}, {"dim": 136}, {"window": (3, 0)}, {"dtype": F64}, {"lengths": [(1, 2)] * 20}],
    ids=str,
)
def test_where_it_does_not_pay_nobody_asks(kernels: Kernels, fields: dict[str, Any]) -> None:
    case = Attention(**{"queries": 40, "keys": 70, "dim": 24, "value_dim": 20, **fields})
    case.forward(kernels)
    assert kernels.library.scratch_bytes() == 0
    check_forward(kernels, case)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1.0, -1.0])
def test_the_greatest_values(kernels: Kernels, value: float, dtype: torch.dtype) -> None:
    """Infinity, and numbers near the type's greatest, which TF32 would round to infinity."""
    case = Attention(dtype=dtype, queries=9, keys=50)
    case.tensors["value"][:, :, 5, ::2] = value if math.isinf(value) else value * 0.9999 * torch.finfo(dtype).max
    case.tensors["value"][:, :, 17, 1::2] = value
    out, _ = case.forward(kernels)
    if math.isinf(value):
        assert (out == value).all()
    else:
        check_forward(kernels, case)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_offsets_of_more_than_32_bits(kernels: Kernels, dtype: torch.dtype) -> None:
    case = Attention(dtype=dtype, heads=1, kv_heads=1, queries=3, keys=4)
    for name in ("query", "key", "value"):
        case.tensors[name] = far_apart(case.tensors[name][0, 0]).view(1, 1, -1, 16)
    check_forward(kernels, case)


@pytest.mark.parametrize("sizes", [{"keys": 0}, {"queries": 0}, {"value_dim": 0}, {"batch": 0}])
def test_nothing(kernels: Kernels, sizes: dict[str, int]) -> None:
    check_forward(kernels, Attention(**sizes))


def test_nan_of_what_is_seen(kernels: Kernels) -> None:
    case = Attention(queries=5, keys=9)
    case.tensors["query"][0, 0, 2, 1] = math.nan
    out, lse = case.forward(kernels)
    assert out[0, 0, 2].isnan().all() and lse[0, 0, 2].isnan()
    assert out.isnan().sum() == 16 and lse.isnan().sum() == 1


def test_all_is_dropped(kernels: Kernels) -> None:
    out, lse = Attention(dropout=1.0).forward(kernels)
    assert (out == 0).all() and lse.isfinite().all()
