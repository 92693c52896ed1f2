"""Kernels for floats that are known to be finite (csrc/attention/cuda/dot_product_finite.cuh), where that pays."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lect11ext import functional
from tests.helpers import assert_within_rule

pytestmark = pytest.mark.gpu


def operands(columns: int, length: int, device: str) -> list[Tensor]:
    return [torch.randn(1, 8, length, columns, device=device) for _ in range(4)]


def askew(x: Tensor) -> Tensor:
    """The same in rows that begin at odd multiples of four bytes, which are not asked about."""
    return torch.empty(*x.shape[:-1], x.shape[-1] + 1, device=x.device)[..., :-1].copy_(x)


def run(args: list[Tensor], **options: bool) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    out = functional.scaled_dot_product_attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, args[3])]


def plain(args: list[Tensor], is_causal: bool) -> list[Tensor]:
    leaves = [a.detach().requires_grad_() for a in args[:3]]
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=is_causal)
        return [out.detach(), *torch.autograd.grad(out, leaves, args[3])]


LENGTH = 1600  # so many products that all operands are asked


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("columns", [64, 96, 128])
def test_by_the_rule(columns: int, is_causal: bool, device: str) -> None:
    args = operands(columns, LENGTH, device)
    exact = plain([a.double() for a in args], is_causal)
    for ours, rival, wide in zip(run(args, is_causal=is_causal), plain(args, is_causal), exact, strict=True):
        assert_within_rule(ours, rival, wide)


@pytest.mark.parametrize("bad", [None, math.inf, math.nan, 0.9999 * torch.finfo(torch.float32).max])
@pytest.mark.parametrize("columns", [64, 128])
def test_the_same_bits_as_any_floats(columns: int, bad: float | None, device: str) -> None:
    args = operands(columns, LENGTH, device)
    if bad is not None:
        args[1][0, 3, 11, 5] = args[2][0, 4, 17, 6] = bad
    results = [run(args), run([askew(a) for a in args])]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.nan_to_num(7.25), other.nan_to_num(7.25))
        assert bad is not None or one.isfinite().all()
