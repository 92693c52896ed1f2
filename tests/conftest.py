"""Fixtures of all tests: poisoned memory, devices, threads, CPU capabilities.

``pytest --device cuda`` runs them on a GPU: tensors are made there where a test does not say otherwise. Left out are
tests marked ``cpu`` and those of the CPU's capabilities; on the CPU, tests marked ``gpu``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lect11ext._load import _C

CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the tests' tensors are")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") != "cuda":
        return
    if not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        raise pytest.UsageError("--device cuda: there is no GPU, or lect11ext was built for the CPU alone")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
    torch.backends.cudnn.allow_tf32 = False  # tests of TF32 say so
    torch.set_default_device("cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        of_cpu = item.get_closest_marker("cpu") or "capability" in getattr(item, "fixturenames", ())
        if of_cpu if on_gpu else item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="a test of the CPU" if on_gpu else "needs --device cuda"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Said at once: a GPU's minutes may end before the summary."""
    if report.failed and torch.get_default_device().type == "cuda" and "PYTEST_XDIST_WORKER" not in os.environ:
        said = report.longreprtext.splitlines()
        print(f"FAILED {report.nodeid}: {next((x for x in said if x.startswith('E  ')), said[-1:])}", flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Some errors leave a process without its GPU. It ends here, so that they are not every later test's errors."""
    report = yield
    if report.failed and item.config.getoption("--device") == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{item.nodeid}: {error}", file=sys.__stderr__, flush=True)
            os._exit(3)
    return report


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh memory is NaN, so that an element that a kernel forgets shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


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
