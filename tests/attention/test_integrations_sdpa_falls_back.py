"""Under torch's function: what torch takes and ours refuses is torch's, and so are errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests.attention.test_integrations_sdpa import inputs, ours_in, sdpa

MASK = torch.randn(5, 7)


def operands(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 3, n, 8).to(dtype) for n in (5, 7, 7)]


def both(call: Callable[[], Any]) -> tuple[Any, Any, int]:
    """What a call gives or raises under torch's function and under ours, and how often our op ran."""

    def caught() -> Any:
        torch.manual_seed(2)
        try:
            return call()
        except Exception as error:
            return type(error), re.sub(r" \(position \d\)", "", str(error))  # how it was given, we do not know

    expected = caught()
    with sdpa():
        count = ours_in(caught)
        return caught(), expected, count


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {"attn_mask": MASK}),
        (torch.float32, {"scale": torch.tensor(0.3)}),
        (torch.float32, {"scale": True}),
        (torch.float32, {"scale": float("nan")}),
        (torch.float32, {"dropout_p": False}),
        (torch.float32, {"dropout_p": torch.tensor(0.0)}),
        (torch.float32, {"dropout_p": torch.tensor(0.5)}),
    ],
)
def test_what_torch_takes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    args = operands(dtype)
    got, expected, count = both(lambda: F.scaled_dot_product_attention(*args, **options))
    assert count == 0
    torch.testing.assert_close(got, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": "0.3"},
        {"scale": 10**400},
        pytest.param({"dropout_p": 2.0}, marks=pytest.mark.cpu),  # torch's kernels for a GPU take it
        {"dropout_p": None},
        {"is_causal": 1},
        {"enable_gqa": 1},
        # A GPU's kernels of torch do not look at a bias's size.
        pytest.param({"attn_mask": causal_lower_right(4, 7)}, marks=pytest.mark.cpu),
        pytest.param({"attn_mask": causal_lower_right(5, 8)}, marks=pytest.mark.cpu),
        {"attn_mask": causal_lower_right(5, 7), "is_causal": True},
        {"attn_mask": causal_upper_left(5, 7), "is_causal": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_torch_refuses(options: dict[str, Any]) -> None:
    args = operands()
    got, expected, _ = both(lambda: F.scaled_dot_product_attention(*args, **options))
    assert isinstance(expected, tuple) and got == expected


@pytest.mark.parametrize(
    "bias", [causal_lower_right(5, 5), causal_lower_right(5, 7), causal_upper_left(3, 4)], ids=["square", "its", "no"]
)
@pytest.mark.parametrize("ours", [True, False])
def test_biases_that_torch_takes(bias: Tensor, ours: bool) -> None:
    """A square bias from the lower right, and all from the upper left, are is_causal to torch, whatever their size."""
    args = operands()
    scale: Any = 0.3 if ours else torch.tensor(0.3)
    got, expected, count = both(lambda: F.scaled_dot_product_attention(*args, bias, scale=scale))
    assert count == ours
    torch.testing.assert_close(got, expected)


def test_leaving_what_was_not_entered() -> None:
    args = inputs(1, 2, 3, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must be entered before it is left, but none is open"):
            sdpa().__exit__(None, None, None)
    with sdpa():
        assert ours_in(lambda: F.scaled_dot_product_attention(*args)) == 1
    assert ours_in(lambda: F.scaled_dot_product_attention(*args)) == 0
