"""Layers whose blocks see in what they read whether it is there (csrc/recurrent/cuda/layer_dataflow.cuh)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cell_operands import BF16, F16, F32
from host_kernels import Kernels
from layer_case import Layer
from layer_check import check

KINDS = ["lstm", "gru"]
TYPES = [(BF16, False), (F16, False), (F32, True)]


def plain(cell: str, types: tuple[torch.dtype, bool] = TYPES[0], **options: Any) -> Layer:
    return Layer(cell, dtype=types[0], tf32=types[1], **{"kept_grads": False, **options})


@pytest.fixture(params=["1", "2"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("LECT11EXT_LAYER_TILES", request.param)
    return int(request.param)


@pytest.mark.parametrize("blocks, batch, hidden", [(8, 3, 24), (3, 17, 24), (12, 40, 40), (9, 32, 72), (20, 5, 136)])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("cell", KINDS)
def test_teams(
    kernels: Kernels, device: Any, cell: str, types: tuple[torch.dtype, bool], blocks: int, batch: int, hidden: int,
    tiles: int,
) -> None:  # fmt: skip
    device(blocks)
    check(plain(cell, types, batch=batch, hidden=hidden), kernels)
    members = math.ceil(hidden / 8 / tiles)
    assert kernels.library.blocks_together() == members * min(math.ceil(batch / 16), blocks // members)


@pytest.mark.parametrize("hidden, types", [(264, TYPES[0]), (520, TYPES[1]), (136, TYPES[2]), (264, TYPES[2])], ids=str)
@pytest.mark.parametrize("cell", KINDS)
def test_more_chunks_a_warp(
    kernels: Kernels, device: Any, cell: str, hidden: int, types: tuple[torch.dtype, bool], tiles: int
) -> None:
    device(66)
    check(plain(cell, types, steps=2, hidden=hidden), kernels)
    assert kernels.library.blocks_together() == math.ceil(hidden / 8 / tiles)


@pytest.mark.parametrize("cell, types, hidden, blocks", [
    ("gru", TYPES[0], 1032, 129), ("lstm", TYPES[2], 520, 65), ("lstm", TYPES[0], 1064, 67), ("gru", TYPES[2], 528, 33),
])  # fmt: skip
def test_eight_chunks_a_warp(
    kernels: Kernels, device: Any, cell: str, types: tuple[torch.dtype, bool], hidden: int, blocks: int
) -> None:
    """Also of two tiles, half of whose weights are in shared memory."""
    device(blocks)
    check(plain(cell, types, steps=2, batch=2, hidden=hidden), kernels)
    assert kernels.library.blocks_together() == blocks


@pytest.mark.parametrize("cell", KINDS)
def test_from_the_end_and_batch_first(kernels: Kernels, device: Any, cell: str) -> None:
    device(20)
    check(plain(cell, batch=35, hidden=40, reverse=True, batch_first=True), kernels)
    assert kernels.library.blocks_together() == 15


@pytest.mark.parametrize("cell", KINDS)
def test_without_what_a_backward_needs(kernels: Kernels, device: Any, cell: str) -> None:
    device(5)
    layer = plain(cell, batch=20, hidden=40)
    kept, bare = layer.run_forward(kernels), layer.run_forward(kernels, save=False)
    assert all(torch.equal(bare[name].checked(), kept[name].checked()) for name in bare if name != "cells")


@pytest.mark.parametrize("batch", [20, 150])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_kept_every_few_steps(kernels: Kernels, device: Any, batch: int, reverse: bool) -> None:
    """Of all parts of a batch, in the order of the steps."""
    device(4)
    layer = plain("lstm", steps=8, batch=batch, hidden=24, reverse=reverse, batch_first=reverse)
    some = layer.run_forward(kernels, every=3)["cells"].checked()
    cells = layer.run_forward(kernels)["cells"].checked()
    cells = cells.transpose(0, 1).flip(0) if reverse else cells
    assert torch.equal(some, cells[[2, 5]])


@pytest.mark.parametrize("cell", KINDS)
def test_nan_is_no_absence(kernels: Kernels, device: Any, cell: str) -> None:
    """Not even the NaN with which absence is written: it passes through arithmetic, which gives another."""
    device(5)
    layer = plain(cell, batch=4, hidden=40)
    layer.h.view(torch.int16)[1, 3] = -1
    layer.pre.view(torch.int16)[2, 0, 5] = -1
    out = layer.run_forward(kernels)["out"].tensor
    assert out[:, 1].isnan().all() and not out[:, 2:].isnan().any()
    assert out[2:, 0].isnan().any() and not out[:2, 0].isnan().any()


@pytest.mark.parametrize("cell", KINDS)
def test_sums_without_room_for_two_steps(kernels: Kernels, device: Any, cell: str, tiles: int) -> None:
    device(9, 150 * 1024 if tiles == 1 else 80 * 1024)
    check(plain(cell, batch=60 // tiles, hidden=72), kernels)
    assert kernels.library.blocks_together() == (9 if tiles == 1 else 5)


@pytest.mark.parametrize("cell", KINDS)
def test_a_batch_in_parts(kernels: Kernels, device: Any, cell: str, tiles: int) -> None:
    device(4)
    check(plain(cell, batch=150, hidden=24, steps=2, batch_first=True), kernels)
    assert kernels.library.blocks_together() == (3 if tiles == 1 else 4)


def test_what_it_does_not_take(kernels: Kernels, device: Any) -> None:
    """Rows that do not begin at 16 bytes, too many tiles, and gradients of what a forward keeps."""
    for blocks, layer in [
        (20, plain("lstm", hidden=36)),
        (3, plain("gru", hidden=72)),
        (20, plain("lstm", hidden=40, kept_grads=True)),
        (20, plain("lstm", hidden=40, clip=0.5)),
        (20, plain("gru", hidden=40, truncate=2)),
    ]:
        device(blocks)
        check(layer, kernels)
