"""Derivatives of every order, transforms, compilation and export of the reconstruction loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap

from lect11ext import functional, reference

LIKELIHOODS = ["bernoulli", "continuous_bernoulli", "gaussian", "squared_error"]
REDUCTIONS = ["none", "sum_features", "batchmean", "sum"]
op = torch.ops.lect11ext.reconstruction_loss


def leaves(*shape: int) -> list[Tensor]:
    values = [torch.randn(shape), torch.rand(shape), torch.randn(shape), torch.rand(shape) + 0.1]
    return [v.double().requires_grad_() for v in values]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_derivatives(likelihood: str, reduction: str) -> None:
    x, t, v, w = leaves(2, 3)
    args = [x, t, v if likelihood == "gaussian" else None, w]

    def run(*a: Any) -> Tensor:
        return op(*a, likelihood, reduction)

    assert gradcheck(run, args, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("asked", [(a, b, c, d) for a in (0, 1) for b in (0, 1) for c in (0, 1) for d in (0, 1)][1:])
def test_subsets(asked: tuple[int, ...]) -> None:
    args = [a.detach().requires_grad_(bool(wanted)) for a, wanted in zip(leaves(3, 4), asked, strict=True)]
    wanted = [a for a in args if a.requires_grad]
    results = []
    for module in (functional, reference):
        out = module.reconstruction_loss(*args[:2], "gaussian", logvar=args[2], weight=args[3])
        results.append(torch.autograd.grad(out.square().sum(), wanted))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_transforms_agree_with_plain_torch(likelihood: str) -> None:
    x, t, _, w = (a.detach() for a in leaves(5, 3))

    def loss(module: Any) -> Any:
        return lambda a: module.reconstruction_loss(a, t, likelihood, weight=w).pow(2).sum()

    for transform in (grad, hessian, lambda f: jacfwd(grad(f))):
        torch.testing.assert_close(transform(loss(functional))(x), transform(loss(reference))(x))
    tangent = torch.randn_like(x)
    torch.testing.assert_close(jvp(loss(functional), (x,), (tangent,)), jvp(loss(reference), (x,), (tangent,)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vmap_over_every_argument(reduction: str) -> None:
    x, t, v, w = (a.detach() for a in leaves(4, 5, 6))

    def call(module: Any) -> Any:
        return lambda *a: module.reconstruction_loss(*a[:2], "gaussian", logvar=a[2], weight=a[3], reduction=reduction)

    cases = [
        ((x, t, v, w), (0, 0, 0, 0)), ((x, t, v, w), (1, 1, 1, 1)),
        ((x, t[0], v[0, 0], w[0, :, :1]), (0, None, None, None)),
        ((x[0], t[0], v[:, 0], w[0, :, :1]), (None, None, 0, None)), ((x[0], t[0], v[:, 0, 0], w), (None, None, 0, 0)),
    ]  # fmt: skip
    for args, dims in cases:
        torch.testing.assert_close(vmap(call(functional), dims)(*args), vmap(call(reference), dims)(*args))
        for which in range(4):
            grads = [
                vmap(grad(lambda *a, m=module: call(m)(*a).sum(), argnums=which), dims)(*args)
                for module in (functional, reference)
            ]
            torch.testing.assert_close(*grads)
    assert vmap(lambda a: functional.reconstruction_loss(a, a))(torch.zeros(0, 3, 4)).shape == (0, 3)
    with pytest.raises(ValueError, match="at least one dimension"):
        vmap(lambda a: functional.reconstruction_loss(a, a, reduction="sum_features"))(torch.zeros(3))
    assert vmap(lambda a: functional.reconstruction_loss(a, a, reduction="none"))(torch.zeros(3)).shape == (3,)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_opcheck(likelihood: str) -> None:
    x, t, v, w = leaves(3, 4)
    args = (x, t, v if likelihood == "gaussian" else None, w)
    torch.library.opcheck(op.default, (*args, likelihood, "sum_features"))
    torch.library.opcheck(op.default, (x, t, None, None, likelihood, "batchmean"))
    for inputs in (args, [None if a is None else a.detach() for a in args]):
        torch.library.opcheck(
            torch.ops.lect11ext.reconstruction_loss_backward.default,
            (torch.randn(3, dtype=torch.float64), *inputs, likelihood, "sum_features", [True] * 4),
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(backend: str) -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        return functional.reconstruction_loss(x, t, "continuous_bernoulli", reduction="batchmean")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 8):
        args = [torch.randn(rows, 6, requires_grad=True), torch.rand(rows, 6, requires_grad=True)]
        results = [[f(*args), *torch.autograd.grad(f(*args), args)] for f in (compiled, step)]
        torch.testing.assert_close(*results)


def test_export() -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return functional.reconstruction_loss(x, t)

    batch = torch.export.Dim("batch", min=2)
    shapes = {"x": {0: batch}, "t": {0: batch}}
    exported = torch.export.export(Loss(), (torch.randn(4, 6), torch.rand(4, 6)), dynamic_shapes=shapes)
    x, t = torch.randn(9, 6), torch.rand(9, 6)
    torch.testing.assert_close(exported.module()(x, t), functional.reconstruction_loss(x, t))


def test_every_derivative_keeps_the_digits_of_confident_logits() -> None:
    x = torch.linspace(-60, 60, 241).repeat(2)
    t = torch.tensor([0.0, 1.0]).repeat_interleave(241)
    wrong = torch.where(t == 0, x, -x).double()  # the loss is log(1 + e^wrong)
    sign, curvature = torch.where(t == 0, 1, -1), wrong.sigmoid() * (-wrong).sigmoid()

    def total(x: Tensor) -> Tensor:
        return functional.reconstruction_loss(x, t, reduction="none")

    slopes = torch.func.jvp(total, (x,), (torch.ones_like(x),))[1]
    again = torch.func.jvp(torch.func.grad(lambda x: total(x).sum()), (x,), (torch.ones_like(x),))
    twice = torch.func.jvp(lambda x: torch.func.jvp(total, (x,), (torch.ones_like(x),))[1], (x,), (torch.ones_like(x),))
    for got in (slopes, again[0]):
        torch.testing.assert_close(got.double(), wrong.sigmoid() * sign, rtol=2e-6, atol=1e-38)
    for got in (again[1], twice[1]):
        torch.testing.assert_close(got.double(), curvature, rtol=2e-6, atol=1e-38)


def test_derivatives_by_a_logvar_whose_precision_overflows() -> None:
    logvar = torch.tensor([-200.0, -400.0])

    def loss(apart: float) -> Callable[[Tensor], Tensor]:
        x = torch.full((2,), apart)
        return lambda v: functional.reconstruction_loss(x, torch.zeros(2), "gaussian", logvar=v, reduction="sum")

    ones = torch.ones(2)
    assert torch.func.jvp(loss(1.0), (logvar,), (ones,))[1] == -torch.inf
    assert torch.equal(torch.func.hessian(loss(1.0))(logvar).diagonal(), ones * torch.inf)
    assert torch.func.jvp(loss(0.0), (logvar,), (ones,))[1] == 1
    assert torch.equal(torch.func.hessian(loss(0.0))(logvar), torch.zeros(2, 2))
