"""LSTM and GRU cell steps against torch.nn's, eager and compiled."""

from __future__ import annotations

from typing import Any

import torch

from lect11ext import nn

from . import name_of
from .common import Call, Workload, call_of, parametrize, run_turn

GATES = {"LSTMCell": 4, "GRUCell": 3}
SMALL = [(1, 64), (1, 256), (8, 64), (8, 256)]
LARGE = [(32, 256), (32, 1024), (256, 256), (256, 1024)]


def _step(kind: str, batch: int, hidden: int, dtype: torch.dtype, train: bool) -> Workload:
    def make() -> dict[str, Call]:
        ours = getattr(nn, kind)(hidden, hidden, dtype=dtype)
        torchs = getattr(torch.nn, kind)(hidden, hidden, dtype=dtype)
        torchs.load_state_dict(ours.state_dict())
        x, h, c = (torch.randn(batch, hidden, dtype=dtype, requires_grad=train) for _ in range(3))
        state = (h, c) if kind == "LSTMCell" else h
        inputs = [x, h, c] if kind == "LSTMCell" else [x, h]
        grads = [torch.randn(batch, hidden, dtype=dtype) for _ in inputs[1:]]

        def call(step: Any, module: torch.nn.Module) -> Call:
            return call_of(step, [x, state], inputs + list(module.parameters()), grads if train else None)

        return {
            "lect11ext": call(ours, ours),
            "eager": call(torchs, torchs),
            "compile": call(torch.compile(torchs), torchs),
        }

    weights = 2.0 * GATES[kind] * hidden * hidden
    return Workload(
        f"{kind}/{'train' if train else 'forward'}/{name_of(dtype)}/B{batch}/H{hidden}",
        make,
        ("lect11ext", "eager", "compile"),
        work={
            f"product/{name_of(dtype)}": 2 * weights * batch * (3 if train else 1),
            "copy": weights * dtype.itemsize * (3 if train else 1),  # forward: read once; backward: read, written
        },
        tolerance=1e-3 if dtype == torch.float32 else 0.1,
    )


WORKLOADS = [
    _step(kind, batch, hidden, torch.float32, train)
    for kind in GATES
    for train in (False, True)
    for batch, hidden in SMALL + LARGE
] + [_step(kind, batch, hidden, torch.bfloat16, False) for kind in GATES for batch, hidden in LARGE]


@parametrize(WORKLOADS)
def test_cell(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
