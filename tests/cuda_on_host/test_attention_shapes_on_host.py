"""The kernels of attention for all devices: sizes and strides that lead to other lines of code, emulated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_case import Attention
from cell_operands import BF16, F16, F32
from host_kernels import Kernels
from test_attention_derivatives_on_host import check
from test_attention_on_host import CAUSAL, check_forward, near

# Columns of 16-bit types have room for 64, 128 or 256, floats' for 64 or 128, and fill it or not; others are cut in
# steps of 32, or 16.
DIMS = [(64, 64), (128, 128), (256, 256), (40, 40), (72, 104), (96, 96), (160, 160), (192, 128), (64, 128), (8, 256),
        (144, 144), (144, 80)]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"window": CAUSAL, "bottom_right": True},
    "bool": {"mask": "bool"},
    "storage": {"mask": "storage", "alibi": True, "softcap": 3.0},
}


def make(dims: tuple[int, int], **fields: Any) -> Attention:
    return Attention(dim=dims[0], value_dim=dims[1], **{"dtype": BF16, "heads": 1, "kv_heads": 1, **fields})


def check_gradients(kernels: Kernels, case: Attention) -> None:
    wide = case.wide()
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    check(case, case.backward(kernels), expected)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_columns(kernels: Kernels, dims: tuple[int, int], options: str, dtype: torch.dtype) -> None:
    case = make(dims, dtype=dtype, queries=70, keys=140, **OPTIONS[options])
    check_forward(kernels, case)
    check_gradients(kernels, case)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_tangents(kernels: Kernels, dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = make(dims, dtype=dtype, queries=40, keys=50, mask="storage")
    wide = case.wide()
    _, (out_t, lse_t) = torch.func.jvp(
        case.oracle, tuple(wide[n] for n in case.inputs()), tuple(wide[f"{n}_t"] for n in case.inputs())
    )
    found, found_lse = case.tangent(kernels)
    near(found, out_t, dtype, 4)
    near(found_lse, lse_t, dtype, 4)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("mask", ["bool", "storage"])
@pytest.mark.parametrize("keys", [129, 130])
@pytest.mark.parametrize(("shift", "step"), [(0, 1), (1, 1), (0, 2)])
def test_masks_of_any_strides(
    kernels: Kernels, shift: int, step: int, keys: int, mask: str, dtype: torch.dtype
) -> None:
    """Pairs of neighbours are read as one where all of them begin at an even place."""
    case = make((64, 64), dtype=dtype, mask=mask, queries=40, keys=keys)
    memory = torch.zeros(1, 1, 40, keys * step + 4 + keys % 2, dtype=case.tensors["mask"].dtype)
    view = memory[..., shift : shift + keys * step : step]
    view.copy_(case.tensors["mask"])
    case.tensors["mask"] = view
    check_forward(kernels, case)
    check_gradients(kernels, case)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (96, 96), (256, 256)], ids=str)
@pytest.mark.parametrize("mask", ["bool", "storage"])
def test_what_a_mask_bars_may_be_nan(kernels: Kernels, mask: str, dims: tuple[int, int]) -> None:
    case = make(dims, mask=mask, queries=40, keys=140, mask_size=(1, 1, 40, 140))
    barred = False if mask == "bool" else -math.inf
    case.tensors["mask"][:, :, :, 5:8] = case.tensors["mask"][:, :, 9] = barred
    for name in ("key", "value"):
        case.tensors[name][:, :, 5:8] = math.nan
    check_forward(kernels, case)
    wide = case.wide()  # zeros instead: a function of what is NaN has no derivative that is zero
    for name in ("query", "grad_out"):
        case.tensors[name][:, :, 9] = math.nan
        wide[name][:, :, 9] = 0
    for name in ("key", "value"):
        wide[name][:, :, 5:8] = 0
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    check(case, case.backward(kernels, saved=case.forward(kernels)), expected)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("softcap", [1e-3, 1.0, 256.0, 257.0, 1e5, 1e9])
def test_softcaps_of_any_size(kernels: Kernels, softcap: float, dtype: torch.dtype) -> None:
    case = make((64, 64), dtype=dtype, softcap=softcap, queries=20, keys=70)
    check_forward(kernels, case)
    check_gradients(kernels, case)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_distances_that_a_float_does_not_hold(kernels: Kernels, dtype: torch.dtype) -> None:
    """ALiBi beyond 2^24 positions: the backward makes the weights that the forward had, which sum to one."""
    keys = 2**24 + 70
    case = make((16, 16), dtype=dtype, alibi=True, queries=3, keys=8)
    assert case.slopes is not None
    case.slopes.fill_(2.0**-20)
    case.keys = keys
    for name in ("key", "value"):  # all alike
        row = torch.ones(1, 1, 1, 16, dtype=dtype) if name == "value" else case.tensors[name][:, :, :1]
        case.tensors[name] = row.expand(1, 1, keys, 16)
    case.window = (40 - keys, keys - 20)  # the last forty but the last twenty
    out, lse = case.forward(kernels)
    assert lse.isfinite().all()
    near(out, torch.ones_like(out, dtype=torch.float64), dtype)
    # Of a weighted sum of keys that are alike the key is left if the weights sum to one.
    grad = case.backward(kernels, saved=(out, lse), grad_out=None, grad_key=None, grad_value=None)["query"]
    key, grad_lse = case.tensors["key"][:, :, :1].double(), case.tensors["grad_lse"].double()
    near(grad, grad_lse.unsqueeze(3) * case.factor * key, dtype, 2)
