"""What the machine can do: a large product and a large copy, measured in the same run as everything else."""

from __future__ import annotations

from typing import Any

import torch

from .common import Workload, parametrize, run_turn

PRODUCT = 2048
COPY = 2**25


def _product(dtype: torch.dtype) -> Workload:
    def make() -> dict[str, Any]:
        a = torch.randn(PRODUCT, PRODUCT, dtype=dtype)
        out = torch.empty_like(a)
        return {"eager": lambda: torch.mm(a, a, out=out)}

    return Workload(f"ceiling/product/{str(dtype)[6:]}", make, ("eager",), flops=2.0 * PRODUCT**3, check=False)


def _copy() -> Workload:
    def make() -> dict[str, Any]:
        a = torch.randn(COPY)
        out = torch.empty_like(a)
        return {"eager": lambda: out.copy_(a)}

    return Workload("ceiling/copy/float32", make, ("eager",), bytes=8.0 * COPY, check=False)


WORKLOADS = [_product(torch.float32), _product(torch.bfloat16), _copy()]


@parametrize(WORKLOADS)
def test_ceiling(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
