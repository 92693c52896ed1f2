"""Builds the emulated kernels once a session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from host_kernels import Kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from build import build

    return Kernels(build(tmp_path_factory.mktemp("cuda_on_host")))


@pytest.fixture
def device(kernels: Kernels) -> Iterator[Any]:
    """Sets how many blocks run at a time, and their shared memory: by default one block, with all of it."""
    everything = 227 * 1024

    def describe(blocks: int, shared: int = everything) -> None:
        kernels.library.set_device(blocks, shared, 8)

    yield describe
    describe(1)
