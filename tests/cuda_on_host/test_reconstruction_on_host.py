"""The reconstruction loss, forward and backward, against float64 PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from host_kernels import Kernels, Output, assert_near, make_views
from loss_structs import LIKELIHOODS
from torch import Tensor

from lect11ext import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = [(3, 5), (7, 1), (4, 7), (20, 2), (1, 1024), (2, 1023), (3, 1025), (2, 2500), (300, 36)]


def fields(args: Sequence[Tensor | None], likelihood: str, grad: Tensor | None = None) -> dict[str, Any]:
    x = args[0]
    assert x is not None
    shape, views = make_views(x.shape, *args, *([] if grad is None else [grad]))
    out = dict(
        shape=shape, input=views[0], target=views[1], logvar=views[2], weight=views[3],
        compute_double=compute(args) == F64, likelihood=LIKELIHOODS.index(likelihood), streams=False,
    )  # fmt: skip
    return out if grad is None else out | {"grad": views[4]}


def compute(args: Sequence[Tensor | None]) -> torch.dtype:
    return F64 if any(a is not None and a.dtype == F64 for a in args) else F32


def check(
    kernels: Kernels, args: Sequence[Tensor | None], likelihood: str, reduction: str = "sum_features", shift: int = 0
) -> None:
    x, t = args[:2]
    assert x is not None and t is not None
    leaves = [None if a is None else a.double().expand(x.shape).clone().requires_grad_() for a in args]
    expected = reference.reconstruction_loss(
        leaves[0], leaves[1], likelihood, logvar=leaves[2], weight=leaves[3], reduction=reduction
    )
    rows = reduction == "sum_features"
    tiles = kernels.tiles(x.numel() // x.size(-1), x.size(-1)) if rows else kernels.tiles(1, x.numel())
    elements = reduction == "none"
    sums = tiles.rows if tiles.tiles_per_row == 1 else tiles.count
    loss = Output(*(x.shape if elements else [sums]), dtype=compute(args), shift=shift)
    kernels.reconstruction_forward(**fields(args, likelihood), tiles=tiles, loss=loss, loss_elements=elements)
    got = loss.checked()
    got = got.view(tiles.rows, -1).sum(1).view(x.shape[:-1]) if rows else got.sum() if reduction == "sum" else got
    tolerance = 2e-6 if compute(args) == F32 else 1e-13
    assert_near(got, expected.detach(), units=40, atol=tolerance * expected.abs().max().item())

    grad = torch.randn(expected.shape, dtype=F64).to(compute(args))
    present = [a for a in leaves if a is not None]
    wanted = iter(torch.autograd.grad(expected, present, grad.double(), allow_unused=True, materialize_grads=True))
    over = (grad.unsqueeze(-1) if rows else grad).expand(x.shape)
    dtypes = [x.dtype, t.dtype, compute(args), compute(args)]
    names = ["grad_input", "grad_target", "grad_logvar", "grad_weight"]
    outputs = {
        name: Output(*x.shape, dtype=dtype, shift=shift)
        for name, dtype, a in zip(names, dtypes, args, strict=True)
        if a is not None
    }
    kernels.reconstruction_backward(
        **fields(args, likelihood, over), tiles=tiles, grad_scale=1.0, grad_input_dtype=x.dtype,
        grad_target_dtype=t.dtype, **outputs,
    )  # fmt: skip
    for output in outputs.values():
        want = next(wanted)
        assert_near(output.checked(), want, units=4, atol=tolerance * max(1, want.abs().max().item()))


def operands(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    x, t, v, w = torch.randn(4, *shape, dtype=F64)
    w[..., ::3] = 0
    return [a.to(dtype) for a in (2 * x, t.sigmoid(), v, w)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_agrees(kernels: Kernels, dtype: torch.dtype, likelihood: str) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        x, t, v, w = operands(*shape, dtype=dtype)
        check(kernels, [x, t, None, None], likelihood)
        check(kernels, [x, t, v if likelihood == "gaussian" else None, w], likelihood)


@pytest.mark.parametrize("reduction", ["none", "sum_features", "sum"])
def test_misaligned_strided_and_mixed(kernels: Kernels, reduction: str) -> None:
    torch.manual_seed(0)
    for dtype in (F32, BF16):
        x, t, v, w = operands(33, 64, dtype=dtype)
        check(kernels, [x, t, v, w], "gaussian", reduction, shift=1)
        check(kernels, [x.t().contiguous().t(), t, v, None], "gaussian", reduction)
        check(kernels, [x, t, v[:1], w[:, :1]], "gaussian", reduction)
        check(kernels, [x, t[:1].expand(33, 64), v[0, :1], None], "gaussian", reduction)
        check(kernels, [x, t.float(), None, w.double()], "bernoulli", reduction)


def test_zero_weight_hides_nan(kernels: Kernels) -> None:
    x = torch.tensor([[1.0, math.nan, 2.0, math.inf]])
    t, w = torch.full((1, 4), 0.5), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    for likelihood in LIKELIHOODS:
        loss, tiles = Output(1, dtype=F32), kernels.tiles(1, 4)
        kernels.reconstruction_forward(
            **fields([x, t, None, w], likelihood), tiles=tiles, loss=loss, loss_elements=False
        )
        assert loss.checked().isfinite().all()
        grad = Output(1, 4, dtype=F32)
        given = fields([x, t, None, w], likelihood, torch.ones(1, 1).expand(1, 4))
        kernels.reconstruction_backward(
            **given, tiles=tiles, grad_scale=1.0, grad_input=grad, grad_input_dtype=F32, grad_target_dtype=F32
        )
        assert grad.checked()[0, [1, 3]].tolist() == [0, 0] and grad.checked().isfinite().all()
