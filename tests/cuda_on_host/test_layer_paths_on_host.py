"""The ways in which a layer's kernels are spread over blocks and shared memory: those that wait at a counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_operands import BF16, F16, F32
from host_kernels import Kernels
from layer_case import CELLS, TYPES, Layer
from layer_check import LSTM, NORM, OF_CELLS, OPTIONS, check


@pytest.fixture(autouse=True)
def by_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LECT11EXT_LAYER_DATAFLOW", "0")


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
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_all_types(kernels: Kernels, device: Any, cell: str, types: tuple[torch.dtype, bool]) -> None:
    device(8)
    check(Layer(cell, dtype=types[0], tf32=types[1], steps=3, hidden=90), kernels)


@pytest.mark.parametrize("cell, options", OF_CELLS)
def test_options_over_several_blocks(kernels: Kernels, device: Any, cell: str, options: str) -> None:
    device(8)
    check(Layer(cell, dtype=F16, hidden=37, **(OPTIONS | LSTM | NORM)[options]), kernels)
    assert kernels.library.blocks_together() == 5


@pytest.mark.parametrize("cell", CELLS)
def test_tiles_side_by_side(kernels: Kernels, device: Any, cell: str) -> None:
    """One, two, four, and six, too many for that."""
    for blocks, hidden in ((8, 60), (4, 60), (2, 60), (2, 90)):
        device(blocks)
        check(Layer(cell, dtype=BF16, steps=2, batch=19, hidden=hidden), kernels)


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
