"""How a workload is measured.

A workload names its implementations and the ceilings that may bound it. They take turns: a few rounds of each,
``REPEATS`` times over. A machine that others share changes its speed by a factor from one second to the next, so a
ratio is taken within a turn, of medians over its rounds, and the table shows the median over the turns.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from . import is_chosen
from .ceilings import CEILINGS

REPEATS = 7
ROUND_SECONDS = 0.01  # an implementation's turn takes about this long, or one call
# Before a turn: OpenMP threads of the implementation before it spin for some milliseconds, and slow down whoever shares
# their core.
PAUSE_SECONDS = 0.02
LARGE_BLOCK = 2**24
MIN_ROUND = 100e-6  # a round shorter than this is mostly clock: several calls make one

Call = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """One line of the table. ``make`` returns the implementations, ``lect11ext`` first among equals."""

    name: str
    make: Callable[[], dict[str, Call]] = field(compare=False)
    implementations: tuple[str, ...]
    work: dict[str, float] = field(compare=False)  # per call, in the unit of each ceiling that may bound it
    check: bool = True  # whether the implementations' results are comparable number by number
    tolerance: float = 1e-3


def call_of(
    function: Callable[..., Any], args: Sequence[Any], wanted: Sequence[Tensor] = (), grads: Any = None
) -> Call:
    """Inference; or training, where gradients of the outputs are given: what ``wanted`` gets of them."""

    def inference() -> list[Tensor]:
        with torch.no_grad():
            out = function(*args)
        return list(out) if isinstance(out, (tuple, list)) else [out]

    def training() -> Any:
        return torch.autograd.grad(function(*args), wanted, grads)

    return inference if grads is None else training


def parametrize(workloads: list[Workload]) -> Any:
    """All turns of all workloads, in the order in which they are to be taken."""
    chosen = os.environ.get("BENCH_ONLY", "")
    turns = [
        pytest.param(w, impl, turn, id=f"{w.name}/{impl}/{turn}")
        for w in workloads
        if is_chosen(w.name, chosen)
        for turn in range(REPEATS)
        for impl in (*w.implementations, *w.work)
    ]
    return pytest.mark.parametrize(("workload", "implementation", "turn"), turns)


@lru_cache(maxsize=1)
def _prepared(workload: Workload) -> dict[str, tuple[Call, int, int]]:
    """Implementations of one workload, warmed up and compared, each with its rounds and calls a round."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    # glibc returns freed memory to the system at once until it has freed a larger block; a program that has run for a
    # while has. Without this every call of the first workloads would fault its outputs in again.
    torch.zeros(LARGE_BLOCK, dtype=torch.uint8)
    calls = workload.make()
    results = {name: call() for name, call in calls.items()}
    if workload.check:
        for name, result in results.items():
            _compare(result, results["eager"], workload, name)
    calls |= {name: CEILINGS[name].make() for name in workload.work}
    prepared = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        seconds = max(time.perf_counter() - start, 1e-7)
        iterations = max(1, round(MIN_ROUND / seconds))
        prepared[name] = (call, max(1, min(200, round(ROUND_SECONDS / seconds / iterations))), iterations)
    return prepared


def _compare(got: Any, expected: Any, workload: Workload, name: str) -> None:
    for a, b in zip(got, expected, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
        assert error <= workload.tolerance, f"{workload.name}: {name} differs from eager by {error:.1e}"


def run_turn(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    """The body of every benchmark."""
    time.sleep(PAUSE_SECONDS)
    call, rounds, iterations = _prepared(workload)[implementation]
    benchmark.group = workload.name
    benchmark.extra_info.update(implementation=implementation, turn=turn, work=workload.work)
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
