"""Kernels for floats that are known to be finite (csrc/attention/cuda/dot_product_finite.cuh), where that pays."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lect11ext.functional import scaled_dot_product_attention as sdpa
from tests.helpers import check

pytestmark = pytest.mark.gpu


LENGTH = 1600  # so many products that all operands are asked
# Eight have too few blocks for an H100, so that keys are cut into parts; twelve have enough.
HEADS = pytest.mark.parametrize("heads", [8, 12])


def operands(columns: int, device: str, heads: int) -> list[Tensor]:
    return [torch.randn(1, heads, LENGTH, columns, device=device).requires_grad_() for _ in range(3)]


def askew(x: Tensor) -> Tensor:
    """The same in rows that begin at odd multiples of four bytes, which are not asked about."""
    return torch.empty(*x.shape[:-1], x.shape[-1] + 1, device=x.device)[..., :-1].copy_(x)


def plain(*args: Tensor, is_causal: bool) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        return torch.nn.functional.scaled_dot_product_attention(*args, is_causal=is_causal)


@HEADS
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("columns", [64, 96, 128])
def test_by_the_rule(columns: int, is_causal: bool, heads: int, device: str) -> None:
    options = {"is_causal": is_causal}
    check(partial(sdpa, **options), partial(plain, **options), operands(columns, device, heads))


@HEADS
@pytest.mark.parametrize("bad", [None, math.inf, math.nan, 0.9999 * torch.finfo(torch.float32).max])
@pytest.mark.parametrize("columns", [64, 128])
def test_the_same_bits_as_any_floats(columns: int, bad: float | None, heads: int, device: str) -> None:
    args, results = [x.detach() for x in operands(columns, device, heads)], []
    if bad is not None:
        args[1][0, 3, 11, 5] = args[2][0, 4, 17, 6] = bad
    cotangent = torch.randn_like(args[0])
    for laid in (torch.clone, askew):
        leaves = [laid(a).requires_grad_() for a in args]
        out = sdpa(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, laid(cotangent))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))
        assert bad is not None or one.isfinite().all()
