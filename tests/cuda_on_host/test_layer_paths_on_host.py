"""The ways in which a layer's kernels are spread over blocks, clusters, shared memory and registers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cell_operands import BF16, F16, F32, F64
from host_kernels import Kernels
from layer_case import CELLS, TYPES, Layer
from layer_check import LSTM, NORM, OF_CELLS, OPTIONS, check


def sum_bytes(rows: int, tiles: int, size: int) -> int:
    """Of the warps' sums of a block, and of two numbers a row: what a kernel has in shared memory besides all else."""
    return (8 * rows * (tiles | 1) * 8 + 4 * rows * 2) * size


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("blocks, batch", [(1, 1), (1, 35), (3, 17), (5, 40), (20, 33)])
def test_teams_and_passes(
    kernels: Kernels, device: Any, cell: str, dtype: torch.dtype, blocks: int, batch: int
) -> None:
    """Several tiles a block, several teams, several groups of rows."""
    device(blocks)
    check(Layer(cell, dtype=dtype, steps=2, batch=batch), kernels)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden, blocks", [(5, 1), (20, 4), (70, 8), (128, 8), (200, 8), (256, 8)])
def test_clusters(kernels: Kernels, device: Any, cell: str, hidden: int, blocks: int) -> None:
    """With several clusters, and several tiles a block."""
    device(19, clusters=True)
    check(Layer(cell, dtype=BF16, steps=3, batch=35, hidden=hidden, norm=cell != "gru_reset_first"), kernels)
    assert kernels.library.blocks_together() == blocks


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_clusters_of_all_types(kernels: Kernels, device: Any, cell: str, types: tuple[torch.dtype, bool]) -> None:
    device(8, clusters=True)
    check(Layer(cell, dtype=types[0], tf32=types[1], steps=3, hidden=90), kernels)
    assert kernels.library.blocks_together() == 8  # six of them own two tiles


@pytest.mark.parametrize("cell, options", OF_CELLS)
def test_clusters_with_options(kernels: Kernels, device: Any, cell: str, options: str) -> None:
    device(8, clusters=True)
    check(Layer(cell, dtype=F16, hidden=37, **(OPTIONS | LSTM | NORM)[options]), kernels)
    assert kernels.library.blocks_together() == 8  # five of them own a tile


@pytest.mark.parametrize("size, hidden", [(2, 60), (4, 60), (16, 260)])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_first"])
def test_clusters_of_other_sizes(
    kernels: Kernels, device: Any, monkeypatch: pytest.MonkeyPatch, cell: str, size: int, hidden: int
) -> None:
    monkeypatch.setenv("LECT11EXT_LAYER_CLUSTER", str(size))
    device(16, clusters=True)
    check(Layer(cell, dtype=BF16, steps=2, batch=18, hidden=hidden), kernels)
    assert kernels.library.blocks_together() == size


def test_what_clusters_do_not_take(kernels: Kernels, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many tiles, weights or rows, or fewer multiprocessors than blocks."""
    for blocks, layer in [
        (11, Layer("lstm", dtype=BF16, steps=1, batch=2, hidden=257)),
        (11, Layer("lstm", dtype=F64, steps=1, batch=2, hidden=256)),
        (9, Layer("gru", dtype=BF16, steps=1, batch=3000, hidden=40)),
        (7, Layer("gru", dtype=BF16, steps=1, batch=2, hidden=70)),
    ]:
        device(blocks, 100 * 1024, clusters=True)
        check(layer, kernels)
        assert kernels.library.blocks_together() not in (0, 8), layer
    monkeypatch.setenv("LECT11EXT_LAYER_CLUSTER", "0")
    device(5, clusters=True)
    check(Layer("lstm", dtype=BF16, steps=2, hidden=40), kernels)
    assert kernels.library.blocks_together() == 5


def test_clusters_need_their_own_build_and_room(kernels: Kernels, device: Any) -> None:
    """Code for older devices has no clusters; where fewer run at a time, each takes more rows."""
    device(19, clusters=True)
    layer = Layer("lstm", dtype=BF16, steps=2, batch=70, hidden=60)
    kernels.library.set_clusters(1000, 80)
    check(layer, kernels)
    assert kernels.library.blocks_together() == 16  # two teams over the grid
    for most in (1, 2):
        kernels.library.set_clusters(most, 90)
        check(layer, kernels)
        assert kernels.library.blocks_together() == 8
    kernels.library.set_clusters(0, 90)
    check(layer, kernels)
    assert kernels.library.blocks_together() == 16


@pytest.mark.parametrize("size", ["3", "12", "-1", "32", "many"])
def test_odd_sizes_of_clusters(kernels: Kernels, device: Any, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("LECT11EXT_LAYER_CLUSTER", size)
    device(40, clusters=True)
    check(Layer("gru", dtype=BF16, steps=2, hidden=60), kernels)
    assert kernels.library.blocks_together() == 8  # over the grid: as many blocks as tiles


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype, tf32", [(F32, True), (BF16, False)])
@pytest.mark.parametrize("registers", [True, False])
def test_weights_in_registers(
    kernels: Kernels, device: Any, monkeypatch: pytest.MonkeyPatch, cell: str, dtype: torch.dtype, tf32: bool,
    registers: bool,
) -> None:  # fmt: skip
    """Or in shared memory: one tile, two, four side by side, and six, too many for that."""
    monkeypatch.setenv("LECT11EXT_LAYER_REGISTERS", str(int(registers)))
    for blocks, hidden in ((8, 60), (4, 60), (2, 60), (2, 90)):
        device(blocks)
        layer = Layer(cell, dtype=dtype, tf32=tf32, steps=2, batch=19, hidden=hidden)
        layer.run_forward(kernels)
        own_tiles = math.ceil(math.ceil(hidden / 8) / blocks)
        states = 19 * own_tiles * 8 * 4 * (2 if cell == "lstm" else 1)
        least = sum_bytes(16, 4 if cell == "lstm" else 3, 4) + states
        in_shared = kernels.library.shared_bytes() - least
        assert (in_shared < 16) == (registers and hidden == 60), (blocks, hidden, in_shared)
        check(layer, kernels)


@pytest.mark.parametrize("cell", CELLS)
def test_states_beyond_shared_memory(kernels: Kernels, device: Any, cell: str) -> None:
    device(1)
    check(Layer(cell, dtype=BF16, steps=2, batch=150, hidden=40, hidden_mask=True), kernels)


def test_more_rows_than_a_pass(kernels: Kernels, device: Any) -> None:
    device(1)
    check(Layer("lstm", dtype=BF16, steps=2, batch=150, hidden=5, norm=True), kernels)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_beyond_shared_memory(kernels: Kernels, device: Any, cell: str) -> None:
    for shared in (20 * 1024, 24 * 1024, 40 * 1024):
        device(2, shared)
        check(Layer(cell, steps=2, hidden=90), kernels)
