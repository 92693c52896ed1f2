"""Masks of blocks by the kernels of sm_90a, which leave barred tiles out and take open ones as plain ones, emulated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cell_operands import BF16
from host_kernels import Kernels
from test_attention_hopper_on_host import ONE, check_backward, hopper, make, right_device
from test_attention_on_host import CAUSAL, check_forward
from torch import Tensor

__all__ = ["hopper", "right_device"]  # fixtures

QUERIES, KEYS = 200, 700
Queries, Keys = torch.arange(QUERIES)[:, None], torch.arange(KEYS)
# What is seen. Tiles are of 64 queries and keys, and the kernels take 128 of either at a time.
MASKS: dict[str, Callable[[], Tensor]] = {
    "padding": lambda: Keys < 330,
    "padding on the left": lambda: Keys >= 330,
    "a block": lambda: (Keys >= 256) & (Keys < 384),
    "holes": lambda: Keys // 64 % 3 != 1,
    "all": lambda: Keys >= 0,
    "nothing": lambda: Keys < 0,
    "documents": lambda: Queries // 64 == Keys // 192,
    "documents that begin anywhere": lambda: (Queries + 20) // 70 == (Keys + 90) // 250,
    "rows that see nothing": lambda: (Queries % 128 < 64) & (Keys < 300),
    "a row of tiles": lambda: (Queries // 64 == 1) | (Keys < 65),
    "one element": lambda: (Queries == 131) & (Keys == 448),
}


def masked(name: str, dim: int, kind: str, keys: int = KEYS, **options: Any) -> Any:
    seen = MASKS[name]()[..., :keys].contiguous()
    size = (1, 1, QUERIES if seen.ndim == 2 else 1, keys)
    case = make(dim, dtype=BF16, queries=QUERIES, keys=keys, mask=kind, mask_size=size, **{**ONE, **options})
    if kind == "bool":
        case.tensors["mask"] = seen.view(size)
    else:
        case.tensors["mask"] = torch.zeros(size, dtype=case.tensors["mask"].dtype).masked_fill(
            ~seen.view(size), -math.inf
        )
    return case


def check(hopper: Kernels, case: Any) -> None:
    check_forward(hopper, case)
    check_backward(hopper, case, grad_mask=None)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_bool(hopper: Kernels, name: str, dim: int) -> None:
    check(hopper, masked(name, dim, "bool"))


@pytest.mark.parametrize("name", MASKS)
def test_rows_of_sixteen_bytes(hopper: Kernels, name: str) -> None:
    """Read as such, to find which tiles have what."""
    check(hopper, masked(name, 64, "bool", keys=688))


@pytest.mark.parametrize("kind", ["storage", "float"])
@pytest.mark.parametrize("name", MASKS)
def test_added(hopper: Kernels, name: str, kind: str) -> None:
    """Broadcast over heads, zero or −∞, of which zero tiles are as if there were no mask."""
    check(hopper, masked(name, 64, kind, heads=2, kv_heads=1))


@pytest.mark.parametrize(
    "options",
    [{"window": CAUSAL, "bottom_right": True}, {"window": (230, 90)}, {"alibi": True}, {"dropout": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("name", ["padding", "holes", "documents that begin anywhere", "one element"])
def test_with_others(hopper: Kernels, name: str, options: dict[str, Any]) -> None:
    check(hopper, masked(name, 64, "bool", **options))


@pytest.mark.parametrize(
    "size", [(2, 1, 1, KEYS), (1, 2, QUERIES, KEYS), (2, 2, 1, KEYS), (2, 1, QUERIES, KEYS)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "storage"])
@pytest.mark.parametrize(("dim", "kv_heads"), [(64, 2), (128, 1)])
def test_of_batches_and_heads(
    hopper: Kernels, dim: int, kv_heads: int, kind: str, size: tuple[int, int, int, int]
) -> None:
    """Each of its own blocks, barred at random; of heads that share keys too."""
    case = make(
        dim, dtype=BF16, queries=QUERIES, keys=KEYS, mask=kind, mask_size=size, batch=2, heads=2, kv_heads=kv_heads
    )
    blocks = torch.rand(*size[:2], -(-size[2] // 64), -(-KEYS // 64), generator=torch.Generator().manual_seed(1)) < 0.5
    seen = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, : size[2], :KEYS]
    mask = case.tensors["mask"]
    case.tensors["mask"] = seen if kind == "bool" else torch.zeros_like(mask).masked_fill(~seen, -math.inf)
    check(hopper, case)
