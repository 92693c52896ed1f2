"""Layers: the recurrence over all steps, in one direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import reference
from tests.conftest import DTYPES
from tests.helpers import (
    ONE_STEP,
    assert_within_rule,
    chain,
    check,
    flat,
    gradcheck,
    gradgradcheck,
    nearly,
    same_for_any_threads,
    same_products,
)

KINDS = ["lstm", "gru"]
SHAPES = [(1, 1, 2, 3), (2, 3, 1, 1), (5, 3, 4, 7), (4, 1, 9, 33), (3, 9, 17, 64), (6, 2, 3, 130), (2, 40, 5, 17)]
EMPTY = [(0, 3, 4, 5), (3, 0, 4, 5), (3, 2, 0, 5), (3, 2, 4, 0)]


def ours(kind: str, **options: Any) -> Callable[..., Any]:
    """The op as a function of tensors alone: input, h, (c,) weights, biases."""
    op = getattr(torch.ops.lect11ext, f"{kind}_layer")
    return lambda *args: op(*args, **options)[: 3 if kind == "lstm" else 2]


def plain(kind: str, **options: Any) -> Callable[..., Any]:
    if kind == "gru":
        return lambda *args: reference.gru_layer(*args, **options)

    def lstm(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        output, state = reference.lstm_layer(x, (h, c), *weights, **options)
        return output, *state

    return lstm


def operands(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, grad: bool = False) -> list[Tensor]:
    steps, batch, inputs, hidden = shape
    gates, states = (4, 2) if kind == "lstm" else (3, 1)
    sizes = [(steps, batch, inputs)] + [(batch, hidden)] * states
    sizes += [(gates * hidden, inputs), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,)]
    return [(torch.randn(s) * 0.4).to(dtype).requires_grad_(grad) for s in sizes]


def variants(steps: int, batch: int) -> list[dict[str, Any]]:
    lengths = torch.randint(0, steps + 1, (batch,))
    reset = torch.rand(steps, batch) < 0.3
    masks: list[dict[str, Any]] = [{}, {"lengths": lengths}, {"reset": reset}, {"lengths": lengths, "reset": reset}]
    return [{**m, "reverse": reverse} for m in masks for reverse in (False, True)]


def clipped(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "grad_clip": 0.3}


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    args = operands(kind, shape, dtype, grad=shape[0] > 0)
    for options in variants(*shape[:2]):
        for choice in (options, clipped(options)):
            check(ours(kind, **choice), plain(kind, **choice), args, chain(shape[0], dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_every_capability(kind: str, capability: str) -> None:
    for dtype in DTYPES:
        for shape in [(3, 2, 5, 40), (2, 9, 33, 17), (9, 8, 5, 33)]:
            args = operands(kind, shape, dtype, grad=True)
            for options in variants(*shape[:2]):
                check(ours(kind, **options), plain(kind, **options), args, chain(shape[0], dtype))


# More than one call's rows. Of bfloat16, gradients of sums are then kept in it, where their columns are even.
FOR_THE_BLAS = [
    (torch.bfloat16, (8, 33, 48, 128)),
    (torch.bfloat16, (8, 33, 48, 131)),
    (torch.bfloat16, (3, 97, 53, 130)),
    (torch.float32, (8, 220, 48, 160)),
]


@pytest.mark.parametrize(("dtype", "shape"), FOR_THE_BLAS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_large_enough_for_the_blas(kind: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    args = operands(kind, shape, dtype, grad=True)
    slack = ONE_STEP * shape[0] if dtype == torch.bfloat16 else chain(shape[0], dtype)
    for options in variants(*shape[:2]) if dtype == torch.bfloat16 else [{}]:
        for choice in (options, clipped(options)):
            check(ours(kind, **choice), plain(kind, **choice), args, slack)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_order(kind: str) -> None:
    args = operands(kind, (3, 2, 2, 3), torch.float64, grad=True)
    for options in variants(3, 2):
        assert gradcheck(ours(kind, **options), args, check_forward_ad=True)
        assert gradgradcheck(ours(kind, **options), args, check_fwd_over_rev=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_and_cells_are_differentiable_outputs(kind: str) -> None:
    args = operands(kind, (3, 2, 2, 3), torch.float64, grad=True)
    op = getattr(torch.ops.lect11ext, f"{kind}_layer")
    for options in variants(3, 2):
        for batch_first in (False, True):
            turned = [args[0].transpose(0, 1), *args[1:]] if batch_first else args
            choice = {**options, "batch_first": batch_first}
            if batch_first and "reset" in choice:
                choice["reset"] = choice["reset"].t()

            def saved(*args: Tensor, choice: dict[str, Any] = choice) -> tuple[Tensor, ...]:
                return tuple(out for out in op(*args, **choice, save=True) if out is not None)

            assert gradcheck(saved, turned, check_forward_ad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_hand_the_state_on(kind: str) -> None:
    args = operands(kind, (0, 2, 3, 4), torch.float32, grad=True)
    output, *states = ours(kind)(*args)
    assert output.shape == (0, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(states, args[1:], strict=False))
    grads = torch.autograd.grad(sum(s.sum() for s in states), args)
    for i, grad in enumerate(grads):
        assert torch.equal(grad, (torch.ones_like if 0 < i <= len(states) else torch.zeros_like)(args[i]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_against_torch_nn(kind: str, bias: bool) -> None:
    steps, batch, inputs, hidden = 11, 5, 9, 48
    module = getattr(torch.nn, kind.upper())(inputs, hidden, bias=bias)
    x, h, c = torch.randn(steps, batch, inputs), torch.randn(1, batch, hidden), torch.randn(1, batch, hidden)
    weights = [*module.all_weights[0], None, None][:4]
    with torch.no_grad():
        output, state = module(x, (h, c) if kind == "lstm" else h)
        states = [h[0], c[0]] if kind == "lstm" else [h[0]]
        got = ours(kind)(x, *states, *weights)
        exact = plain(kind)(*[None if a is None else a.double() for a in (x, *states, *weights)])
    for a, b, wide in zip(got, [output, *(s[0] for s in flat(state))], exact, strict=True):
        assert_within_rule(a, b, wide, ONE_STEP)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: str) -> None:
    """Inputs and weights of any strides, batch first, with gradients: the same bits as for dense ones."""
    args = operands(kind, (20, 4, 8, 32), torch.float32)
    states = 2 if kind == "lstm" else 1
    expected = grads(ours(kind), args)
    wide = torch.randn(20, 4, 16)[..., ::2].copy_(args[0])
    swapped = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    weights = [torch.cat([w, w], 1)[:, : w.size(1)] for w in args[1 + states : 3 + states]]
    tall = [w.t().contiguous().t() for w in args[1 + states : 3 + states]]
    for other in (
        [wide, *args[1:]],
        [swapped, *args[1:]],
        [*args[: 1 + states], *weights, *args[3 + states :]],
        [*args[: 1 + states], *tall, *args[3 + states :]],
    ):
        assert all(same_products(a, b) for a, b in zip(grads(ours(kind), other), expected, strict=True))
    got = grads(ours(kind, batch_first=True), [args[0].transpose(0, 1), *args[1:]])
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        turned = a.transpose(0, 1) if i in (0, 1 + states) else a
        assert nearly(turned, b)  # the sums over all steps have another order


def grads(function: Callable[..., Any], args: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of a fixed loss."""
    leaves = [a.detach().as_strided(a.shape, a.stride(), a.storage_offset()).requires_grad_() for a in args]
    outputs = function(*leaves)
    return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)]


@pytest.mark.parametrize(
    "kept, shape",
    [
        (torch.float32, (23, 3, 64, 256)),
        (torch.float32, (64, 12, 64, 256)),  # products may be the BLAS's
        (torch.bfloat16, (23, 3, 64, 256)),  # the same
        (torch.float32, (9, 50, 33, 97)),  # in two parts
        (torch.bfloat16, (9, 50, 33, 97)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_for_any_number_of_threads(kind: str, kept: torch.dtype, shape: tuple[int, ...]) -> None:
    args = operands(kind, shape, kept)
    same_for_any_threads(lambda: grads(ours(kind), args), (1, 2, 3, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    op = getattr(torch.ops.lect11ext, f"{kind}_layer").default
    for grad in (False, True):
        args = operands(kind, (3, 2, 4, 5), torch.float32, grad)
        options = {"lengths": torch.tensor([3, 1]), "reset": torch.rand(3, 2) < 0.5}
        for save in (False, True):
            torch.library.opcheck(op, tuple(args), {**options, "save": save})


def test_a_long_sequence_does_not_drift() -> None:
    args = operands("lstm", (10_000, 1, 3, 20), torch.float32)
    exact = plain("lstm")(*[a.double() for a in args])
    for a, b in zip(ours("lstm")(*args), exact, strict=True):
        assert (a.double() - b).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(3, 4)}, ValueError, "input must be 3-D, but got 2-D"),
        ({1: torch.zeros(3, 5)}, ValueError, r"h must have shape \[2, 5\]"),
        ({2: torch.zeros(2, 6)}, ValueError, r"c must have shape \[2, 5\]"),
        ({2: torch.zeros(2, 5).double()}, TypeError, "c must have the type of input"),
        ({3: torch.zeros(20, 3)}, ValueError, "input must have input_size columns, as weight_ih has: 3, but got 4"),
        ({4: torch.zeros(20, 4)}, ValueError, r"weight_hh must have shape \[20, 5\]"),
        ({5: torch.zeros(19)}, ValueError, r"bias_ih must have shape \[20\]"),
        ({1: torch.tensor(1.0), 7: torch.zeros(5, 5)}, ValueError, "h must be 2-D, but got 0-D"),
        ({7: torch.zeros(4, 5)}, ValueError, r"weight_hr must have shape \[5, 5\]"),
        ({11: torch.tensor([1, 2, 3])}, ValueError, r"lengths must have shape \[2\]"),
        ({11: torch.tensor([1.0, 2.0])}, TypeError, "lengths must be int64"),
        ({12: torch.zeros(2, 3, dtype=torch.bool)}, ValueError, r"reset must have shape \[3, 2\]"),
        ({12: torch.zeros(3, 2)}, TypeError, "reset must be bool"),
        ({15: "relu"}, ValueError, "candidate must be 'tanh' or 'sigmoid', but got 'relu'"),
        ({18: -1.0}, ValueError, "grad_clip must be nonnegative, but got -1"),
    ],
)
def test_errors_name_the_argument(change: dict[int, Any], error: type[Exception], message: str) -> None:
    args: list[Any] = [*operands("lstm", (3, 2, 4, 5), torch.float32), *[None] * 8, "tanh", 0.0, 0.0, None]
    for position, value in change.items():
        args[position] = value
    with pytest.raises(error, match=message):
        torch.ops.lect11ext.lstm_layer(*args)
