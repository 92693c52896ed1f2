"""Which weights dropout keeps, where attention goes through ATen."""

from __future__ import annotations

import pytest
import torch
from host_kernels import Integers, Kernels


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("key", [(7, 0), (-3, 2**32 - 3), (42, -2)])  # the counter carries and wraps around
@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (2, 3, 5, 37), (1, 2, 3, 16), (1, 2, 300, 1000), (2, 0, 4, 5), (2, 3, 4, 0)]
)
def test_same_as_on_the_cpu(
    kernels: Kernels, size: tuple[int, ...], key: tuple[int, int], p: float, shift: int
) -> None:
    expected = torch.ops.lect11ext.attention_dropout_mask(torch.tensor(key), size, p)
    kept, rows = Integers(*size, dtype=torch.uint8, shift=shift), size[0] * size[1] * size[2]
    kernels.attention_dropout_mask(kept=kept, key=torch.tensor(key), rows=rows, columns=size[3], p=p)
    assert torch.equal(kept.checked(), expected.to(torch.uint8))
