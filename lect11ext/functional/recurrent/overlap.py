"""Layers and directions at the same time, on streams of their own.

Only a large layer fills a GPU. Where two kernels fit side by side, the directions of a layer run on two streams; and a
stack of layers runs in a wave: time is cut into pieces, and while one layer is at a piece, the one below is at the
next. Its gain is not yet measured, and so only where the environment variable ``LECT11EXT_LAYER_OVERLAP`` is 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..random import in_functorch

PIECES = 4  # of time: the last layer begins when the others have done one each
LEAST_STEPS = 32  # of a piece: below, launches take longer than what they overlap
TILE_UNITS, TEAM_ROWS = 8, 16  # as csrc/recurrent/cuda/layer_plan.cuh has them


def is_wanted(input: Tensor) -> bool:
    if os.environ.get("LECT11EXT_LAYER_OVERLAP", "0") != "1" or torch.compiler.is_compiling() or in_functorch():
        return False
    return input.is_cuda and type(input) in (Tensor, torch.nn.Parameter)


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


def pieces_of(steps: int) -> list[tuple[int, int]]:
    """Where each of them begins and ends."""
    count = max(1, min(PIECES, steps // LEAST_STEPS))
    bounds = [steps * i // count for i in range(count + 1)]
    return list(pairwise(bounds))


def wave(
    layers: Sequence[Callable[[Tensor, tuple[Tensor, ...]], tuple[Any, ...]]],
    input: Tensor,
    states: Sequence[tuple[Tensor, ...]],
    time: int,
    reads: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    """Layers over one another, in one direction: ``layer(piece of the input, states)`` gives what it has over time, and
    its last states. Dimension ``time`` of the input is cut. Given back: what the last layer has over time, and the last
    states of all."""
    streams, last_states, outputs = Streams(reads, len(layers)), list(states), []
    for begin, end in pieces_of(input.size(time)):
        piece = input.narrow(time, begin, end - begin)
        for i, layer in enumerate(layers):
            with streams.on(i):
                result = layer(piece, last_states[i])
            over_time, last_states[i] = result[: -len(states[i])], result[-len(states[i]) :]
            piece = over_time[0]
            if i + 1 < len(layers):
                streams.hand_over((piece,), i, i + 1)
        outputs.append(over_time)
    # Not before: the first layer would wait for the last.
    for i, state in enumerate(last_states):
        streams.hand_over(state, i, 0)
    for over_time in outputs:
        streams.hand_over(over_time, len(layers) - 1, 0)
    return tuple(torch.cat(parts, time) for parts in zip(*outputs, strict=True)), last_states
