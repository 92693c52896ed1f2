"""The options of a layer, and its kernels held against the CPU's op in float64."""

from __future__ import annotations

from typing import Any

import torch
from host_kernels import Kernels
from layer_case import CELLS, Layer

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
OF_CELLS = [
    *((cell, name) for cell in CELLS for name in OPTIONS),
    *(("lstm", name) for name in LSTM),
    *((cell, name) for cell in ("lstm", "gru") for name in NORM),
]


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
