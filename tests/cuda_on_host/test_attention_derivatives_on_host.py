"""Dot-product attention's derivatives: the kernels of CUDA, emulated, against autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention_case import Attention, operand
from cell_operands import BF16, F16, F32, F64
from host_kernels import Kernels
from test_attention_on_host import CAUSAL, near
from torch import Tensor

CASES = {
    "plain": {},
    "one": {"queries": 1, "keys": 1, "dim": 1, "value_dim": 1},
    "odd": {"queries": 33, "keys": 70, "dim": 7, "value_dim": 13, "aligned": False},
    "wide": {"queries": 5, "keys": 40, "dim": 136, "value_dim": 72, "heads": 1, "kv_heads": 1},
    "wide value": {"queries": 18, "keys": 5, "dim": 8, "value_dim": 136, "heads": 1, "kv_heads": 1},
    "groups": {"heads": 4, "kv_heads": 2, "queries": 19, "alibi": True, "dropout": 0.2},
    "causal": {"queries": 70, "keys": 70, "window": CAUSAL},
    "causal at the bottom": {"queries": 40, "keys": 20, "window": CAUSAL, "bottom_right": True},
    "window": {"queries": 75, "keys": 80, "window": (9, 12), "softcap": 2.0},
    "bool": {"mask": "bool", "batch": 2, "mask_size": (2, 1, 20, 37)},
    "storage": {"mask": "storage", "batch": 2, "softcap": 1.5},
    "float": {"mask": "float", "window": CAUSAL, "dropout": 0.3},
    "starts": {"lengths": [(5, 9), (0, 3), (30, 40), (7, 0), (1, 1)], "dropout": 0.4},
    "causal starts": {"lengths": [(70, 90), (33, 20)], "window": CAUSAL, "bottom_right": True, "alibi": True},
}
TYPES = [F32, F64, BF16]


def make(name: str, dtype: torch.dtype) -> Attention:
    if name == "float" and dtype in (F32, F64):
        pytest.skip("a mask of float is of another type than 16-bit queries only")
    return Attention(dtype=dtype, **CASES[name])


def check(case: Attention, found: dict[str, Tensor], expected: tuple[Tensor, ...]) -> None:
    """Gradients: weights and their derivatives are rounded to 16 bits too, and out to the storage type."""
    for name, wanted in zip(case.inputs(), expected, strict=True):
        if name not in found:
            continue
        dtype = case.compute if name == "mask" and case.dtype.itemsize > 2 else case.dtype
        near(found[name], wanted, dtype, 4)


@pytest.mark.parametrize("dtype", [*TYPES, F16])
@pytest.mark.parametrize("name", CASES)
def test_backward(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    case = make(name, dtype)
    wide = case.wide()
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    check(case, case.backward(kernels), expected)


def test_sums_of_float32_are_not_cut(kernels: Kernels) -> None:
    """Tensor cores cut what they add: with one key, whose weights are all one, that is most of a gradient's error."""
    case = Attention(queries=193, keys=1, dim=7, value_dim=65, heads=1, kv_heads=1)
    wide = case.wide()
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    for found, wanted in zip(case.backward(kernels).values(), expected, strict=True):
        near(found, wanted, F32, 1.5)


@pytest.mark.parametrize("missing", ["grad_out", "grad_lse", "grad_query", "grad_key", "grad_value"])
def test_what_is_not_given_or_asked_for(kernels: Kernels, missing: str) -> None:
    case = Attention()
    wide = case.wide()
    grads = (None if missing == name else wide[name] for name in ("grad_out", "grad_lse"))
    expected = case.gradients(*grads)(*(wide[n] for n in case.inputs()))
    check(case, case.backward(kernels, **{missing: None}), expected)


@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 1, 1, 37), (1, 2, 20, 1), (1, 1, 20, 37), (2, 2, 1, 1)])
def test_gradient_of_a_broadcast_mask(kernels: Kernels, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for multiprocessors in (1, 30):
        kernels.library.set_device(multiprocessors, 227 * 1024, 8)
        try:
            case = Attention(dtype=dtype, mask="storage", batch=2, mask_size=size)
            wide = case.wide()
            expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
            fields = {"grad_query": None, "grad_key": None, "grad_value": None}
            near(case.backward(kernels, **fields)["mask"], expected[3], dtype, 4)
        finally:
            kernels.library.set_device(1, 227 * 1024, 8)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mask", [None, "bool", "storage"])
def test_what_nobody_sees_may_be_nan(kernels: Kernels, mask: str | None, dtype: torch.dtype) -> None:
    case = Attention(dtype=dtype, queries=20, keys=50, window=(30, 3), mask=mask, mask_size=(1, 1, 20, 50))
    if mask is not None:
        barred = {"bool": False}.get(mask, -math.inf)
        case.tensors["mask"][:, :, 7] = barred  # a query that sees nothing
        case.tensors["mask"][:, :, :, 5:8] = barred
        for name in ("key", "value"):
            case.tensors[name][:, :, 5:8] = math.nan
    for name in ("key", "value"):
        case.tensors[name][:, :, 24:] = math.inf
        case.tensors[name][:, :, 30:] = math.nan
    wide = case.wide()
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    found = case.backward(kernels)
    check(case, found, expected)
    assert all(t.isfinite().all() for t in found.values())


def test_little_shared_memory(kernels: Kernels) -> None:
    kernels.library.set_device(1, 99 * 1024, 8)
    try:
        for dtype in TYPES:
            case = Attention(dtype=dtype, queries=20, keys=20, dim=256, value_dim=256, heads=1, kv_heads=1)
            wide = case.wide()
            expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
            check(case, case.backward(kernels), expected)
    finally:
        kernels.library.set_device(1, 227 * 1024, 8)


@pytest.mark.parametrize("sizes", [{"keys": 0}, {"queries": 0}, {"value_dim": 0}, {"batch": 0}])
def test_nothing(kernels: Kernels, sizes: dict[str, int]) -> None:
    found = Attention(**sizes).backward(kernels)
    if "value_dim" not in sizes:
        assert all((t == 0).all() for t in found.values())
    out_t, lse_t = Attention(**sizes).tangent(kernels)
    assert not out_t.isnan().any() and not lse_t.isnan().any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_tangent(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    case = make(name, dtype)
    wide, names = case.wide(), case.inputs()
    primals, tangents = (tuple(wide[f"{n}{suffix}"] for n in names) for suffix in ("", "_t"))
    _, (expected, expected_lse) = torch.func.jvp(case.oracle, primals, tangents)
    out_t, lse_t = case.tangent(kernels)
    near(out_t, expected, dtype, 4)
    near(lse_t, expected_lse, case.compute, 4)


@pytest.mark.parametrize("without", ["query", "key", "value", "mask"])
def test_tangent_of_some(kernels: Kernels, without: str) -> None:
    case = Attention(mask="storage")
    wide, names = case.wide(), case.inputs()
    primals = tuple(wide[n] for n in names)
    tangents = tuple(wide[f"{n}_t"] * (n != without) for n in names)
    _, (expected, expected_lse) = torch.func.jvp(case.oracle, primals, tangents)
    out_t, lse_t = case.tangent(kernels, (without,))
    near(out_t, expected, F32, 4)
    near(lse_t, expected_lse, F32, 4)


def backward_tangent(kernels: Kernels, case: Attention, without: tuple[str, ...] = ()) -> None:
    wide, names = case.wide(), case.inputs()
    zero = {name: 0.0 if name in without else 1.0 for name in ("query", "key", "value", "mask", "grad_out", "grad_lse")}
    primals = tuple(wide[n] for n in names)
    tangents = tuple(wide[f"{n}_t"] * zero[n] for n in names)
    _, (out_t, lse_t) = torch.func.jvp(case.oracle, primals, tangents)

    def of_all(grad_out: Tensor, grad_lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return case.gradients(grad_out, grad_lse)(*inputs)

    grads = tuple(wide[name] for name in ("grad_out", "grad_lse"))
    grads_t = tuple(wide[f"{name}_t"] * zero[name] for name in ("grad_out", "grad_lse"))
    _, expected = torch.func.jvp(of_all, (*grads, *primals), (*grads_t, *tangents))
    out_t = case.spaced(out_t.to(case.dtype))
    found = case.backward(
        kernels,
        name="attention_backward_tangent",
        **case.tangents(without),
        out_t=operand(out_t),
        lse_t=lse_t.to(case.compute),
        grad_out_t=None if "grad_out" in without else operand(case.tensors["grad_out_t"]),
        grad_lse_t=None if "grad_lse" in without else case.tensors["grad_lse_t"],
    )
    check(case, found, expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_backward_tangent(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    backward_tangent(kernels, make(name, dtype))


@pytest.mark.parametrize("without", ["query", "key", "value", "mask", "grad_out", "grad_lse"])
def test_backward_tangent_of_some(kernels: Kernels, without: str) -> None:
    backward_tangent(kernels, Attention(mask="storage"), (without,))


@pytest.mark.parametrize("dtype", TYPES)
def test_tangents_with_little_shared_memory(kernels: Kernels, dtype: torch.dtype) -> None:
    kernels.library.set_device(1, 99 * 1024, 8)
    try:
        backward_tangent(
            kernels, Attention(dtype=dtype, queries=9, keys=20, dim=256, value_dim=256, heads=1, kv_heads=1)
        )
    finally:
        kernels.library.set_device(1, 227 * 1024, 8)


def test_two_runs_agree_bit_for_bit(kernels: Kernels) -> None:
    case = Attention(dtype=BF16, heads=4, kv_heads=2, mask="storage", mask_size=(1, 1, 20, 37), dropout=0.2)
    first, second = case.backward(kernels), case.backward(kernels)
    assert all(torch.equal(first[name], second[name]) for name in first)
