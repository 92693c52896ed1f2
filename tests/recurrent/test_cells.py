"""Values and derivatives of the LSTM and GRU steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lect11ext import functional, reference
from tests.helpers import ONE_STEP, assert_within_rule, flat, room, same_for_any_threads
from tests.helpers import check as check_rule

SHAPES = [(1, 1, 1), (2, 3, 5), (7, 16, 16), (1, 64, 64), (5, 33, 17), (13, 31, 130), (32, 70, 48), (100, 20, 65)]
EMPTY = [(0, 3, 4), (3, 0, 4), (2, 3, 0)]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm_cell", {}),
    "lstm-sigmoid": ("lstm_cell", {"candidate": "sigmoid"}),
    "gru": ("gru_cell", {}),
    "gru-reset-before": ("gru_cell", {"reset_after": False}),
}


def check(ours: Callable[..., Any], plain: Callable[..., Any], args: list[Any]) -> None:
    check_rule(ours, plain, args, ONE_STEP)


def cell(module: Any, variant: str, **extra: Any) -> Callable[..., Any]:
    """The step as a function of tensors alone: input, h, (c,) weights, biases."""
    name, options = VARIANTS[variant]
    function = getattr(module, name)
    if name == "gru_cell":
        return lambda *a: function(*a, **options, **extra)
    return lambda x, h, c, *weights: function(x, (h, c), *weights, **options, **extra)


def operands(
    variant: str, batch: int, inputs: int, hidden: int, dtype: torch.dtype, device: str | None = None, bias: bool = True
) -> list[Tensor]:
    gates = 4 if variant.startswith("lstm") else 3
    states = 2 if gates == 4 else 1
    shapes = [(batch, inputs)] + [(batch, hidden)] * states + [(gates * hidden, inputs), (gates * hidden, hidden)]
    shapes += [(gates * hidden,)] * 2 if bias else []
    return [(torch.randn(s) * 0.5).to(device, dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    check(cell(functional, variant), cell(reference, variant), operands(variant, *shape, dtype, device))


@pytest.mark.parametrize("variant", VARIANTS)
def test_wide_products(variant: str) -> None:
    """Where the backward's products take wide blocks: one block of rows, at least four of 256 columns."""
    for shape in [(32, 1040, 70), (17, 70, 1040), (100, 1100, 40)]:
        check(cell(functional, variant), cell(reference, variant), operands(variant, *shape, torch.float32))


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(list(VARIANTS)),
    batch=st.integers(0, 20),
    inputs=st.integers(0, 70),
    hidden=st.integers(0, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
)
def test_any_shape(
    variant: str, batch: int, inputs: int, hidden: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    args = operands(variant, batch, inputs, hidden, dtype, bias=bias)
    # oneDNN's bound for sums of this length: of some shapes plain PyTorch's error is zero by luck.
    slack = ONE_STEP * (4 * hidden).bit_length() if dtype.itemsize > 2 else ONE_STEP
    check_rule(cell(functional, variant), cell(reference, variant), args, slack)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [*range(1, 18), 31, 33, 64, 65, 127, 129, 257, 513])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_size(variant: str, hidden: int, dtype: torch.dtype, capability: str) -> None:
    # oneDNN's bound for sums of this length: plain PyTorch's error, small by luck on some, depends on the processor.
    slack = ONE_STEP * (8 * hidden).bit_length() if dtype.itemsize > 2 else ONE_STEP
    for batch in (*range(1, 10), 13, 31, 97):
        args = operands(variant, batch, hidden, hidden, dtype)
        check_rule(cell(functional, variant), cell(reference, variant), args, slack)


@pytest.mark.cpu  # of a GPU all memory is there that is asked for
def test_strides_beyond_32_bits() -> None:
    space = room(2**31 + 2**16, torch.bfloat16)
    args = [a.detach() for a in operands("lstm", 2, 5, 4, torch.bfloat16)]
    x = space.as_strided((2, 5), (2**31 + 11, 1)).copy_(args[0])
    weight = space.as_strided((16, 5), (2**27 + 3, 1), 64).copy_(args[3])
    far = functional.lstm_cell(x, (args[1], args[2]), weight, *args[4:])
    near = functional.lstm_cell(args[0], (args[1], args[2]), *args[3:])
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_capability(variant: str, dtype: torch.dtype, capability: str) -> None:
    for shape in [(1, 33, 17), (2, 5, 40), (9, 64, 33), (30, 100, 20)]:
        check(cell(functional, variant), cell(reference, variant), operands(variant, *shape, dtype))


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_biases(variant: str) -> None:
    args = operands(variant, 3, 5, 7, torch.float32, bias=False)
    check(cell(functional, variant), cell(reference, variant), args)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_bias_alone(variant: str) -> None:
    args = operands(variant, 3, 5, 7, torch.float32)
    for biases in ((args[-2], None), (None, args[-1])):
        check(cell(functional, variant), cell(reference, variant), [*args[:-2], *biases])


@pytest.mark.parametrize("variant", VARIANTS)
def test_strides(variant: str, dtype: torch.dtype) -> None:
    batch, inputs, hidden = 6, 19, 23
    args = [a.detach() for a in operands(variant, batch, inputs, hidden, dtype)]
    sequence = torch.randn(batch, 4, inputs).to(dtype)
    strided = [sequence[:, 2]]  # a step of a sequence
    for a in args[1:]:
        if a.dim() == 1:
            strided.append(torch.stack([a, a], 1)[:, 0])  # every other element
        elif a.size(0) == batch:
            strided.append(torch.cat([a[:, :1], a, a], 1)[:, 1 : 1 + hidden])  # offset by one, rows apart
        else:
            strided.append(a.t().contiguous().t())  # column-major
    strided = [s.requires_grad_() for s in strided]
    check(cell(functional, variant), cell(reference, variant), strided)
    expanded = [strided[0].detach()[:1].expand(batch, inputs), *args[1:]]
    check(cell(functional, variant), cell(reference, variant), expanded)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 300, 257), (40, 256, 130)], ids=str)
def test_threads_and_repeats_give_the_same_bits(variant: str, shape: tuple[int, int, int]) -> None:
    args = operands(variant, *shape, torch.float32)

    def results() -> Sequence[Tensor]:
        outs = flat(cell(functional, variant)(*args))
        return [*outs, *torch.autograd.grad(outs, args, [torch.ones_like(o) for o in outs])]

    same_for_any_threads(results)


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_chain(variant: str) -> None:
    """Fifty steps: oneDNN's bound, 4 · ceil(log2(length of the sum · steps)) · eps."""
    steps, inputs, hidden = 50, 24, 32
    args = [a.detach() for a in operands(variant, 4, inputs, hidden, torch.float32)]
    states = 2 if variant.startswith("lstm") else 1
    results = []
    for module, weights in ((functional, args), (reference, [a.double() for a in args])):
        state = weights[1 : 1 + states]
        for _ in range(steps):
            state = flat(cell(module, variant)(weights[0], *state, *weights[1 + states :]))
        results.append(state[0].double())
    bound = 4 * torch.tensor((inputs + hidden) * steps).log2().ceil() * torch.finfo(torch.float32).eps
    assert (results[0] - results[1]).abs().max() <= bound


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_every_order(variant: str, device: str) -> None:
    args = operands(variant, 2, 3, 3, torch.float64, device)
    step = cell(functional, variant, grad_clip=100.0)
    assert torch.autograd.gradcheck(step, args, check_forward_ad=True, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(step, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_subsets_of_inputs_that_require_grad(variant: str) -> None:
    args = operands(variant, 3, 4, 5, torch.float32)
    for i in range(len(args)):
        some = [a.detach().requires_grad_(i == j) for j, a in enumerate(args)]
        check(cell(functional, variant), cell(reference, variant), some)


def test_undefined_gradients_of_the_lstm() -> None:
    args = operands("lstm", 3, 4, 5, torch.float32)
    for which in (0, 1):
        check(
            lambda *a, w=which: cell(functional, "lstm")(*a)[w],
            lambda *a, w=which: cell(reference, "lstm")(*a)[w],
            args,
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_grad_clip(variant: str) -> None:
    args = operands(variant, 3, 4, 5, torch.float64)
    ours, plain = cell(functional, variant, grad_clip=0.3), cell(reference, variant, grad_clip=0.3)
    check(ours, plain, args)  # cotangents beyond 0.3 among them

    def second(step: Callable[..., Any]) -> list[Tensor]:
        grads = torch.autograd.grad([(o**3).sum() for o in flat(step(*args))], args, create_graph=True)
        return list(torch.autograd.grad(sum((g**2).sum() for g in grads), args))

    for a, b in zip(second(ours), second(plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_and_saturation_stay_in_their_row(variant: str) -> None:
    args = [a.detach() for a in operands(variant, 4, 5, 6, torch.float32)]
    args[0][1] = float("nan")
    args[0][2] = 1e30
    outs = flat(cell(functional, variant)(*args))
    for out in outs:
        assert out[1].isnan().all() and out[0].isfinite().all() and out[2:].isfinite().all()


@pytest.mark.parametrize("variant", ["lstm", "gru"])
def test_against_torch_nn(variant: str, dtype: torch.dtype) -> None:
    args = [a.detach() for a in operands(variant, 5, 9, 11, dtype)]
    if variant == "lstm":
        torchs = flat(torch.lstm_cell(args[0], args[1:3], *args[3:]))
    else:
        torchs = flat(torch.gru_cell(*args))
    exact = flat(cell(reference, variant)(*[a.double() for a in args]))
    for got, plain, wide in zip(flat(cell(functional, variant)(*args)), torchs, exact, strict=True):
        assert_within_rule(got, plain, wide, ONE_STEP)


def test_in_place_change_of_a_saved_input_is_noticed() -> None:
    args = operands("lstm", 2, 3, 4, torch.float32)
    h, _ = cell(functional, "lstm")(*args)
    with torch.no_grad():
        args[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_same_tensor_for_two_arguments() -> None:
    w = torch.randn(16, 4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    check(lambda x, w: functional.lstm_cell(x, (x, x), w, w), lambda x, w: reference.lstm_cell(x, (x, x), w, w), [x, w])
