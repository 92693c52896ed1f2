"""Fixtures of all tests: poisoned memory, devices, threads, CPU capabilities."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lect11ext._load import _C

CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory is NaN, so that an element that a kernel forgets shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        pytest.skip("no GPU, or a CPU-only build")
    return request.param


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    if CAPABILITIES.index(request.param) > CAPABILITIES.index(_C.best_cpu_capability()):
        pytest.skip("beyond this machine")
    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture(params=DTYPES, ids=lambda t: str(t)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
