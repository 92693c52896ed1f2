"""How a workload is measured.

A workload names its implementations. They take turns: a few rounds of each, ``REPEATS`` times over, so that whatever
else the machine does hurts all alike; pytest-benchmark keeps every round, and the table takes medians over all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch

REPEATS = 5
ROUND_SECONDS = 0.02  # an implementation's turn takes about this long, or one call
MIN_ROUND = 100e-6  # a round shorter than this is mostly clock: several calls make one

Call = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """One line of the table. ``make`` returns the implementations, ``lect11ext`` first among equals."""

    name: str
    make: Callable[[], dict[str, Call]] = field(compare=False)
    implementations: tuple[str, ...]
    flops: float = 0.0  # of the products, per call
    bytes: float = 0.0  # that must cross the memory bus, per call
    check: bool = True  # whether the implementations' results are comparable number by number
    tolerance: float = 1e-3


def parametrize(workloads: list[Workload]) -> Any:
    """All turns of all workloads, in the order in which they are to be taken."""
    chosen = os.environ.get("BENCH_ONLY", "")
    turns = [
        pytest.param(w, impl, turn, id=f"{w.name}/{impl}/{turn}")
        for w in workloads
        if chosen in w.name or w.name.startswith("ceiling/")
        for turn in range(REPEATS)
        for impl in w.implementations
    ]
    return pytest.mark.parametrize(("workload", "implementation", "turn"), turns)


@lru_cache(maxsize=1)
def _prepared(workload: Workload) -> dict[str, tuple[Call, int, int]]:
    """Implementations of one workload, warmed up and compared, each with its rounds and calls a round."""
    import time

    torch._dynamo.reset()
    torch.manual_seed(0)
    calls = workload.make()
    results = {name: call() for name, call in calls.items()}
    if workload.check:
        for name, result in results.items():
            _compare(result, results["eager"], workload, name)
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
    call, rounds, iterations = _prepared(workload)[implementation]
    benchmark.group = workload.name
    benchmark.extra_info.update(implementation=implementation, turn=turn, flops=workload.flops, bytes=workload.bytes)
    benchmark.pedantic(call, rounds=rounds, iterations=iterations, warmup_rounds=1)
