"""Weights of nn.LSTM and nn.GRU: initialisation, checkpoints, copies, changes from outside, other types."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune

from lect11ext import nn
from tests.recurrent.test_layer_modules import KINDS, B, F, H, T, flat, make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "num_layers": 3}])
def test_checkpoints_and_initialisation(kind: str, options: dict[str, Any]) -> None:
    layers = []
    for place in (nn, torch.nn):
        torch.manual_seed(3)
        layers.append(getattr(place, kind)(F, H, **options))
    ours, torchs = (copy.deepcopy(layer.state_dict()) for layer in layers)
    assert list(ours) == list(torchs)
    assert all(torch.equal(ours[name], torchs[name]) for name in ours)
    torch.manual_seed(3)
    again = getattr(nn, kind)(F, H, **options)
    for layer in (again, layers[1]):
        layer.load_state_dict({name: w + 1 for name, w in torchs.items()}, strict=True)
        assert all(torch.equal(w, torchs[name] + 1) for name, w in layer.state_dict().items())
        torch.manual_seed(3)
        layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in (again, layers[1])), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_norms_scale_begins_with_one(kind: str) -> None:
    layer = getattr(nn, kind)(F, H, layer_norm=True)
    torch.nn.utils.parametrizations.weight_norm(layer, "layer_norm_hh_l0")
    torch.nn.utils.prune.l1_unstructured(layer, "layer_norm_ih_l0", amount=2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(3)
    layer.reset_parameters()
    layer(torch.randn(T, B, F))  # a pruned weight is computed before a call
    assert (layer.layer_norm_hh_l0 == 1).all() and layer.layer_norm_ih_l0.sum() == len(layer.layer_norm_ih_l0) - 2
    assert layer.weight_hh_l0.abs().max() <= H**-0.5


def saved_and_loaded(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "save": saved_and_loaded}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str, how: str) -> None:
    layer = getattr(nn, kind)(F, H, 2, grad_clip=0.5)
    x = torch.randn(T, B, F)
    other = COPIES[how](layer)
    assert repr(other) == repr(layer) and other.grad_clip == 0.5
    assert all(torch.equal(a, b) for a, b in zip(flat(layer(x)), flat(other(x)), strict=True))
    with torch.no_grad():
        other.weight_hh_l1.zero_()
    assert not torch.equal(layer(x)[0], other(x)[0])  # a copy, not another view


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change(kind: str) -> None:
    x = torch.randn(T, B, F)

    def like_torch(change: Callable[[Any], Any]) -> None:
        ours, torchs = make(kind, F, H, 2)
        for layer in (ours, torchs):
            layer(x)
            change(layer)
        for a, b in zip(flat(ours(x)), flat(torchs(x)), strict=True):
            torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(flat(m(x))[0].square().sum(), list(m.parameters())) for m in (ours, torchs)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32 sums over all steps in another order

    like_torch(lambda m: torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l1"))
    like_torch(lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight_ih_l0", amount=0.5))
    like_torch(lambda m: setattr(m, "weight_hh_l0", torch.nn.Parameter(m.weight_hh_l0.detach() * 3)))
    like_torch(lambda m: m.load_state_dict({n: 2 * w for n, w in m.state_dict().items()}, assign=True))
    like_torch(lambda m: m.share_memory().flatten_parameters())
    like_torch(lambda m: [w.data.mul_(2) for w in m.parameters()])
    shared = getattr(nn, kind)(F, H).share_memory()
    assert all(w.is_shared() for w in shared.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_takes_other_weights(kind: str) -> None:
    ours, torchs = make(kind, F, H, 2)
    x, before = torch.randn(T, B, F), flat(ours(torch.ones(T, B, F)))
    for dtype in (torch.float32, torch.float64):
        weights = {name: 2 * w.detach().to(dtype) for name, w in ours.named_parameters()}
        results = [flat(torch.func.functional_call(layer, weights, (x.to(dtype),))) for layer in (ours, torchs)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(torch.ones(T, B, F))), before, strict=True))
    copy.deepcopy(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_conversion(kind: str, dtype: torch.dtype) -> None:
    ours, torchs = make(kind, F, H, 2)
    for layer in (ours, torchs):
        assert layer.half() is layer
        layer.float().to(dtype)
    x = torch.randn(T, B, F).to(dtype)
    for a, b in zip(flat(ours(x)), flat(torchs(x)), strict=True):
        assert a.dtype == b.dtype == dtype
        # A few roundings of numbers below 1; cuDNN's GRU in float32 errs by some more.
        tolerance = (64 if a.is_cuda else 8) * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
