"""What the tests of the LSTM's and the GRU's elementwise halves share: sizes, operands and the comparison."""

from __future__ import annotations

import math
import mmap

import torch
from host_kernels import Output, assert_near
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# The stand-in's device holds 2048 threads: up to there one unit a thread, then vectors where H allows them.
SIZES = [(1, 1), (3, 5), (2, 8), (64, 40), (33, 66), (37, 129)]
DTYPES = [F32, F64, BF16, F16]


class Draw:
    """Random operands, the same in every run."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *size: int, spread: float = 1.5) -> Tensor:
        return (spread * torch.randn(size, dtype=F64, generator=self.generator)).to(self.dtype)

    def state(self, batch: int, hidden: int, gap: int) -> Tensor:
        """[batch, hidden] whose rows lie hidden + gap apart, NaN between them."""
        memory = torch.full((batch, hidden + gap), math.nan, dtype=self.dtype)
        memory[:, :hidden] = self(batch, hidden, spread=1.0)
        return memory[:, :hidden]


def near(output: Output, expected: Tensor, units: float = 8) -> None:
    """Within a few roundings of the largest value: a gradient is a product of factors rounded to storage."""
    got, wanted = output.checked(), expected.detach()
    largest = wanted.abs().nan_to_num(0.0).max().item()
    assert_near(got, wanted.view(got.shape), units=units, atol=units * torch.finfo(got.dtype).eps * largest)


def far_apart(state: Tensor) -> Tensor:
    """The same rows, too far apart for an offset of 32 bits; the memory between them is never touched."""
    rows, cols = state.shape
    apart, no_reserve = 2**31 + 8, 0x4000  # MAP_NORESERVE
    size = ((rows - 1) * apart + cols) * state.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=state.dtype).as_strided((rows, cols), (apart, 1)).copy_(state)
