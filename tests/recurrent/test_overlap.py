"""Directions on streams of their own: the same results, and nobody waits who need not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import lect11ext
from lect11ext.functional.recurrent import layers, overlap

pytestmark = pytest.mark.cpu

KINDS = ["LSTM", "GRU"]


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As if there were a GPU with room for two kernels; what was handed over and launched, in order."""
    events: list[str] = []

    class Recorded(overlap.Streams):
        def on(self, i: int) -> Any:
            events.append(f"run {i}")
            return super().on(i)

        def hand_over(self, tensors: Any, source: int, target: int) -> None:
            assert all(isinstance(t, Tensor) for t in tensors)
            events.append(f"{source} to {target}")

    for module in (layers, overlap):
        monkeypatch.setattr(module, "is_wanted", lambda input: True)
        monkeypatch.setattr(module, "fits_twice", lambda *_: True)
    monkeypatch.setattr(overlap, "Streams", Recorded)
    yield events


def outputs_and_gradients(module: torch.nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    output, state = module(x, **options)
    states = state if isinstance(state, tuple) else (state,)
    loss = output.square().sum() + sum(s.sin().sum() for s in states)
    return [output, *states, *torch.autograd.grad(loss, [x, *module.parameters()])]


def compare(module: torch.nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    overlapped = outputs_and_gradients(module, x, **options)
    with monkeypatch.context() as m:
        m.setattr(layers, "is_wanted", lambda input: False)
        plain = outputs_and_gradients(module, x, **options)
    for a, b in zip(overlapped, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_directions(kind: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(lect11ext.nn, kind)(5, 7, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(9, 3, 5, dtype=torch.float64, requires_grad=True)
    compare(module, x, monkeypatch, lengths=torch.tensor([9, 0, 4]))
    assert wanted == ["run 0", "run 1", "0 to 0", "1 to 0"] * 2


def test_gradients_of_leaves_are_handed_over(wanted: list[str]) -> None:
    """By a view of each, made on the first stream, where autograd adds them."""
    module, x = lect11ext.nn.LSTM(5, 7, bidirectional=True), torch.randn(9, 3, 5, requires_grad=True)
    leaves, seen, todo = [x, *module.parameters()], set(), [module(x)[0].grad_fn]
    views = set()
    while todo:
        node = todo.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            if hasattr(following, "variable"):
                assert type(node).__name__ == "ViewBackward0"
                views.add(id(following.variable))
            if following not in seen:
                seen.add(following)
                todo.append(following)
    assert views == {id(leaf) for leaf in leaves}


def test_one_direction_runs_alone(wanted: list[str]) -> None:
    lect11ext.nn.LSTM(5, 7, num_layers=2)(torch.randn(20, 3, 5))
    assert wanted == []


def test_where_there_are_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not overlap.is_wanted(torch.zeros(1))  # the CPU has none
    with FakeTensorMode():
        x = torch.zeros(1, device="cuda")
        monkeypatch.setattr(overlap, "Tensor", type(x))
        assert overlap.is_wanted(x)
        monkeypatch.setenv("LECT11EXT_LAYER_OVERLAP", "0")
        assert not overlap.is_wanted(x)
