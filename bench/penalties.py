"""Activations of a code with their penalties against what people write by hand, eager and compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lect11ext import functional

from .common import Call, Workload, call_of, parametrize, run_turn

# A batch of an autoencoder of images, and of a sparse autoencoder of a language model's activations.
SIZES = [(128, 256), (1024, 784), (1024, 16384)]


def _l1(a: Tensor) -> tuple[Tensor, Tensor]:
    code = a.relu()
    return code, code.abs().sum(-1)


def _kl(a: Tensor) -> tuple[Tensor, Tensor]:
    code, target = a.sigmoid(), 0.05
    mean = code.mean(0).clamp(1e-6, 1 - 1e-6)
    return code, (target * (target / mean).log() + (1 - target) * ((1 - target) / (1 - mean)).log()).sum()


KINDS: dict[str, tuple[Any, Any]] = {
    "l1": (functional.sparse_activation, _l1),
    "kl": (lambda a: functional.sparse_activation(a, "sigmoid", penalty="kl"), _kl),
}


def _sparse(kind: str, size: tuple[int, int], train: bool) -> Workload:
    def make() -> dict[str, Call]:
        a = torch.randn(*size, requires_grad=train)
        ours, plain = KINDS[kind]
        with torch.no_grad():
            grads = [torch.randn_like(o) for o in plain(a)]
        implementations = {"lect11ext": ours, "eager": plain, "compile": torch.compile(plain)}
        return {name: call_of(f, [a], [a], grads if train else None) for name, f in implementations.items()}

    # Reads a and writes h; then reads a and the gradient of h, and writes that of a.
    bytes_moved = 4.0 * (2 + (3 if train else 0)) * size[0] * size[1]
    name = f"sparse_activation/{kind}/{'train' if train else 'forward'}/float32/{size[0]}x{size[1]}"
    return Workload(name, make, ("lect11ext", "eager", "compile"), work={"copy": bytes_moved})


def _contractive(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    code = torch.nn.functional.linear(x, weight, bias).sigmoid()
    return code, ((code * (1 - code)).square() * weight.square().sum(1)).sum(-1)


def _layer(rows: int, inputs: int, units: int, train: bool) -> Workload:
    def make() -> dict[str, Call]:
        leaves = [torch.rand(rows, inputs), torch.randn(units, inputs) / inputs**0.5, torch.randn(units)]
        leaves = [t.requires_grad_(train) for t in leaves]
        grads = [torch.randn(rows, units), torch.randn(rows)]
        implementations = {
            "lect11ext": functional.contractive_linear,
            "eager": _contractive,
            "compile": torch.compile(_contractive),
        }
        return {name: call_of(f, leaves, leaves, grads if train else None) for name, f in implementations.items()}

    flops = 2.0 * rows * inputs * units * (3 if train else 1)
    name = f"contractive_linear/{'train' if train else 'forward'}/float32/{rows}x{inputs}x{units}"
    return Workload(name, make, ("lect11ext", "eager", "compile"), work={"product/float32": flops})


WORKLOADS = [
    *(_sparse(kind, size, train) for kind in KINDS for train in (False, True) for size in SIZES),
    *(_layer(128, 784, units, train) for units in (64, 256) for train in (False, True)),
]


@parametrize(WORKLOADS)
def test_penalties(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
