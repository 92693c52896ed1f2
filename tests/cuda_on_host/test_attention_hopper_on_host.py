"""Dot-product attention: the kernels of sm_90a, emulated with TMA and wgmma, against plain PyTorch in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from attention_case import Attention
from cell_operands import BF16, F16, F32
from host_kernels import Kernels
from test_attention_derivatives_on_host import check
from test_attention_on_host import CAUSAL, check_forward, whole_numbers

ONE = {"heads": 1, "kv_heads": 1}
# More than the sixteen queries up to which keys are cut instead. Tiles are of 128 or 192 queries and 128 keys.
SIZES: dict[str, dict[str, Any]] = {
    "plain": {"queries": 100, "keys": 300, **ONE},
    "one key": {"queries": 17, "keys": 1},
    "fewer keys than a tile": {"queries": 129, "keys": 17},
    "a key beyond a tile": {"queries": 65, "keys": 129},
    "many tiles": {"queries": 40, "keys": 800, **ONE},
    "many tiles, and others behind them": {"queries": 180, "keys": 390, "heads": 4, "kv_heads": 4},
    "groups": {"queries": 40, "keys": 130, "heads": 4, "kv_heads": 2, "batch": 2},
    "causal": {"queries": 300, "keys": 300, "window": CAUSAL, **ONE},
    "causal, groups": {"queries": 260, "keys": 260, "window": CAUSAL, "heads": 4, "kv_heads": 2},
    "causal at the bottom": {"queries": 100, "keys": 330, "window": CAUSAL, "bottom_right": True, **ONE},
    "causal, more queries": {"queries": 300, "keys": 127, "window": CAUSAL, "bottom_right": True, **ONE},
    "causal, more keys": {"queries": 20, "keys": 200, "window": CAUSAL},
    "window": {"queries": 290, "keys": 310, "window": (70, 20), **ONE},
    "window behind": {"queries": 150, "keys": 260, "window": (200, -30), **ONE},
    "window ahead": {"queries": 150, "keys": 310, "window": (-3, 150), **ONE},
    "large": {"queries": 70, "keys": 200, "spread": 6.0, "scale": 1.0, **ONE},
}


def every_type(names: Iterable[str], of_float16: tuple[str, ...]) -> list[tuple[str, int, torch.dtype]]:
    """Name, columns and type; of float16 some: it is another instruction, and no other logic."""
    return [
        (name, dim, dtype)
        for name in names
        for dim in (64, 128)
        for dtype in (BF16, F16)
        if dtype == BF16 or name in of_float16
    ]


CASES = every_type(SIZES, ("plain", "groups", "causal", "window"))


@pytest.fixture
def right_device(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LECT11EXT_ATTENTION_HOPPER", raising=False)
    kernels.library.set_device(2, 227 * 1024, 9)  # blocks of the forward, which take all the tiles
    yield
    kernels.library.set_device(1, 227 * 1024, 8)


@pytest.fixture
def hopper(kernels: Kernels, right_device: None) -> Iterator[Kernels]:
    made = kernels.library.tensor_maps_made()
    yield kernels
    assert kernels.library.tensor_maps_made() > made, "other kernels were taken"


def make(dim: int, **fields: Any) -> Attention:
    return Attention(dim=dim, value_dim=dim, **fields)


@pytest.mark.parametrize(("name", "dim", "dtype"), CASES)
def test_forward(hopper: Kernels, name: str, dim: int, dtype: torch.dtype) -> None:
    check_forward(hopper, make(dim, dtype=dtype, **SIZES[name]))


def check_backward(kernels: Kernels, case: Attention, **fields: Any) -> None:
    wide = case.wide()
    grads = (None if name in fields else wide[name] for name in ("grad_out", "grad_lse"))
    expected = case.gradients(*grads)(*(wide[name] for name in case.inputs()))
    found = case.backward(kernels, **fields)
    check(case, found, expected)
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize(("name", "dim", "dtype"), CASES)
def test_backward(hopper: Kernels, name: str, dim: int, dtype: torch.dtype) -> None:
    check_backward(hopper, make(dim, dtype=dtype, **SIZES[name]))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("size", [1.0, 2.0**8, 2.0**14, 2.0**40])
def test_huge_scores(hopper: Kernels, size: float, dim: int) -> None:
    """Whole numbers, so that the scores are exact, and far apart."""
    case = make(dim, dtype=BF16, queries=33, keys=300, scale=1.0)
    for same_sign in (False, True):
        query, key = whole_numbers(1, 2, 33, dim), whole_numbers(1, 2, 300, dim)
        query, key = (query.abs(), key.abs()) if same_sign else (query, key)
        case.tensors |= {"query": case.spaced((query * size).to(BF16)), "key": case.spaced(key.to(BF16))}
        check_forward(hopper, case)
        grads = case.backward(hopper, saved=case.forward(hopper))
        assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("size", [1e2, 1e6, 1e12])
def test_the_backward_makes_the_weights_that_the_forward_had(
    hopper: Kernels, size: float, alibi: bool, dim: int
) -> None:
    """However large scores are, and though they are rounded: those of a query sum to one."""
    case = make(dim, dtype=BF16, queries=40, keys=250, alibi=alibi, **ONE)
    case.tensors["key"] *= size
    case.tensors["grad_out"].fill_(1.0)
    grads = case.backward(hopper, saved=case.forward(hopper))
    assert all(g.isfinite().all() for g in grads.values())
    total = grads["value"][0, 0].double().sum(0)
    torch.testing.assert_close(total, torch.full_like(total, case.queries), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dim", [64, 128])
def test_a_maximum_that_stays_changes_nothing(hopper: Kernels, dim: int) -> None:
    """All keys weigh alike, those of the first tile and of the last, though a product of the score is rounded."""
    case = make(dim, dtype=BF16, queries=20, keys=30 * 128, scale=0.3003, **ONE)
    case.tensors["query"].fill_(1.0)
    case.tensors["key"].fill_(17.0)
    case.tensors["value"].fill_(1.0)
    case.tensors["value"][:, :, 15 * 128 :] = -1.0
    assert case.forward(hopper)[0].abs().max() < 1e-6


@pytest.mark.parametrize("missing", ["grad_lse", "grad_query", "grad_key", "grad_value"])
def test_what_is_not_given_or_asked_for(hopper: Kernels, missing: str) -> None:
    check_backward(hopper, make(64, dtype=BF16, queries=70, keys=40), **{missing: None})


@pytest.mark.parametrize("dim", [64, 128])
def test_layouts(hopper: Kernels, dim: int) -> None:
    case = make(dim, dtype=BF16, queries=20, keys=30, batch=2)
    for name, layout in (("query", (0, 1, 2, 3)), ("key", (1, 2, 0, 3)), ("value", (2, 0, 1, 3))):
        back = tuple(layout.index(d) for d in range(4))
        case.tensors[name] = case.tensors[name].permute(layout).contiguous().permute(back)
    check_forward(hopper, case)
    check_backward(hopper, case)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", ["first and last", "last"])
def test_what_nobody_sees_may_be_nan(hopper: Kernels, name: str, dim: int) -> None:
    if name == "last":
        case = make(dim, dtype=BF16, queries=20, keys=150, window=(30, 3), **ONE)
        first, last = 0, 23
    else:
        case = make(dim, dtype=BF16, queries=30, keys=300, window=(10, -9), bottom_right=True, **ONE)
        first, last = 260, 291
    for kind in ("key", "value"):
        case.tensors[kind][:, :, :first] = case.tensors[kind][:, :, last : last + 5] = math.inf
        case.tensors[kind][:, :, last + 5 :] = math.nan
    check_forward(hopper, case)
    check_backward(hopper, case)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bottom_right", [True, False])
def test_what_sees_nothing_may_be_nan(hopper: Kernels, bottom_right: bool, dim: int) -> None:
    # Of 150 queries the first 110, or those from the fiftieth on.
    case = make(dim, dtype=BF16, queries=150, keys=40, window=(10, 0), bottom_right=bottom_right, **ONE)
    blind = slice(0, 110) if bottom_right else slice(50, 150)
    wide = case.wide()  # zeros instead: a function of what is NaN has no derivative that is zero
    for kind in ("query", "grad_out"):
        case.tensors[kind][:, :, blind] = math.nan
        wide[kind][:, :, blind] = 0
    out, lse = case.forward(hopper)
    assert (out[:, :, blind] == 0).all() and (lse[:, :, blind] == -math.inf).all() and not out.isnan().any()
    expected = case.gradients(wide["grad_out"], wide["grad_lse"])(*(wide[n] for n in case.inputs()))
    check(case, case.backward(hopper), expected)


@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (72, 72), (96, 96), (120, 120), (64, 128), (128, 32), (16, 104)])
def test_columns_that_do_not_fill_a_tile(hopper: Kernels, dims: tuple[int, int]) -> None:
    sizes = {"queries": 150, "keys": 140, "window": CAUSAL, "heads": 2, "kv_heads": 1}
    case = Attention(dtype=BF16, dim=dims[0], value_dim=dims[1], **sizes)
    check_forward(hopper, case)
    check_backward(hopper, case)


def test_nan_of_what_is_seen(hopper: Kernels) -> None:
    case = make(64, dtype=BF16, queries=20, keys=40)
    case.tensors["query"][0, 0, 2, 1] = math.nan
    out, lse = case.forward(hopper)
    assert out[0, 0, 2].isnan().all() and lse[0, 0, 2].isnan()
    assert out.isnan().sum() == 64 and lse.isnan().sum() == 1


def test_repeats_bit_for_bit(hopper: Kernels) -> None:
    case = make(128, dtype=BF16, queries=200, keys=300, window=(150, 30), **ONE)
    first, second = case.forward(hopper), case.forward(hopper)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    grads, again = case.backward(hopper), case.backward(hopper)
    assert all(torch.equal(grads[name], again[name]) for name in grads)


OTHERS: dict[str, dict[str, Any]] = {
    "few queries": {"queries": 16},
    "float32": {"dtype": F32},
    "columns that are not sixteen bytes": {"dim": 68},
    "more columns": {"dim": 136, "value_dim": 136},
    "few queries in each sequence": {"lengths": [(20, 30), (5, 9)]},
    "not aligned": {"aligned": False},
    "a window without keys": {"window": (3, -5)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_take_the_rest(kernels: Kernels, right_device: None, name: str) -> None:
    made = kernels.library.tensor_maps_made()
    fields = {"dtype": BF16, "dim": 64, "value_dim": 64, "queries": 20, **OTHERS[name]}
    check_forward(kernels, Attention(**fields))
    assert kernels.library.tensor_maps_made() == made


@pytest.mark.parametrize("missing", ["the leave", "the device", "strides"])
def test_where_they_are_not_taken(
    kernels: Kernels, right_device: None, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    made = kernels.library.tensor_maps_made()
    case = make(64, dtype=BF16, queries=20, batch=2)
    if missing == "the leave":
        monkeypatch.setenv("LECT11EXT_ATTENTION_HOPPER", "0")
    elif missing == "the device":
        kernels.library.set_device(1, 227 * 1024, 10)
    else:
        case.tensors["query"] = case.tensors["query"][:1].expand(2, -1, -1, -1)
    check_forward(kernels, case)
    assert kernels.library.tensor_maps_made() == made
