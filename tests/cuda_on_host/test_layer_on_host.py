"""A layer's kernels for all steps, forward and backward, against the CPU's op in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cell_operands import BF16, F32
from host_kernels import Kernels, Output
from layer_case import CELLS, TYPES, Layer

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": dict(reverse=True, batch_first=True),
    "lengths": dict(lengths=[4, 0, 2], reset=True),
    "lengths from the end": dict(lengths=[1, 4, 3], reset=True, reverse=True, batch_first=True),
    "zoneout by a mask": dict(zoneout="mask", lengths=[4, 3, 1]),
    "zoneout by a rate": dict(zoneout="rate", hidden_mask=True),
    "hidden mask": dict(hidden_mask=True, lengths=[4, 3, 1], reset=True),
    "clip and truncate": dict(clip=0.5, truncate=2, reverse=True, hidden_mask=True),
}
LSTM = {
    "peepholes": dict(peephole=True, sigma=True),
    "peepholes and all": dict(peephole=True, zoneout="rate", norm=True),
}
NORM = {"norm": dict(norm=True), "norm and masks": dict(norm=True, hidden_mask=True, lengths=[4, 0, 2], zoneout="mask")}


@pytest.fixture
def device(kernels: Kernels) -> Iterator[Any]:
    """Sets how many blocks run at a time, their shared memory, and whether there are clusters: by default one block
    with all of it, and none."""
    everything = 227 * 1024

    def describe(blocks: int, shared: int = everything, *, clusters: bool = False) -> None:
        kernels.library.set_device(blocks, shared, 9 if clusters else 8)

    yield describe
    describe(1)


def near(name: str, got: torch.Tensor, expected: torch.Tensor, epsilon: float) -> None:
    assert not got.isnan().any(), f"{name}: NaN"
    error = (got.double() - expected).abs().max().item() if got.numel() else 0.0
    assert error <= epsilon * max(expected.abs().max().item() if got.numel() else 0.0, 1.0), f"{name}: {error}"


def check(layer: Layer, kernels: Kernels) -> None:
    """Rounding is that of storage, once a step forward; and of a product's factors backward."""
    kept = layer.expected()
    found = layer.run_forward(kernels)
    for name, output in found.items():
        near(name, output.checked(), kept[name].view(output.tensor.shape), 8 * layer.steps * layer.epsilon)
    expected = layer.expected_gradients(kept)
    outputs = layer.run_backward(kernels, kept)
    gradients = {name: output.checked() for name, output in outputs.items()}
    for name in ("pre", "h", "c", "mask"):
        if name in gradients:
            near(f"grad {name}", gradients[name], expected[name], 16 * layer.steps * layer.epsilon)
    if layer.norm:
        summed = gradients.get("normed", gradients["pre"]).double() * kept["normed"]
        near("grad norm", summed.sum((0, 1)), expected["norm"], 32 * layer.steps * layer.epsilon)
    if layer.cell != "gru_reset_first":
        near(
            "grad weight", weight_gradient(layer, gradients, kept), expected["weight"], 32 * layer.steps * layer.epsilon
        )


def weight_gradient(layer: Layer, gradients: dict[str, torch.Tensor], kept: dict[str, torch.Tensor]) -> torch.Tensor:
    """From the gradients of the product, as the op makes it of them."""

    def by_time(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(0, 1) if layer.batch_first else t

    product, out = by_time(gradients.get("hidden", gradients["pre"])).double(), by_time(kept["out"])
    total, h = torch.zeros(layer.weight.shape, dtype=torch.float64), layer.h.double()
    for s in range(layer.steps):
        t = layer.steps - 1 - s if layer.reverse else s
        active = torch.ones(layer.batch, dtype=torch.bool) if layer.length is None else t < layer.length
        if layer.restart is not None:
            h = torch.where((by_time(layer.restart)[t] & active)[:, None], 0.0, h)
        total += product[t].T @ (h if layer.mask is None else h * layer.mask.double())
        h = torch.where(active[:, None], out[t], h)
    return total


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_types(kernels: Kernels, device: Any, cell: str, types: tuple[torch.dtype, bool]) -> None:
    device(4)
    check(Layer(cell, dtype=types[0], tf32=types[1], hidden=37), kernels)


OF_CELLS = [
    *((cell, name) for cell in CELLS for name in OPTIONS),
    *(("lstm", name) for name in LSTM),
    *((cell, name) for cell in ("lstm", "gru") for name in NORM),
]


@pytest.mark.parametrize("cell, options", OF_CELLS)
def test_options(kernels: Kernels, device: Any, cell: str, options: str) -> None:
    device(2)
    check(Layer(cell, **(OPTIONS | LSTM | NORM)[options]), kernels)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("blocks, batch", [(1, 1), (1, 35), (3, 17), (5, 40), (20, 33)])
def test_teams_and_passes(
    kernels: Kernels, device: Any, cell: str, dtype: torch.dtype, blocks: int, batch: int
) -> None:
    """Several tiles a block, several teams, several groups of rows."""
    device(blocks)
    check(Layer(cell, dtype=dtype, steps=2, batch=batch), kernels)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [5, 20, 70, 128])
def test_clusters(kernels: Kernels, device: Any, cell: str, hidden: int) -> None:
    device(19, clusters=True)
    check(Layer(cell, dtype=BF16, steps=3, batch=35, hidden=hidden, norm=cell != "gru_reset_first"), kernels)


def test_more_rows_than_a_pass(kernels: Kernels, device: Any) -> None:
    device(1)
    check(Layer("lstm", dtype=BF16, steps=2, batch=150, hidden=5, norm=True), kernels)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_beyond_shared_memory(kernels: Kernels, device: Any, cell: str) -> None:
    for shared in (20 * 1024, 24 * 1024, 40 * 1024):
        device(2, shared)
        check(Layer(cell, steps=2, hidden=90), kernels)


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
