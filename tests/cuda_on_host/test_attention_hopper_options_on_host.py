"""The kernels of sm_90a with masks, ALiBi, softcap and dropout, emulated, against plain PyTorch in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_case import OPEN, Attention
from cell_operands import BF16
from host_kernels import Kernels
from test_attention_derivatives_on_host import check
from test_attention_hopper_on_host import ONE, check_backward, every_type, hopper, make, right_device
from test_attention_on_host import CAUSAL, check_forward, near

__all__ = ["hopper", "right_device"]  # fixtures

OPTIONS: dict[str, dict[str, Any]] = {
    "bool": {"mask": "bool", "queries": 150, "keys": 300, **ONE},
    "bool, odd keys": {"mask": "bool", "queries": 40, "keys": 131, "batch": 2},
    "bool of keys": {"mask": "bool", "queries": 40, "keys": 260, "batch": 2, "mask_size": (2, 1, 1, 260)},
    "bool of queries": {"mask": "bool", "queries": 40, "keys": 130, "mask_size": (1, 1, 40, 1)},
    "bool, causal": {"mask": "bool", "queries": 140, "keys": 140, "window": CAUSAL, "mask_size": (1, 1, 140, 140)},
    "storage": {"mask": "storage", "queries": 130, "keys": 200, "mask_size": (1, 2, 130, 200)},
    "storage, window": {"mask": "storage", "queries": 140, "keys": 150, "window": (60, 20), **ONE},
    "float": {"mask": "float", "queries": 40, "keys": 140, "mask_size": (1, 1, 40, 140)},
    "alibi": {"alibi": True, "queries": 100, "keys": 150, "batch": 2, "bottom_right": True},
    "alibi, causal": {"alibi": True, "queries": 150, "keys": 150, "window": CAUSAL},
    "alibi, both sides": {"alibi": True, "queries": 200, "keys": 300, "window": (120, 70), **ONE},
    "alibi, from the diagonal on": {"alibi": True, "queries": 70, "keys": 200, "window": (0, OPEN)},
    "alibi, bool": {
        "alibi": True, "mask": "bool", "queries": 150, "keys": 280, "window": CAUSAL, "bottom_right": True,
    },
    "alibi, sequences": {"alibi": True, "lengths": [(70, 90), (0, 3), (200, 140), (7, 0)], "heads": 4, "kv_heads": 2},
    "alibi, dropout": {"alibi": True, "dropout": 0.3, "queries": 100, "keys": 141, "window": CAUSAL},
    "dropout": {"dropout": 0.3, "queries": 100, "keys": 141, "batch": 2},
    "dropout, causal, groups": {
        "dropout": 0.2, "queries": 140, "keys": 140, "window": CAUSAL, "heads": 4, "kv_heads": 2,
    },
    "negative scale": {"scale": -0.3, "queries": 20, "keys": 140},
    "no scale": {"scale": 0.0, "queries": 20, "keys": 40},
    "sequences": {"lengths": [(70, 90), (0, 3), (200, 140), (7, 0), (1, 1), (40, 260)]},
    "sequences, causal": {
        "lengths": [(1, 150), (300, 300), (128, 128), (20, 129)], "window": CAUSAL, "bottom_right": True, **ONE,
    },
    "sequences, all": {
        "lengths": [(33, 20), (150, 270), (60, 60)], "window": (150, 40), "alibi": True, "dropout": 0.3,
        "heads": 4, "kv_heads": 2,
    },
    "all": {
        "mask": "storage", "alibi": True, "dropout": 0.25, "queries": 70, "keys": 136, "heads": 4, "kv_heads": 2,
        "batch": 2, "window": (90, 40), "bottom_right": True,
    },
}  # fmt: skip
SOFTCAP = {"softcap": 1.5, "queries": 70, "keys": 140, "alibi": True, "mask": "bool", "window": CAUSAL}
CASES = every_type(OPTIONS, ("bool", "storage", "dropout", "sequences"))


@pytest.mark.parametrize(("name", "dim", "dtype"), CASES)
def test_forward(hopper: Kernels, name: str, dim: int, dtype: torch.dtype) -> None:
    check_forward(hopper, make(dim, dtype=dtype, **OPTIONS[name]))


@pytest.mark.parametrize(("name", "dim", "dtype"), CASES)
def test_backward(hopper: Kernels, name: str, dim: int, dtype: torch.dtype) -> None:
    check_backward(hopper, make(dim, dtype=dtype, **OPTIONS[name]), grad_mask=None)


@pytest.mark.parametrize("window", [CAUSAL, (OPEN, OPEN)], ids=["causal", "all"])
@pytest.mark.parametrize(
    ("slope", "scale"), [(-0.3, 0.1), (4.0, 0.1), (0.3, 2.0), (1e4, 1e-3), (1e38, 0.1), (0, 0.1), (1, 1e-29)]
)
def test_slopes_of_any_size(hopper: Kernels, slope: float, scale: float, window: tuple[int, int]) -> None:
    """Of the largest, only keys on the diagonal are left."""
    case = make(64, dtype=BF16, alibi=True, queries=160, keys=300, scale=scale, window=window, **ONE)
    case.slopes.fill_(slope)
    check_forward(hopper, case)
    check_backward(hopper, case)


def test_a_slope_that_is_nan_stays_in_its_head(hopper: Kernels) -> None:
    case = make(64, dtype=BF16, alibi=True, queries=20, keys=140)
    case.slopes[0, 1] = math.nan
    out, lse = case.forward(hopper)
    assert out[:, 0].isfinite().all() and lse[:, 0].isfinite().all()
    assert out[:, 1].isnan().all() and lse[:, 1].isnan().all()


@pytest.mark.parametrize("left", [99, 100, 101, 102])
@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"mask": "bool"}, {"mask": "storage"}], ids=str)
def test_windows_that_begin_anywhere(hopper: Kernels, options: dict[str, Any], left: int) -> None:
    """Dropout draws for four keys at a time, and masks are read by pairs, wherever the first key that is seen is."""
    case = make(64, dtype=BF16, queries=200, keys=200, window=(left, 0), **ONE, **options)
    if "mask" in options:
        case.tensors["mask"] = case.tensors["mask"].contiguous()
    check_forward(hopper, case)
    check_backward(hopper, case, grad_mask=None)


def test_one_key_of_queries_that_lie_anyhow(hopper: Kernels) -> None:
    """Of a single query that sees the key, no stride is looked at."""
    case = make(64, dtype=BF16, mask="bool", queries=20, keys=1, window=CAUSAL, bottom_right=True, **ONE)
    memory = torch.zeros(1, 1, 20, 67, dtype=BF16)
    memory[..., :64] = case.tensors["query"]
    case.tensors["query"] = memory[..., :64]
    check_forward(hopper, case)
    check_backward(hopper, case)


@pytest.mark.parametrize("dim", [64, 128])
def test_softcap(hopper: Kernels, dim: int) -> None:
    case = make(dim, dtype=BF16, **SOFTCAP)
    check_forward(hopper, case)
    made = hopper.library.tensor_maps_made()
    check_backward(hopper, case)  # by other kernels
    assert hopper.library.tensor_maps_made() == made


@pytest.mark.parametrize("step", [1, 2])
def test_masks_of_any_strides(hopper: Kernels, step: int) -> None:
    """Pairs of neighbours are read as one where they begin at an even place, and else one by one."""
    case = make(64, dtype=BF16, mask="bool", queries=20, keys=130, **ONE)
    memory = torch.ones(1, 1, 20, 130 * step + 3, dtype=torch.bool)
    mask = memory[..., 1 : 1 + 130 * step : step]
    mask.copy_(case.tensors["mask"])
    case.tensors["mask"] = mask
    check_forward(hopper, case)
    check_backward(hopper, case)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", ["bool", "storage"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_mask_bars_may_be_nan(hopper: Kernels, value: float, mask: str, dim: int) -> None:
    """A key that nobody sees, and a query that sees nothing."""
    case = make(dim, dtype=BF16, mask=mask, queries=70, keys=150, mask_size=(1, 1, 70, 150), **ONE)
    barred = False if mask == "bool" else -math.inf
    case.tensors["mask"][:, :, :, 5:8] = case.tensors["mask"][:, :, 9] = barred
    for name in ("key", "value"):
        case.tensors[name][:, :, 5:8] = value
    check_forward(hopper, case)
    wide = case.wide()  # zeros instead: a function of what is NaN has no derivative that is zero
    for name in ("query", "grad_out"):
        case.tensors[name][:, :, 9] = value
        wide[name][:, :, 9] = 0
    for name in ("key", "value"):
        wide[name][:, :, 5:8] = 0
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    found = case.backward(hopper, saved=case.forward(hopper), grad_mask=None)
    check(case, found, expected)
    assert all(g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lengths", [[(40, 50), (0, 9), (60, 70)], [(70, 130), (60, 0), (2, 5)]])
def test_what_lies_between_sequences_may_be_nan(hopper: Kernels, lengths: list[tuple[int, int]], dim: int) -> None:
    """Keys of a sequence without queries, and queries of one without keys."""
    case = make(dim, dtype=BF16, lengths=lengths, **ONE)
    wide = case.wide()
    (queries, keys), (more_queries, more_keys) = lengths[:2]  # of which one is none
    unseen = {name: slice(queries, queries + more_queries) for name in ("query", "grad_out")}
    unseen |= {name: slice(keys, keys + more_keys) for name in ("key", "value")}
    for name, positions in unseen.items():
        case.tensors[name][:, :, positions] = math.nan
        wide[name][:, :, positions] = 0
    out, lse = case.forward(hopper)
    expected_out, _ = case.attend(wide["query"], wide["key"], wide["value"], None)
    near(out, expected_out, BF16)
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    found = case.backward(hopper, saved=(out, lse))
    check(case, found, expected)
    assert all(g.isfinite().all() for g in found.values())


def test_nan_of_what_is_seen(hopper: Kernels) -> None:
    case = make(64, dtype=BF16, mask="bool", queries=20, keys=40)
    case.tensors["mask"].fill_(True)
    case.tensors["value"][0, 0, 3, 1] = math.nan
    out, lse = case.forward(hopper)
    assert out[0, 0, :, 1].isnan().all() and out.isnan().sum() == 20 and lse.isfinite().all()


@pytest.mark.parametrize("dim", [64, 128])
def test_a_mask_of_the_least_number_is_no_bar(hopper: Kernels, dim: int) -> None:
    case = make(dim, dtype=BF16, mask="storage", queries=20, keys=140, mask_size=(1, 1, 20, 140))
    case.tensors["mask"].zero_()
    case.tensors["mask"][:, :, 1:3, 9:] = torch.finfo(BF16).min
    case.tensors["mask"][:, :, 3] = torch.finfo(BF16).min  # alone: all keys count alike
    out, lse = case.forward(hopper)
    near(out[:, :, 3], case.wide()["value"].mean(2), BF16)
    grads = case.backward(hopper, saved=(out, lse), grad_mask=None)
    assert lse[:, :, 3].isfinite().all() and all(g.isfinite().all() for g in grads.values())
    case.tensors["mask"][:, :, 3] = 0
    check_forward(hopper, case)


def test_all_is_dropped(hopper: Kernels) -> None:
    case = make(64, dtype=BF16, dropout=1.0, queries=20, keys=40)
    out, lse = case.forward(hopper)
    assert (out == 0).all() and lse.isfinite().all()
    grads = case.backward(hopper, grad_lse=None)
    assert all((g == 0).all() for g in grads.values())


def test_repeats_bit_for_bit(hopper: Kernels) -> None:
    case = Attention(dtype=BF16, dim=128, value_dim=128, **OPTIONS["all"])
    first, second = case.forward(hopper), case.forward(hopper)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    grads, again = case.backward(hopper, grad_mask=None), case.backward(hopper, grad_mask=None)
    assert all(torch.equal(grads[name], again[name]) for name in grads)
