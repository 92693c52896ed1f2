"""What the machine can do: a large product and a large copy. Every workload takes turns with the one that bounds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

PRODUCT = 2048
COPY = 2**25


@dataclass(frozen=True)
class Ceiling:
    work: float  # operations, or bytes that cross the memory bus, per call
    unit: str
    make: Callable[[], Callable[[], Any]]


def _product(dtype: torch.dtype) -> Callable[[], Any]:
    a = torch.randn(PRODUCT, PRODUCT, dtype=dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)


def _copy() -> Callable[[], Any]:
    a = torch.randn(COPY)
    out = torch.empty_like(a)
    return lambda: out.copy_(a)


CEILINGS = {
    "product/float32": Ceiling(2.0 * PRODUCT**3, "GFLOP/s", lru_cache(lambda: _product(torch.float32))),
    "product/bfloat16": Ceiling(2.0 * PRODUCT**3, "GFLOP/s", lru_cache(lambda: _product(torch.bfloat16))),
    "copy": Ceiling(8.0 * COPY, "GB/s", lru_cache(_copy)),
}
