"""Builds the emulated kernels once a session."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from host_kernels import Kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Kernels:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from build import LIBRARY, build

    # Under pytest-xdist every process has a folder of its own in a common one, and the first to come builds for all.
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(request.config, "workerinput") else base) / "cuda_on_host"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / LIBRARY).exists():
            build(folder)
    return Kernels(folder / LIBRARY)


@pytest.fixture
def device(kernels: Kernels) -> Iterator[Any]:
    """Sets how many blocks run at a time, and their shared memory: by default one block, with all of it."""
    everything = 227 * 1024

    def describe(blocks: int, shared: int = everything) -> None:
        kernels.library.set_device(blocks, shared, 8)

    yield describe
    describe(1)
