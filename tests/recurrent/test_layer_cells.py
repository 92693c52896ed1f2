"""c at every step: ``return_cells`` of functional.lstm and nn.LSTM."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lect11ext import functional, nn, reference
from tests.helpers import Tagged, chain, check, gradcheck, gradgradcheck
from tests.recurrent.test_layers import operands, variants

T, B, F, H = 6, 3, 4, 5
PROJECTED = pytest.mark.parametrize("proj_size", [0, 3], ids=["whole", "projected"])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "recompute": 2},
    {"layer_norm": True, "peephole": True, "zoneout": (0.2, 0.1)},
    {"candidate": "sigmoid", "truncate": 2, "recompute": 3},
]


def build(**options: Any) -> Any:
    return nn.LSTM(F, H, dtype=torch.float64, **options).eval()


def inputs(batch_first: bool = False) -> Tensor:
    return torch.randn((B, T, F) if batch_first else (T, B, F), dtype=torch.float64, requires_grad=True)


def where_sequences_end(layer: Any, x: Tensor) -> Tensor:
    """c at every step, as the last state of the sequence that ends there: the reverse direction's begins there."""
    if not layer.bidirectional:
        return torch.stack([layer(x[: t + 1])[1][1][-1] for t in range(T)])
    # Of the last layer alone, over what the layers below it give for all steps.
    weights = layer.all_weights

    def states(entries: int) -> tuple[Tensor, Tensor]:
        return x.new_zeros(entries, B, layer.proj_size or H), x.new_zeros(entries, B, H)

    below, _ = functional.lstm(x, states(len(weights) - 2), weights[:-2], bidirectional=True)
    forward = [functional.lstm(below[: t + 1], states(1), weights[-2:-1])[1][1][0] for t in range(T)]
    reverse = [functional.lstm(below[t:].flip(0), states(1), weights[-1:])[1][1][0] for t in range(T)]
    return torch.cat([torch.stack(forward), torch.stack(reverse)], -1)


@PROJECTED
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cells_are_the_states_of_sequences_that_end(options: dict[str, Any], proj_size: int) -> None:
    layer, x = build(proj_size=proj_size, **options), inputs()
    output, (h, c), cells = layer(x, return_cells=True)
    expected = where_sequences_end(layer, x)
    torch.testing.assert_close(cells, expected)
    torch.testing.assert_close((output, (h, c)), layer(x))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, return_cells=True)[2], expected)
    assert torch.equal(cells[-1, :, :H], c[-2 if layer.bidirectional else -1])
    wanted = [x, *layer.parameters()]
    if options.get("truncate"):  # a sequence that ends earlier is cut at the same steps
        return
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), wanted) for o in (cells, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (5, 3, 4, 7), (3, 9, 17, 64), (2, 40, 5, 17), (3, 0, 4, 5)], ids=str)
def test_values(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Of one layer and direction, with all gradients, by the rule."""
    args = operands("lstm", shape, dtype, grad=True)

    def ours(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor, **options: Any) -> tuple[Tensor, ...]:
        turned = options.pop("reverse")
        both = [weights, weights] if turned else [weights]  # the reverse direction is the second one
        states = (torch.stack([s] * len(both)) for s in (h, c))
        output, state, cells = functional.lstm(
            x, tuple(states), both, bidirectional=turned, return_cells=True, **options
        )
        return output[..., -shape[3] :], *(s[-1] for s in state), cells[..., -shape[3] :]

    def plain(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor, **options: Any) -> tuple[Tensor, ...]:
        output, state, cells = reference.lstm_layer(x, (h, c), *weights, return_cells=True, **options)
        return output, *state, cells

    for options in variants(*shape[:2]):
        check(*(lambda *args, f=f, o=options: f(*args, **o) for f in (ours, plain)), args, chain(shape[0], dtype))


@PROJECTED
def test_gradients_of_every_order(proj_size: int) -> None:
    layer = nn.LSTM(2, 3, proj_size=min(proj_size, 2), dtype=torch.float64)
    weights = [w.detach().requires_grad_() for w in layer.parameters()]
    x, h, c = (torch.randn(s, dtype=torch.float64).requires_grad_()
               for s in ((3, 2, 2), (1, 2, layer.proj_size or 3), (1, 2, 3)))  # fmt: skip
    lengths = torch.tensor([3, 1])

    def cells(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Tensor:
        return functional.lstm(x, (h, c), [weights], lengths=lengths, recompute=2, return_cells=True)[2]

    assert gradcheck(cells, (x, h, c, *weights), check_forward_ad=True)
    assert gradgradcheck(cells, (x, h, c, *weights), check_fwd_over_rev=True)


@PROJECTED
@pytest.mark.parametrize("batch_first", [False, True])
def test_forms_of_the_input(batch_first: bool, proj_size: int) -> None:
    """Padded, packed and unbatched rows have the same cells, in the output's form, and zeros where there is no step."""
    layer = build(num_layers=2, bidirectional=True, batch_first=batch_first, proj_size=proj_size)
    x, lengths = inputs(batch_first), torch.tensor([2, 6, 3])
    _, _, cells = layer(x, lengths=lengths, return_cells=True)
    by_row = cells if batch_first else cells.transpose(0, 1)
    assert by_row.shape == (B, T, 2 * H)
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first, enforce_sorted=False)
    output, _, packed_cells = layer(packed, return_cells=True)
    assert isinstance(packed_cells, PackedSequence)
    for a, b in zip(packed_cells[1:], output[1:], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(pad_packed_sequence(packed_cells, batch_first)[0], cells)
    for row, length in enumerate(lengths):
        assert not by_row[row, length:].any() and by_row[row, :length].all()
        own = x[row, :length] if batch_first else x[:length, row]
        torch.testing.assert_close(layer(own, return_cells=True)[2], by_row[row, :length])


@PROJECTED
def test_no_steps(proj_size: int) -> None:
    layer = build(proj_size=proj_size)
    output, _, cells = layer(torch.zeros(0, B, F, dtype=torch.float64), return_cells=True)
    assert output.shape == (0, B, proj_size or H) and cells.shape == (0, B, H)


def test_a_reset_clears_the_cell() -> None:
    layer, x, reset = build(), inputs(), torch.zeros(T, B, dtype=torch.bool)
    reset[3, 1] = True
    cells = layer(x, reset=reset, return_cells=True)[2]
    torch.testing.assert_close(cells[3:, 1], layer(x[3:, 1], return_cells=True)[2])


@PROJECTED
def test_transforms(proj_size: int) -> None:
    layer = build(num_layers=2, proj_size=proj_size)
    xs = torch.randn(4, T, B, F, dtype=torch.float64)

    def cells(x: Tensor) -> Tensor:
        return layer(x, return_cells=True)[2]

    torch.testing.assert_close(vmap(cells)(xs), torch.stack([cells(x) for x in xs]))
    _, tangent = jvp(cells, (xs[0],), (xs[1],))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (cells(xs[0] + step * xs[1]) - cells(xs[0] - step * xs[1])) / (2 * step), rtol=1e-6, atol=1e-8
    )  # central differences: step² and eps / step
    weights = {name: w.detach() for name, w in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x,), {"return_cells": True})[2].square().sum()

    each = vmap(grad(loss), (None, 0))(weights, xs)
    for i in range(4):
        torch.testing.assert_close({name: g[i] for name, g in each.items()}, grad(loss)(weights, xs[i]))


@PROJECTED
def test_compile_and_export(proj_size: int) -> None:
    torch._dynamo.reset()
    layer, x = build(num_layers=2, bidirectional=True, recompute=2, proj_size=proj_size), inputs()
    expected = layer(x, return_cells=True)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, return_cells=True)
    torch.testing.assert_close(got, expected)
    wanted = [x, *layer.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(outs[2].square().sum(), wanted) for outs in (got, expected)))
    exported = torch.export.export(layer, (x.detach(),), {"return_cells": True})
    torch.testing.assert_close(exported.module()(x, return_cells=True), expected)


def test_subclasses_and_autocast() -> None:
    layer, x = nn.LSTM(F, H), torch.randn(T, B, F)
    assert type(layer(x.as_subclass(Tagged), return_cells=True)[2]) is Tagged
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        cells = layer(x, return_cells=True)[2]
    assert cells.dtype == torch.bfloat16
    torch.testing.assert_close(cells.float(), layer(x, return_cells=True)[2], rtol=0, atol=0.03)  # roundings to 8 bits
