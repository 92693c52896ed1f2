"""Layers and directions on streams of their own: the same results, and nobody waits who need not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

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
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_wave_of_layers(kind: str, batch_first: bool, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(lect11ext.nn, kind)(5, 7, num_layers=3, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn(*((3, 131) if batch_first else (131, 3)), 5, dtype=torch.float64, requires_grad=True)
    compare(module, x, monkeypatch)
    piece = ["run 0", "0 to 1", "run 1", "1 to 2", "run 2"]
    # Four pieces, and only then does the first stream wait for the others.
    assert wanted == [*piece * 4, "0 to 0", "1 to 0", "2 to 0", *["2 to 0"] * 4]


@pytest.mark.parametrize("kind", KINDS)
def test_directions(kind: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = getattr(lect11ext.nn, kind)(5, 7, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(9, 3, 5, dtype=torch.float64, requires_grad=True)
    compare(module, x, monkeypatch, lengths=torch.tensor([9, 0, 4]))
    assert wanted == ["run 0", "run 1", "0 to 0", "1 to 0"] * 2


@pytest.mark.parametrize(
    "options", [dict(truncate=50), dict(recompute=40), dict(zoneout=0.2), dict(dropout=0.3)], ids=str
)
def test_what_is_not_cut(options: dict[str, Any], wanted: list[str]) -> None:
    module = lect11ext.nn.LSTM(5, 7, num_layers=2, **options)
    module(torch.randn(200, 3, 5))
    lect11ext.nn.LSTM(5, 7, num_layers=2)(torch.randn(200, 3, 5), lengths=torch.tensor([200, 0, 4]))
    lect11ext.nn.LSTM(5, 7, num_layers=2)(torch.randn(200, 3, 5), return_cells=True)
    lect11ext.nn.GRU(5, 7)(torch.randn(200, 3, 5))
    assert wanted == []


def test_pieces() -> None:
    assert overlap.pieces_of(0) == [(0, 0)] and overlap.pieces_of(63) == [(0, 63)]
    assert overlap.pieces_of(1000) == [(0, 250), (250, 500), (500, 750), (750, 1000)]


def test_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("1", False)):  # the CPU has no streams
        monkeypatch.setenv("LECT11EXT_LAYER_OVERLAP", value)
        assert overlap.is_wanted(torch.zeros(1)) is expected
