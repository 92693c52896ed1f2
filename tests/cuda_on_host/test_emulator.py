"""The emulation itself: barriers, shuffles, votes, atomics, cooperative grids, and launches that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes import c_char_p, c_void_p

import pytest
import torch
from host_kernels import Kernels

sanitized = "address" in os.environ.get("SANITIZE", "").split(",")


def pointer(tensor: torch.Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("threads", [32, 128])
def test_shared_memory_and_barriers(kernels: Kernels, threads: int) -> None:
    values = torch.arange(3 * threads, dtype=torch.int32).square() % 101
    reversed_, sums = torch.empty_like(values), torch.empty(3, dtype=torch.int32)
    kernels.library.selftest_reverse_and_sum(pointer(values), pointer(reversed_), pointer(sums), 3, threads)
    assert torch.equal(reversed_.view(3, -1), values.view(3, -1).flip(1))
    assert torch.equal(sums, values.view(3, -1).sum(1, dtype=torch.int32))


def test_warp_functions(kernels: Kernels) -> None:
    out = torch.zeros(6 * 32 + 1, dtype=torch.int32)
    kernels.library.selftest_shuffles(pointer(out))
    rows, lanes = out[:-1].view(32, 6), range(32)
    assert rows[:, 0].tolist() == [n ^ 5 for n in lanes]
    assert rows[:, 1].tolist() == [n + 3 if n % 8 + 3 < 8 else n for n in lanes]
    assert rows[:, 2].tolist() == [n - 3 if n >= 3 else n for n in lanes]
    assert rows[:, 3].tolist() == [n // 4 * 4 + 1 for n in lanes]
    ballot = sum(1 << n for n in lanes if n % 2 == 1 and n > 16) - 2**32
    assert rows[:, 4].tolist() == [ballot if n % 2 == 1 else -1 for n in lanes]
    assert sorted(rows[:, 5].tolist()) == list(lanes) and out[-1] == 32


def test_cooperative_grid(kernels: Kernels) -> None:
    blocks, rounds = 5, 4
    parts, sums = torch.zeros(blocks, dtype=torch.int32), torch.zeros(rounds, blocks, dtype=torch.int32)
    kernels.library.selftest_grid_sum(pointer(parts), pointer(sums), blocks, 64, rounds)
    assert sums.tolist() == [[15 * (n + 1)] * blocks for n in range(rounds)]


def test_failed_launch_says_why(kernels: Kernels) -> None:
    kernels.library.selftest_empty_grid.restype = c_char_p
    message = kernels.library.selftest_empty_grid(None).decode()
    assert message.startswith("CUDA could not launch a kernel: invalid configuration argument")


@pytest.mark.skipif(sanitized, reason="AddressSanitizer ends the process: the next test")
def test_a_write_beyond_the_dynamic_shared_memory_is_found(kernels: Kernels) -> None:
    kernels.library.selftest_too_little_shared.restype = c_char_p
    tensors = [torch.ones(64, dtype=torch.int32) for _ in range(3)]
    pointers = [pointer(t) for t in tensors]
    assert kernels.library.selftest_too_little_shared(*pointers, 64, 0) == b""
    message = kernels.library.selftest_too_little_shared(*pointers, 64, 1).decode()
    assert "written beyond the dynamic shared memory" in message


READ = """
import ctypes, sys
library, memory, at = ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])
values, out = (ctypes.c_int * 1024)(), ctypes.c_int()  # too large for Python's own allocator
getattr(library, "selftest_read_" + memory)(values, ctypes.byref(out), 1024, at)
"""


@pytest.mark.skipif(not sanitized, reason="AddressSanitizer sees it: make sanitize")
@pytest.mark.parametrize("memory", ["shared", "global"])
def test_a_read_beyond_memory_is_found(kernels: Kernels, memory: str) -> None:
    for at, found in ((1023, False), (1024, True)):
        command = [sys.executable, "-c", READ, kernels.library._name, memory, str(at)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (child.returncode != 0) == found, child.stderr
        assert ("AddressSanitizer" in child.stderr and "READ of size 4" in child.stderr) == found
