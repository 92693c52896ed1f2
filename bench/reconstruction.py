"""The reconstruction loss against torch's own losses, eager and compiled."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lect11ext.functional import reconstruction_loss

from .common import Call, Workload, call_of, parametrize, run_turn

SIZES = [(128, 784), (1024, 784), (2048, 4096)]


def _bernoulli(x: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, t, reduction="none").sum(-1)


def _continuous_bernoulli(x: Tensor, t: Tensor) -> Tensor:
    """As in PyTorch's VAE example: the series' place is taken by a constant near one half."""
    rate = x.sigmoid()
    away = (rate - 0.5).abs() > 1e-3
    safe = torch.where(away, rate, 0.25)
    constant = torch.where(away, (2 * torch.atanh(1 - 2 * safe) / (1 - 2 * safe)).log(), math.log(2.0))
    return (F.binary_cross_entropy_with_logits(x, t, reduction="none") - constant).sum(-1)


def _gaussian(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    return 0.5 * ((x - t).square() * (-v).exp() + v + math.log(2 * math.pi)).sum(-1)


def _squared_error(x: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(x, t, reduction="none").sum(-1)


IDIOMS: dict[str, Any] = {
    "bernoulli": _bernoulli,
    "continuous_bernoulli": _continuous_bernoulli,
    "gaussian": _gaussian,
    "squared_error": _squared_error,
}


def _loss(likelihood: str, size: tuple[int, int], train: bool) -> Workload:
    def make() -> dict[str, Call]:
        x, t = torch.randn(*size, requires_grad=train), torch.rand(*size)
        args = [x, t] + ([torch.randn(*size, requires_grad=train)] if likelihood == "gaussian" else [])
        leaves, grad = [a for a in args if a.requires_grad], torch.randn(size[0]) if train else None

        def ours(*args: Tensor) -> Tensor:
            logvar = args[2] if len(args) > 2 else None
            return reconstruction_loss(args[0], args[1], likelihood, logvar=logvar)

        def call(function: Any) -> Call:
            return call_of(function, args, leaves, grad)

        plain = IDIOMS[likelihood]
        return {"lect11ext": call(ours), "eager": call(plain), "compile": call(torch.compile(plain))}

    operands, outputs = (3, 2) if likelihood == "gaussian" else (2, 1)
    numbers = operands + (operands + outputs if train else 0)
    return Workload(
        f"reconstruction_loss/{likelihood}/{'train' if train else 'forward'}/float32/{size[0]}x{size[1]}",
        make,
        ("lect11ext", "eager", "compile"),
        work={"copy": 4.0 * numbers * size[0] * size[1]},
        tolerance=2e-2 if likelihood == "continuous_bernoulli" else 1e-3,  # the idiom's hole
    )


WORKLOADS = [_loss(name, size, train) for name in IDIOMS for train in (False, True) for size in SIZES]


@parametrize(WORKLOADS)
def test_reconstruction(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
