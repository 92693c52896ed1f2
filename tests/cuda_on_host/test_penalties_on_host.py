"""Penalized activations, forward and backward, against float64 PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from host_kernels import Kernels, Output, assert_near, make_views
from loss_structs import ACTIVATIONS, PENALTIES
from torch import Tensor

from lect11ext.reference.autoencoder.penalties import penalized_activation as plain

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
CASES = list(itertools.product(ACTIVATIONS, PENALTIES))
SHAPES = [(3, 5), (7, 1), (4, 7), (20, 2), (1, 1024), (2, 1023), (3, 1025), (2, 2500), (300, 36), (41, 130)]


def fields(x: Tensor, scale: Tensor | None, activation: str, penalty: str, *grads: Tensor | None) -> dict[str, Any]:
    shape, views = make_views(x.shape, x, scale, *grads)
    out = dict(
        shape=shape, input=views[0], scale=views[1], compute_double=x.dtype == F64,
        activation=ACTIVATIONS.index(activation), penalty=PENALTIES.index(penalty), streams=False,
    )  # fmt: skip
    return out | dict(zip(("grad_output", "grad_penalty"), views[2:], strict=False))


def compute(x: Tensor) -> torch.dtype:
    return F64 if x.dtype == F64 else F32


def forward(kernels: Kernels, x: Tensor, scale: Tensor | None, activation: str, penalty: str, shift: int = 0) -> Any:
    rows, cols = x.numel() // x.size(-1), x.size(-1)
    output = Output(*x.shape, dtype=x.dtype, shift=shift)
    given = fields(x, scale, activation, penalty)
    if penalty == "mean":
        blocks = kernels.column_blocks(rows, cols, 5)
        sums = Output(blocks.runs, cols, dtype=compute(x))
        kernels.penalty_forward(**given, blocks=blocks, output=output, output_dtype=x.dtype, sums=sums)
        return output.checked(), sums.checked().sum(0) / rows
    tiles = kernels.tiles(rows, cols)
    sums = Output(rows * tiles.tiles_per_row, dtype=compute(x))
    kernels.penalty_forward(**given, tiles=tiles, output=output, output_dtype=x.dtype, sums=sums)
    return output.checked(), sums.checked().view(rows, -1).sum(1).view(x.shape[:-1])


def check(kernels: Kernels, x: Tensor, scale: Tensor | None, activation: str, penalty: str, shift: int = 0) -> None:
    leaves = [t.double().requires_grad_() for t in (x, scale) if t is not None]
    expected = plain(leaves[0], leaves[1] if scale is not None else None, activation, penalty)
    code, sums = forward(kernels, x, scale, activation, penalty, shift)
    assert_near(code, expected[0].detach(), units=4, atol=1e-12)
    assert_near(sums, expected[1].detach(), units=40, atol=1e-6 if compute(x) == F32 else 1e-13)

    rows, cols = x.numel() // x.size(-1), x.size(-1)
    grad_code = torch.randn(x.shape, dtype=F64).to(x.dtype)
    grad_sums = torch.randn(expected[1].shape, dtype=F64).to(compute(x))
    if not expected[1].requires_grad:  # the slope of a linear activation
        expected = (expected[0], expected[1] + 0 * leaves[0].sum())
    wanted = torch.autograd.grad(expected, leaves, [grad_code.double(), grad_sums.double()])
    over = (grad_sums if penalty == "mean" else grad_sums.unsqueeze(-1)).expand(x.shape)
    blocks = kernels.column_blocks(rows, cols, 5)
    for sums_wanted in {False, scale is not None}:
        grad_input = Output(*x.shape, dtype=x.dtype, shift=shift)
        grad_scale = Output(blocks.runs, cols, dtype=compute(x)) if sums_wanted else None
        kernels.penalty_backward(
            **fields(x, scale, activation, penalty, grad_code, over), blocks=blocks, grad_input=grad_input,
            grad_penalty_scale=1 / rows if penalty == "mean" else 1.0, grad_input_dtype=x.dtype, grad_scale=grad_scale,
        )  # fmt: skip
        tolerance = 2e-6 if compute(x) == F32 else 1e-13
        assert_near(grad_input.checked(), wanted[0], units=4, atol=tolerance * wanted[0].abs().max().item())
        if grad_scale is not None:
            got = grad_scale.checked().sum(0)
            assert_near(got, wanted[1], units=40, atol=tolerance * rows * wanted[1].abs().max().item())


def operands(*shape: int, dtype: torch.dtype, penalty: str) -> tuple[Tensor, Tensor | None]:
    x = (2 * torch.randn(shape, dtype=F64)).to(dtype)
    return x, None if penalty == "mean" else torch.rand(shape[-1]).to(compute(x))


@pytest.mark.parametrize(("activation", "penalty"), CASES)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_agrees(kernels: Kernels, dtype: torch.dtype, activation: str, penalty: str) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        x, scale = operands(*shape, dtype=dtype, penalty=penalty)
        for given in {scale, None}:
            check(kernels, x, given, activation, penalty)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_misaligned_strided_and_mixed(kernels: Kernels, penalty: str) -> None:
    torch.manual_seed(0)
    for dtype in (F32, BF16):
        x, scale = operands(33, 64, dtype=dtype, penalty=penalty)
        check(kernels, x, scale, "tanh", penalty, shift=1)
        shifted = torch.empty(33 * 64 + 1, dtype=dtype)[1:].view(33, 64).copy_(x)
        check(kernels, shifted, scale, "tanh", penalty)
        check(kernels, torch.randn(64, 33).to(dtype).t(), scale, "tanh", penalty)
        check(kernels, x[:1].expand(33, 64), scale, "tanh", penalty)
        check(kernels, x, None, "tanh", penalty)
        if scale is not None:
            check(kernels, x, scale.bfloat16(), "tanh", penalty)
            check(kernels, x, torch.rand(128)[::2], "tanh", penalty)


def test_one_gradient_alone_and_selection(kernels: Kernels) -> None:
    x = torch.tensor([[-1.0, 2.0, 3.0, -4.0]])
    blocks = kernels.column_blocks(1, 4, 5)
    infinite = torch.tensor([[torch.inf, 1.0, 1.0, torch.inf]])
    grad = Output(1, 4, dtype=F32)
    common = dict(blocks=blocks, grad_input_dtype=F32, grad_penalty_scale=1.0)
    kernels.penalty_backward(**fields(x, None, "relu", "l1", infinite), **common, grad_input=grad)
    assert grad.checked().tolist() == [[0, 1, 1, 0]]
    grad = Output(1, 4, dtype=F32)
    weight = torch.tensor([[2.0]]).expand(1, 4)
    kernels.penalty_backward(**fields(x, None, "identity", "l1", None, weight), **common, grad_input=grad)
    assert grad.checked().tolist() == [[-2, 2, 2, -2]]


@pytest.mark.parametrize("cols", [4, 5])
def test_no_product_makes_nan_of_what_counts_nothing(kernels: Kernels, cols: int) -> None:
    x, scale = torch.full((1, cols), torch.inf), torch.ones(cols)
    blocks = kernels.column_blocks(1, cols, 5)
    common = dict(blocks=blocks, grad_input_dtype=F32, grad_penalty_scale=1.0)
    grad_scale = Output(blocks.runs, cols, dtype=F32)
    ones = torch.ones(1, cols)
    kernels.penalty_backward(**fields(x, scale, "identity", "l1", ones, None), **common, grad_scale=grad_scale)
    assert (grad_scale.checked() == 0).all()
    for activation in ("identity", "relu"):
        grad, weight = Output(1, cols, dtype=F32), torch.full((1, 1), torch.inf).expand(1, cols)
        of_ones = fields(ones, None, activation, "contractive", ones, weight)
        kernels.penalty_backward(**of_ones, **common, grad_input=grad)
        assert (grad.checked() == 1).all()


def test_nan_stays_in_its_row(kernels: Kernels) -> None:
    x = torch.randn(5, 260)
    x[2, 7] = torch.nan
    for activation in ACTIVATIONS:
        code, sums = forward(kernels, x, None, activation, "l1")
        assert code.isnan().nonzero().tolist() == [[2, 7]] and sums.isnan().nonzero().tolist() == [[2]]
