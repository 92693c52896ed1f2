"""Builds the emulated kernels once a session."""

from __future__ import annotations

import shutil

import pytest
from host_kernels import Kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from build import build

    return Kernels(build(tmp_path_factory.mktemp("cuda_on_host")))
