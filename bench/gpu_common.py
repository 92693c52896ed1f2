"""What the workloads on a GPU share: where they run, how they are timed, and what they are held against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Workload:
    """``make`` returns the implementations; ``work`` is what a call must do, by the ceiling that bounds it."""

    name: str
    make: Callable[[], dict[str, Call]]
    work: dict[str, float]


class Machine:
    """Where workloads run, and how large they are: a size is divided by ``shrink``."""

    def __init__(self, device: str, small: bool) -> None:
        self.device = device
        self.shrink = 64 if small else 1

    def size(self, n: int, least: int = 1) -> int:
        return max(least, n // self.shrink)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype).requires_grad_(grad)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Call, calls: int) -> float:
        if self.device != "cuda":
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - begin) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def ceilings(m: Machine) -> dict[str, tuple[Call, float]]:
    """A large product in two arithmetics, and a large copy: calls, and what each does."""
    n, numel = m.size(8192), m.size(2**29)
    out: dict[str, tuple[Call, float]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        a = m.randn(n, n, dtype=dtype)
        out[f"product/{name}"] = (lambda a=a: a @ a), 2.0 * n**3
    source, target = torch.empty(numel, device=m.device), torch.empty(numel, device=m.device)
    out["copy"] = (lambda: target.copy_(source)), 8.0 * numel
    return out


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """With these environment variables set: those that choose between our own kernels are read at every call."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def within(context: Callable[[], Any], call: Call) -> Call:
    def run() -> Any:
        with context():
            return call()

    return run
