"""Seconds from a fresh process's call of torch.compile to the first gradients, of a model with an LSTM.

The peer is a loop over torch.nn.LSTMCell, which the compiler unrolls. It is stopped after ``LIMIT`` seconds, and counts
as that: a ratio to the limit is a bound from below. ``python -m bench.compilation NAME STEPS`` is one such process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import nn

from . import is_chosen

STEPS = [64, 128, 512]
LIMIT = 300
BATCH, WIDTH = 4, 64


class Fused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.layer = nn.LSTM(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))[0])


class Loop(Fused):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.size(1), WIDTH)
        outputs = []
        for step in self.embed(x):
            h, c = self.layer(step, (h, c))
            outputs.append(h)
        return self.head(torch.stack(outputs))


MODELS = {"lect11ext": Fused, "compile": Loop}


def first_gradients(name: str, steps: int) -> float:
    """Seconds, in this process."""
    # The first compilation on a machine precompiles headers and tries out the processor, whatever it is of.
    torch.compile(torch.nn.Linear(3, 5))(torch.ones(2, 3)).sum().backward()
    model, x = MODELS[name](), torch.randn(steps, BATCH, WIDTH)
    start = time.perf_counter()
    torch.compile(model, fullgraph=True)(x).sum().backward()
    return time.perf_counter() - start


def in_a_fresh_process(name: str, steps: int) -> float:
    """Nothing that was compiled before is found again."""
    command = [sys.executable, "-m", "bench.compilation", name, str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=True)
        except subprocess.TimeoutExpired:
            return LIMIT
    return float(done.stdout)


CASES = [
    pytest.param(name, steps, id=f"{name}/{steps}")
    for steps in STEPS
    for name in MODELS
    if is_chosen(f"LSTM-compilation/T{steps}/limit{LIMIT}s", os.environ.get("BENCH_ONLY", ""))
]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_compilation(benchmark: Any, name: str, steps: int) -> None:
    benchmark.group = f"LSTM-compilation/T{steps}/limit{LIMIT}s"
    seconds = benchmark.pedantic(in_a_fresh_process, (name, steps), rounds=1)
    # Without the start of the process, which pytest-benchmark has measured too.
    benchmark.extra_info.update(implementation=name, turn=0, work={}, seconds=seconds)


if __name__ == "__main__":
    print(first_gradients(sys.argv[1], int(sys.argv[2])))
