"""A layer's kernels for all steps, forward and backward, against the CPU's op in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cell_operands import BF16, F32
from host_kernels import Kernels, Output
from layer_case import CELLS, TYPES, Layer
from layer_check import LSTM, NORM, OF_CELLS, OPTIONS, check, near


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_types(kernels: Kernels, device: Any, cell: str, types: tuple[torch.dtype, bool]) -> None:
    device(4)
    check(Layer(cell, dtype=types[0], tf32=types[1], hidden=37), kernels)


@pytest.mark.parametrize("cell, options", OF_CELLS)
def test_options(kernels: Kernels, device: Any, cell: str, options: str) -> None:
    device(2)
    check(Layer(cell, **(OPTIONS | LSTM | NORM)[options]), kernels)


def test_states_kept_every_few_steps(kernels: Kernels) -> None:
    layer = Layer("lstm", steps=7, lengths=[7, 3, 5])
    expected = layer.expected()["cells"]
    kept = layer.run_forward(kernels, every=3)["cells"].checked()
    state = layer.c.double()
    for s in range(6):
        active = (s < layer.length)[:, None]
        state = torch.where(active, expected[s], state)
        if (s + 1) % 3 == 0:
            near("cells", kept[(s + 1) // 3 - 1], state, 64 * layer.epsilon)


def test_inference_keeps_nothing(kernels: Kernels) -> None:
    layer = Layer("lstm")
    found, kept = layer.run_forward(kernels, save=False), layer.expected()
    assert set(found) == {"out", "h", "c"}
    for name, output in found.items():
        near(name, output.checked(), kept[name], 32 * layer.epsilon)


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_in_every_run(kernels: Kernels, device: Any, cell: str) -> None:
    device(3)
    layer = Layer(cell, dtype=BF16, batch=20, norm=cell != "gru_reset_first")
    first, second = layer.run_forward(kernels), layer.run_forward(kernels)
    for name in first:
        assert torch.equal(first[name].checked(), second[name].checked()), name


def test_nothing_to_do(kernels: Kernels) -> None:
    for batch, hidden in ((0, 4), (4, 0)):
        kernels.layer_forward(cell=0, steps=2, batch=batch, hidden=hidden, dtype=F32)
        kernels.layer_backward(cell=0, steps=2, batch=batch, hidden=hidden, dtype=F32)
    layer = Layer("lstm", steps=0)
    found: dict[str, Output] = layer.run_forward(kernels)
    assert torch.equal(found["h"].checked(), layer.h) and torch.equal(found["c"].checked(), layer.c)


def test_nan_stays_in_its_row(kernels: Kernels) -> None:
    layer = Layer("lstm", batch=3)
    layer.pre[1, 2, 5] = math.nan
    out = layer.run_forward(kernels)["out"].checked()
    assert not out[:, :2].isnan().any() and not out[0].isnan().any() and out[2:, 2].isnan().all()
