"""The directions of a layer at the same time, on two streams, where two kernels fit side by side on a GPU.

At 512 units and 16 sequences that is 1.8 times as fast forward, and 1.4 with the backward (docs/gpu-notes.md); a stack
of layers as a wave, a piece of time behind one another, was no faster, and is not done. The environment variable
``LECT11EXT_LAYER_OVERLAP=0`` switches it off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..random import in_functorch

TILE_UNITS, TEAM_ROWS = 8, 16  # of csrc/recurrent: layer_cuda.h, cuda/layer_dataflow.cuh


def is_wanted(input: Tensor) -> bool:
    if os.environ.get("LECT11EXT_LAYER_OVERLAP") == "0" or torch.compiler.is_compiling() or in_functorch():
        return False
    return type(input) in (Tensor, torch.nn.Parameter) and input.is_cuda


def from_here(given: Any) -> Any:
    """The same, with views of leaves. What another stream makes of a leaf gives back its gradient there, and autograd,
    which adds it on this one, warns; a view that is made here hands it over."""
    if isinstance(given, (tuple, list)):
        return type(given)(map(from_here, given))
    is_leaf = isinstance(given, Tensor) and given.is_leaf and given.requires_grad
    return given.view_as(given) if is_leaf and torch.is_grad_enabled() else given


@cache
def _side_stream(device: torch.device, i: int) -> torch.cuda.Stream:
    """Always the same: the allocator keeps memory for each stream apart."""
    return torch.cuda.Stream(device)


def fits_twice(input: Tensor, hidden: int, batch: int) -> bool:
    """Whether two kernels find multiprocessors at the same time."""
    device = torch.cuda.get_device_properties(input.device)
    return 2 * -(-hidden // TILE_UNITS) * -(-batch // TEAM_ROWS) <= device.multi_processor_count


class Streams:
    """One for each of some things that run at the same time, and read ``reads``; the first is the current one. On the
    CPU there are none, and everything runs in the order in which it is called."""

    def __init__(self, reads: Sequence[Tensor], count: int) -> None:
        self.streams: list[Any] = []
        if reads[0].is_cuda:
            device = reads[0].device
            current = torch.cuda.current_stream(device)
            self.streams = [current, *(_side_stream(device, i) for i in range(1, count))]
            for stream in self.streams[1:]:
                stream.wait_stream(current)
                for tensor in reads:  # their memory is not for others before the backward on this stream has read it
                    tensor.record_stream(stream)

    def on(self, i: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.streams[i]) if self.streams else nullcontext()

    def hand_over(self, tensors: Sequence[Tensor], source: int, target: int) -> None:
        """What one has computed, the other may read."""
        if self.streams and source != target:
            self.streams[target].wait_stream(self.streams[source])
            for tensor in tensors:
                tensor.record_stream(self.streams[target])


def side_by_side(reads: Sequence[Tensor], calls: Sequence[Callable[[], tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    """The results of calls that do not depend on one another."""
    streams, results = Streams(reads, len(calls)), []
    for i, call in enumerate(calls):
        with streams.on(i):
            results.append(call())
    for i, result in enumerate(results):
        streams.hand_over(result, i, 0)
    return results
