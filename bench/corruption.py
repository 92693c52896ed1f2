"""corrupt against the eager idioms, and torch.compile with both of its generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lect11ext.functional import corrupt

from .common import Call, Workload, call_of, parametrize, run_turn

SIZES = [(1024, 784), (2048, 2048)]
DEVIATION, PROBABILITY = 0.5, 0.25
AMOUNTS = {"gaussian": DEVIATION, "masking": PROBABILITY, "salt_and_pepper": PROBABILITY}


def _gaussian(x: Tensor) -> Tensor:
    return x + DEVIATION * torch.randn_like(x)


def _masking(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > PROBABILITY)


def _salt_and_pepper(x: Tensor) -> Tensor:
    u = torch.rand_like(x)
    return torch.where(u < PROBABILITY, (u < PROBABILITY / 2).to(x.dtype), x)


# What everybody writes.
IDIOMS = {"gaussian": _gaussian, "masking": _masking, "salt_and_pepper": _salt_and_pepper}


def _corruption(kind: str, size: tuple[int, int], train: bool) -> Workload:
    def make() -> dict[str, Call]:
        x = torch.rand(*size, requires_grad=train)
        grad = torch.randn(*size) if train else None
        idiom = IDIOMS[kind]

        def call(function: Any) -> Call:
            return call_of(function, [x], [x], grad)

        # The implementations draw different noise, so what is compared is how much of it there is.
        spread = [
            (function(x) - x).detach().square().mean()
            for function in (lambda x: corrupt(x, kind, AMOUNTS[kind]), idiom)
        ]
        torch.testing.assert_close(*spread, rtol=0.02, atol=0)
        return {
            "lect11ext": call(lambda x: corrupt(x, kind, AMOUNTS[kind])),
            "eager": call(idiom),
            "compile": call(torch.compile(idiom)),
            "fallback_random": call(torch.compile(idiom, options={"fallback_random": True})),
        }

    # Read and written once, and so is the gradient where elements were replaced; that of a sum goes through as it is.
    passes = 2.0 if train and kind != "gaussian" else 1.0
    return Workload(
        f"corrupt/{kind}/{'train' if train else 'forward'}/float32/{size[0]}x{size[1]}",
        make,
        ("lect11ext", "eager", "compile", "fallback_random"),
        work={"copy": 8.0 * passes * size[0] * size[1]},
        check=False,
    )


WORKLOADS = [_corruption(kind, size, train) for kind in AMOUNTS for train in (False, True) for size in SIZES]


@parametrize(WORKLOADS)
def test_corruption(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
