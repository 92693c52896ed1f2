"""Losses of a reconstruction: values and gradients by the rule, corners, threads, capabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp
from torch.nn import functional as F

from lect11ext import functional, reference
from tests.helpers import ONE_STEP, Tagged, check, same_for_any_threads

LIKELIHOODS = ["bernoulli", "continuous_bernoulli", "gaussian", "squared_error"]
REDUCTIONS = ["none", "sum_features", "batchmean", "sum"]
SHAPES = [(3, 5), (7, 1), (1, 1024), (2, 1023), (3, 1025), (2, 2500), (4, 3, 37), (9,)]
loss = functional.reconstruction_loss


def compare(
    args: list[Tensor | None], likelihood: str, reduction: str = "sum_features", slack: float = ONE_STEP
) -> None:
    """``args``: input, target, logvar, weight."""

    def call(module: Any) -> Any:
        return lambda x, t, v, w: module.reconstruction_loss(x, t, likelihood, logvar=v, weight=w, reduction=reduction)

    check(call(functional), call(reference), args, slack)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> list[Tensor]:
    x, t = 2 * torch.randn(shape), torch.rand(shape)
    return [a.to(device, dtype).requires_grad_() for a in (x, t)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_values_and_gradients(likelihood: str, reduction: str, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        compare([*inputs(*shape, dtype=dtype, device=device), None, None], likelihood, reduction)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_capabilities(likelihood: str, capability: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        compare([*inputs(33, 70, dtype=dtype), None, torch.rand(33, 70).to(dtype).requires_grad_()], likelihood)


@pytest.mark.parametrize("shape", [(6, 9), (9,), (1,), (6, 1), ()])
def test_logvar_and_weight_broadcast(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        v, w = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
        for given in ((v, None), (None, w), (v, w)):
            for reduction in REDUCTIONS:
                # A gradient is a sum of up to 54 terms that may nearly cancel.
                compare([*inputs(6, 9, dtype=dtype), *given], "gaussian", reduction, 8 * ONE_STEP)
        compare([*inputs(6, 9, dtype=dtype), None, w], "bernoulli")


def test_mixed_types() -> None:
    x, t = inputs(4, 40)
    for a, b in ((x.bfloat16(), t), (x, t.half()), (x.double(), t)):
        compare([a.detach().requires_grad_(), b.detach().requires_grad_(), None, None], "bernoulli")
    assert loss(x.bfloat16(), t.bfloat16()).dtype == torch.float32
    assert loss(x, t.double()).dtype == torch.float64


def test_agrees_with_torch() -> None:
    x, t = (a.detach() for a in inputs(5, 11))
    v = torch.randn(5, 11)
    torch.testing.assert_close(loss(x, t, reduction="none"), F.binary_cross_entropy_with_logits(x, t, reduction="none"))
    torch.testing.assert_close(
        loss(x, t, "gaussian", logvar=v, reduction="none"),
        F.gaussian_nll_loss(x, t, v.exp(), full=True, reduction="none"),
    )
    torch.testing.assert_close(loss(x, t, "squared_error", reduction="sum"), F.mse_loss(x, t, reduction="sum"))
    density = torch.distributions.ContinuousBernoulli(logits=x.double())
    torch.testing.assert_close(
        loss(x, t, "continuous_bernoulli", reduction="none").double(),
        -density.log_prob(t.double()),
        rtol=1e-5,
        atol=1e-5,
    )  # torch's own is a series near 0


def test_the_continuous_bernoulli_is_a_density(capability: str) -> None:
    """Integrates to one, also where its closed form has a hole."""
    t = ((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000).expand(9, -1)
    x = torch.tensor([0.0, 1e-12, -1e-6, 1e-3, -0.99, 1.01, 3.0, -20.0, 60.0], dtype=torch.float64)[:, None].expand(
        9, 4000
    )
    integral = (-loss(x, t, "continuous_bernoulli", reduction="none")).exp().mean(1)
    torch.testing.assert_close(integral, torch.ones(9, dtype=torch.float64), rtol=1e-4, atol=0)


def test_relative_errors_of_the_continuous_bernoulli(capability: str) -> None:
    x = torch.cat([torch.linspace(-90, 90, 3601), torch.linspace(-3, 3, 2001)])
    half = torch.full_like(x, 0.5)  # leaves log(sinh(x/2) / (x/2)) alone
    x.requires_grad_()
    got = loss(x, half, "continuous_bernoulli", reduction="none")
    wide = x.detach().double().requires_grad_()
    expected = reference.reconstruction_loss(wide, half.double(), "continuous_bernoulli", reduction="none")
    torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-7)
    grads = [torch.autograd.grad(o.sum(), i)[0].double() for o, i in ((got, x), (expected, wide))]
    torch.testing.assert_close(*grads, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("size", [(), (1,), (1, 1), (1, 901), (300, 1)], ids=str)
def test_threads_agree_on_broadcast_gradients(size: tuple[int, ...]) -> None:
    x, t = torch.randn(300, 901), torch.rand(300, 901)
    wide = [torch.rand(size).requires_grad_() for _ in range(2)]

    def results() -> Sequence[Tensor]:
        out = loss(x, t, "gaussian", logvar=wide[0], weight=wide[1], reduction="none")
        return torch.autograd.grad(out, wide, x)

    grads = same_for_any_threads(results, (1, 2, 3))
    exact = [w.detach().double().requires_grad_() for w in wide]
    out = reference.reconstruction_loss(
        x.double(), t.double(), "gaussian", logvar=exact[0], weight=exact[1], reduction="none"
    )
    for got, expected in zip(grads, torch.autograd.grad(out, exact, x.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-2 if len(size) < 2 else 1e-3)


class Logged(torch.Tensor):
    pass


def test_tensor_subclasses_in_any_place() -> None:
    x, v = torch.randn(3, 4), torch.rand(4)
    out = loss(x, x, "gaussian", logvar=v, weight=v)
    for place in range(4):
        args = [a.as_subclass(Logged) if i == place else a for i, a in enumerate((x, x, v, v))]
        got = loss(args[0], args[1], "gaussian", logvar=args[2], weight=args[3])
        assert type(got) is Logged and torch.equal(got.as_subclass(torch.Tensor), out)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_threads_agree(likelihood: str) -> None:
    args = inputs(300, 901)
    weight = torch.rand(300, 901, requires_grad=True)

    def results() -> Sequence[Tensor]:
        outs = [loss(*args, likelihood, weight=weight, reduction=reduction) for reduction in REDUCTIONS]
        return [*outs, *(g for out in outs for g in torch.autograd.grad(out.sin().sum(), [*args, weight]))]

    same_for_any_threads(results, (1, 2, 3))


def test_strides() -> None:
    base = torch.randn(6, 40, 9)
    views = [
        base.transpose(0, 2),
        base[:, ::2],
        base[..., 1:],
        base[:1].expand(6, 40, 9),
        base.permute(2, 0, 1)[:, None],
    ]
    for view in views:
        target = torch.rand(view.shape[::-1]).permute(*range(view.dim() - 1, -1, -1))
        args = [view.detach().requires_grad_(), target.requires_grad_()]
        for likelihood in LIKELIHOODS:
            compare([*args, None, None], likelihood)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(reduction: str) -> None:
    for shape in ((0, 4), (3, 0), (0,), (2, 0, 5)):
        x = torch.zeros(shape, requires_grad=True)
        out = loss(x, torch.zeros(shape), reduction=reduction)
        assert out.shape == {"none": shape, "sum_features": shape[:-1]}.get(reduction, ()) and not out.any()
        out.sum().backward()
        assert x.grad is not None and x.grad.shape == shape


def test_an_element_of_weight_zero_does_not_count() -> None:
    x = torch.tensor([[1.0, math.nan, math.inf, 2.0]], requires_grad=True)
    t = torch.tensor([[0.5, 0.5, math.nan, 0.25]], requires_grad=True)
    mask = torch.tensor([[True, False, False, True]])
    for likelihood in LIKELIHOODS:
        got = loss(x, t, likelihood, weight=mask)
        expected = loss(x[:, [0, 3]], t[:, [0, 3]], likelihood)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got.sum(), [x, t]), torch.autograd.grad(expected.sum(), [x, t]), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert torch.equal(loss(x[:, [0, 3]], mask[:, [0, 3]]), loss(x[:, [0, 3]], torch.ones(1, 2)))
    nan = loss(x, t.nan_to_num(), reduction="none")[0]
    assert nan[1].isnan() and nan[[0, 3]].isfinite().all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nor_in_derivatives_of_second_order(likelihood: str, bad: float) -> None:
    learned = likelihood == "gaussian"
    good = [torch.rand(3, 4) + 0.1 for _ in range(3 if learned else 2)]
    mask = torch.tensor([[True, False, False, True], [True, True, False, True], [False, True, True, True]])

    def derivatives(*args: Tensor) -> list[Tensor]:
        leaves = [a.clone().requires_grad_() for a in args]

        def f(*a: Tensor) -> Tensor:
            return loss(*a[:2], likelihood, logvar=a[2] if learned else None, weight=mask, reduction="sum")

        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        ones = tuple(torch.ones_like(a) for a in args)
        tangents = jvp(grad(f, argnums=tuple(range(len(args)))), args, ones)[1]
        return [*first, *second, *tangents]

    expected = derivatives(*good)
    for i in range(len(good)):
        args = list(good)
        args[i] = args[i].masked_fill(~mask, bad)
        for a, b in zip(derivatives(*args), expected, strict=True):
            torch.testing.assert_close(a, b)
            assert not a[~mask].any()


def test_mixed_derivatives_agree_where_the_weight_is_zero() -> None:
    args = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)

    def f(x: Tensor, w: Tensor) -> Tensor:
        return loss(x, torch.zeros_like(x), "squared_error", weight=w, reduction="sum")

    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacrev, jacrev), (jacfwd, jacfwd)):
        for i in (0, 1):
            mixed = outer(inner(f, argnums=i), argnums=1 - i)(*args)
            assert mixed.tolist() == [[0.0, 0.0], [0.0, 4.0]]


def test_extremes() -> None:
    x = torch.tensor([-1e38, -200.0, 200.0, 1e38, -88.0, 88.0, 0.0, -0.0], requires_grad=True)
    for likelihood in ("bernoulli", "continuous_bernoulli"):
        for target in (0.0, 0.25, 1.0):
            t = torch.full_like(x, target)
            out = loss(x, t, likelihood, reduction="none")
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert out.isfinite().all() and grad.isfinite().all() and (out > -100).all()
    small = loss(x[:1] * 0 + 1e-20, x[:1] * 0, "gaussian", logvar=torch.tensor([-92.0]))
    assert small.isfinite().all()  # 1/s² overflows, (x − t)/s does not


@pytest.mark.parametrize("logvar", [-180.0, -3e38])
def test_no_difference_is_none_whatever_the_variance(logvar: float, capability: str) -> None:
    x, t = torch.ones(19, requires_grad=True), torch.ones(19, requires_grad=True)
    v = torch.full((19,), logvar, requires_grad=True)
    out = loss(x, t, "gaussian", logvar=v, reduction="none")
    torch.testing.assert_close(out, 0.5 * v + 0.5 * math.log(2 * math.pi))
    first = torch.autograd.grad(out.sum(), [x, t, v], create_graph=True)
    for got, expected in zip(first, (0.0, 0.0, 0.5), strict=True):
        assert torch.equal(got, torch.full_like(got, expected))
    assert torch.autograd.grad(sum(g.sum() for g in first), v)[0].isfinite().all()
    assert loss(x + 1e-10, t * 0, "gaussian", logvar=v, reduction="none").isinf().all()


def test_confident_logits_keep_their_digits(capability: str) -> None:
    x = torch.linspace(-80, 80, 801).repeat(2).requires_grad_()
    t = torch.tensor([0.0, 1.0]).repeat_interleave(801)
    out = loss(x, t, reduction="none")
    wrong = torch.where(t == 0, x, -x).detach().double()  # the loss is log(1 + e^wrong), whose slope is its sigmoid
    torch.testing.assert_close(out.double(), torch.logaddexp(wrong, wrong * 0), rtol=1e-6, atol=1e-38)
    slope = wrong.sigmoid() * torch.where(t == 0, 1, -1)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0].double(), slope, rtol=1e-6, atol=1e-38)


def test_confident_logits_of_the_continuous_bernoulli_keep_their_digits(capability: str) -> None:
    x = torch.cat([10.0 ** torch.arange(1, 30), -(10.0 ** torch.arange(1, 30))]).requires_grad_()
    out = loss(x, (x > 0).float(), "continuous_bernoulli", reduction="none")
    y = x.detach().abs().double()  # the loss is log((1 − e^−y) / y)
    torch.testing.assert_close(out.double(), torch.log(-torch.expm1(-y) / y), rtol=1e-6, atol=0)
    slope = (1 / torch.expm1(y) - 1 / y) * x.sign()
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0].double(), slope, rtol=1e-6, atol=0)


def test_subclasses_come_out() -> None:
    x = torch.randn(3, 4).as_subclass(Tagged)
    assert isinstance(loss(x, torch.rand(3, 4)), Tagged)


M = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((M, M[:2]), {}, ValueError, r"target must have shape \[3, 4\] \(that of input\), but got \[2, 4\]"),
        ((M.long(), M), {}, TypeError, "input must be float32, float64, bfloat16 or float16, but got Long"),
        ((M, M.int()), {}, TypeError, "target must be float32"),
        ((M, M.to("meta")), {}, RuntimeError, "Expected all tensors to be on the same device"),
        ((M, M, "poisson"), {}, ValueError, "likelihood must be one of .* but got 'poisson'"),
        ((M, M), {"logvar": M}, ValueError, "logvar must be None for this likelihood"),
        ((M, M, "gaussian"), {"logvar": M[0, :3]}, ValueError, "logvar must broadcast to the shape of input"),
        ((M, M, "gaussian"), {"logvar": M.int()}, TypeError, "logvar must be float32"),
        ((M, M), {"weight": M[None]}, ValueError, "weight must broadcast to the shape of input"),
        ((M, M), {"weight": M.int()}, TypeError, "weight must be float32"),
        ((M, M), {"reduction": "mean"}, ValueError, "reduction must be one of .* but got 'mean'"),
        ((M[0, 0], M[0, 0]), {}, ValueError, "input must have at least one dimension"),
        ((M.tolist(), M), {}, TypeError, "input must be a Tensor, but got"),
        ((M, 1.0), {}, TypeError, "target must be a Tensor, but got"),
        ((M, M, 3), {}, TypeError, "likelihood must be a str, but got"),
        ((M, M), {"weight": 0.5}, TypeError, "weight must be a Tensor or None, but got"),
    ],
)
def test_errors_name_the_argument(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loss(*arguments, **options)
