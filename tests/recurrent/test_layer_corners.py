"""Combinations of a layer's options that meet in one place: clips and projections, recomputed parts and types, rows
without a step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, hessian, jvp

from lect11ext import functional, nn, reference
from tests.helpers import same_for_any_threads

KINDS = ["LSTM", "GRU"]


@pytest.mark.parametrize("rate", [0.0, 1e-12])  # with zoneout a step is not the fused cell's
def test_clip_is_of_the_projected_state(rate: float) -> None:
    weights = [torch.ones(4, 1).double(), torch.zeros(4, 1).double(), torch.full((1, 1), 10.0).double()]
    x, zero = torch.ones(1, 1, 1).double().requires_grad_(), torch.zeros(1, 1, 1).double()
    y, _ = functional.lstm(x, (zero, zero), [weights], grad_clip=1.0, zoneout=(rate, rate))
    plain, _ = reference.lstm_layer(x, (zero[0], zero[0]), *weights[:2], weight_hr=weights[2], grad_clip=1.0)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x) for out in (y, plain)))


@pytest.mark.cpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_within_autocast_gives_the_same_bits_for_any_threads(kind: str, dtype: torch.dtype) -> None:
    """Products of the BLAS run in threads, of which only the caller's knows autocast. So large that they are taken."""
    layer = getattr(nn, kind)(128, 256, dtype=dtype)
    x = torch.randn(96, 48, 128, dtype=dtype)

    def results(inside: bool) -> Sequence[Tensor]:
        out = layer(x)[0].square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return torch.autograd.grad(out, list(layer.parameters()))

    outside, inside = (same_for_any_threads(lambda w=within: results(w), (1, 2)) for within in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recomputed_parts_add_up_in_float32(kind: str, dtype: torch.dtype) -> None:
    layer, results = getattr(nn, kind)(4, 8).to(dtype), []
    x = torch.randn(1000, 4, 4).to(dtype)
    for every in (0, 4):
        layer.recompute = every
        grads = torch.autograd.grad(layer(x)[0].float().sum() / 10, list(layer.parameters()))
        results.append(torch.cat([g.double().flatten() for g in grads]))
    assert (results[1] - results[0]).norm() < 2 * torch.finfo(dtype).eps * results[0].norm()


@pytest.mark.parametrize("kind, projection", [("LSTM", 0), ("LSTM", 3), ("GRU", 0)])
def test_nan_state_of_a_row_without_steps(kind: str, projection: int) -> None:
    layer = getattr(nn, kind)(5, 7, **({"proj_size": projection} if projection else {}))
    h, c = torch.zeros(1, 3, projection or 7), torch.zeros(1, 3, 7)
    h[:, 1] = c[:, 1] = torch.nan
    output, _ = layer(torch.randn(4, 3, 5), (h, c) if kind == "LSTM" else h, lengths=torch.tensor([4, 0, 2]))
    loss = output.square().sum()
    grads = torch.autograd.grad(loss, list(layer.parameters()), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(layer.parameters()))
    assert not any(g.isnan().any() for g in (*grads, *second))


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_of_a_recomputing_layer(kind: str) -> None:
    layer, x = getattr(nn, kind)(3, 4).double(), torch.randn(4, 2, 3).double()
    again = copy.deepcopy(layer)
    again.recompute = 2

    def loss_of(layer: torch.nn.Module) -> Any:
        parameters = {n: p.detach() for n, p in layer.named_parameters()}
        return lambda x: functional_call(layer, parameters, (x,))[0].square().sum()

    torch.testing.assert_close(hessian(loss_of(again))(x), hessian(loss_of(layer))(x))


@pytest.mark.parametrize(("first_size", "second_size"), [(1.0, 1.0), (0.02, 100.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_with_a_clip_is_that_of_the_reference(kind: str, first_size: float, second_size: float) -> None:
    """Gradients beyond the clip, and those that only the second derivatives have."""
    layer, x = getattr(nn, kind)(3, 4, grad_clip=0.5).double(), torch.randn(6, 5, 3).double().requires_grad_()
    h, weights = torch.zeros(5, 4).double(), list(layer.parameters())
    plain = getattr(reference, f"{kind.lower()}_layer")
    outputs = [layer(x)[0], plain(x, (h, h) if kind == "LSTM" else h, *weights, grad_clip=0.5)[0]]
    results = []
    for output in outputs:
        (first,) = torch.autograd.grad(first_size * output.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(second_size * first.square().sum(), x)[0])
    torch.testing.assert_close(*results)


def test_gradients_of_gates_that_were_not_given_are_refused() -> None:
    x, h, ih, hh = (torch.randn(s) for s in ((4, 3, 5), (3, 7), (21, 5), (21, 7)))
    out = torch.ops.lect11ext.gru_layer(x, h, ih, hh, save=True, recompute=2)
    with pytest.raises(ValueError, match="grad_gates and grad_cells must be None where recompute is positive"):
        torch.ops.lect11ext.gru_layer_backward(
            None, None, torch.randn(4, 3, 28), x, h, ih, hh, *[None] * 7, True, 0.0, None, 0, 2, False, False,
            out[0], *out[2:], [True] * 8,
        )  # fmt: skip


def test_no_steps_with_a_projection_leave_the_graph_whole() -> None:
    layer, x = nn.LSTM(5, 7, proj_size=3), torch.randn(0, 2, 5, requires_grad=True)
    output, _ = layer(x)
    assert output.shape == (0, 2, 3)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert grad.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_derivatives_of_norms_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """At a state of zero a norm divides by the root of its epsilon alone, whose cube is beyond float16."""
    for options in ({}, {"proj_size": 4}) if kind == "LSTM" else ({},):
        layer = getattr(nn, kind)(8, 16, layer_norm=True, **options).to(dtype)
        x = torch.randn(5, 3, 8, dtype=dtype)
        results = []
        for type_ in (dtype, torch.float64):
            again, input_ = copy.deepcopy(layer).to(type_), x.to(type_).requires_grad_()
            output = again(input_, lengths=torch.tensor([5, 2, 4]))[0]  # what is beyond is as if it were zero
            (first,) = torch.autograd.grad(output.square().sum(), input_, create_graph=True)
            second = torch.autograd.grad(first.square().sum(), list(again.parameters()))
            _, tangent = jvp(lambda z, again=again: again(z)[0], (x.to(type_),), (x.to(type_),))
            results.append([first, *second, tangent])
        for got, exact in zip(*results, strict=True):
            # Some roundings of outputs and gates, of 8 or 11 bits, twice differentiated.
            assert (got.double() - exact).norm() <= 16 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_bias_gradients_of_very_many_rows(kind: str) -> None:
    ours = getattr(nn, kind + "Cell")(2, 4)
    torchs, exact = (getattr(torch.nn, kind + "Cell")(2, 4, dtype=t) for t in (torch.float32, torch.float64))
    x = torch.randn(200_000, 2) + 0.5
    grads = []
    for cell in (ours, torchs, exact):
        cell.load_state_dict(ours.state_dict())
        output = cell(x.to(cell.weight_ih.dtype))
        (output[0] if kind == "LSTM" else output).sum().backward()
        grads.append(torch.cat([cell.bias_ih.grad, cell.bias_hh.grad]))
    error, rival = ((g.double() - grads[2]).norm() for g in grads[:2])
    assert error <= 2 * rival
