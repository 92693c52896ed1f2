"""Derivatives of every order, transforms, compilation and export of the penalized activations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jvp, vmap

from lect11ext import functional
from lect11ext.reference.autoencoder.penalties import penalized_activation as plain

op = torch.ops.lect11ext.penalized_activation
ACTIVATIONS = ["identity", "relu", "sigmoid", "softplus", "tanh"]
CASES = list(itertools.product(ACTIVATIONS, ["l1", "contractive", "mean"]))


def leaves(penalty: str, *shape: int) -> list[Tensor | None]:
    x = torch.randn(shape, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()  # away from the corners of relu and of |h|
    scale = None if penalty == "mean" else torch.rand(shape[-1], dtype=torch.float64).requires_grad_()
    return [x, scale]


@pytest.mark.parametrize(("activation", "penalty"), CASES)
def test_derivatives(activation: str, penalty: str) -> None:
    args = leaves(penalty, 3, 4)
    assert gradcheck(lambda *a: op(*a, activation, penalty), args, check_forward_ad=True, check_batched_grad=True)
    smooth = activation not in ("identity", "relu") or penalty != "mean"
    if smooth:
        assert gradgradcheck(lambda *a: op(*a, activation, penalty), args, check_fwd_over_rev=True)


@pytest.mark.parametrize("penalty", ["l1", "contractive", "mean"])
@pytest.mark.parametrize("shape", [(3, 0), (0,), (2, 3, 0), (0, 0)])
def test_no_units(shape: tuple[int, ...], penalty: str) -> None:
    args = leaves(penalty, *shape)
    given = [a for a in args if a is not None]
    grads = torch.autograd.grad([o.sum() for o in op(*args, "sigmoid", penalty)], given, create_graph=True)
    assert [g.shape for g in grads] == [a.shape for a in given]
    detached = [None if a is None else a.detach() for a in args]
    tangents = jvp(lambda a: op(a, detached[1], "sigmoid", penalty), (detached[0],), (torch.ones(shape).double(),))[1]
    assert tangents[0].shape == shape and not tangents[1].any()


def test_derivatives_of_kl_sparsity() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def run(a: Tensor) -> Any:
        return functional.sparse_activation(a, "sigmoid", penalty="kl", target=0.2)

    assert gradcheck(run, [x], check_forward_ad=True)
    assert gradgradcheck(run, [x], check_fwd_over_rev=True)


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("asked", [(True, False), (False, True)])
def test_subsets(output: int, asked: tuple[bool, bool]) -> None:
    x, scale = leaves("contractive", 3, 4)
    x, scale = x.detach().requires_grad_(asked[0]), scale.detach().requires_grad_(asked[1])
    wanted = [t for t in (x, scale) if t.requires_grad]
    results = []
    for function in (op, plain):
        outs = function(x, scale, "tanh", "contractive")
        loss = outs[output].square().sum() + 0 * outs[1 - output].sum()
        results.append(torch.autograd.grad(loss, wanted))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("penalty", ["l1", "contractive", "mean"])
def test_transforms_agree_with_plain_torch(penalty: str) -> None:
    x, scale = (None if t is None else t.detach() for t in leaves(penalty, 5, 3))

    def loss(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def run(v: Tensor) -> Tensor:
            code, sums = function(v, scale, "tanh", penalty)
            return code.pow(3).sum() + sums.pow(2).sum()

        return run

    for transform in (grad, hessian, lambda f: vmap(grad(f)), lambda f: jacfwd(grad(f))):
        torch.testing.assert_close(transform(loss(op))(x), transform(loss(plain))(x))
    tangent = torch.randn_like(x)
    torch.testing.assert_close(jvp(loss(op), (x,), (tangent,)), jvp(loss(plain), (x,), (tangent,)))


def test_vmap_over_every_argument() -> None:
    x, scale = torch.randn(4, 5, 6), torch.rand(4, 6)
    for dims in ((0, None), (1, None), (2, None), (None, 0), (0, 0)):
        s = scale if dims[1] == 0 else torch.rand(x.size(1) if dims[0] == 2 else 6)
        if dims[0] == 2:
            s = torch.rand(5)
        a = x if dims[0] is not None else x[0]
        got = vmap(lambda v, w: op(v, w, "sigmoid", "contractive"), in_dims=dims)(a, s)
        expected = vmap(lambda v, w: plain(v, w, "sigmoid", "contractive"), in_dims=dims)(a, s)
        torch.testing.assert_close(got, expected)
    per_sample = vmap(grad(lambda w, v: op(v, w, "sigmoid", "contractive")[1].sum()), in_dims=(None, 0))
    expected = vmap(grad(lambda w, v: plain(v, w, "sigmoid", "contractive")[1].sum()), in_dims=(None, 0))
    torch.testing.assert_close(per_sample(scale[0], x), expected(scale[0], x))
    assert vmap(lambda v: op(v, None, "relu", "l1")[1])(torch.zeros(0, 3, 4)).shape == (0, 3)
    with pytest.raises(ValueError, match="at least one dimension"):
        vmap(lambda v: op(v, None, "relu", "l1"))(torch.zeros(3))


@pytest.mark.parametrize(("activation", "penalty"), [("relu", "l1"), ("sigmoid", "contractive"), ("softplus", "mean")])
def test_opcheck(activation: str, penalty: str) -> None:
    args = leaves(penalty, 3, 4)
    torch.library.opcheck(op.default, (*args, activation, penalty))
    sums = torch.randn(4 if penalty == "mean" else 3, dtype=torch.float64)
    for inputs in (args, [None if a is None else a.detach() for a in args]):
        for grads in ((torch.randn(3, 4, dtype=torch.float64), sums), (None, sums)):
            torch.library.opcheck(
                torch.ops.lect11ext.penalized_activation_backward.default,
                (*grads, *inputs, activation, penalty, [True, True]),
            )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(backend: str) -> None:
    def step(x: Tensor, weight: Tensor) -> Any:
        code, penalty = functional.contractive_linear(x, weight)
        sparse, kl = functional.sparse_activation(code, "sigmoid", penalty="kl")
        return sparse, penalty, kl

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 8):
        args = [torch.randn(rows, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)]
        outs = [f(*args) for f in (compiled, step)]
        grads = [torch.autograd.grad(sum(o.square().sum() for o in out), args) for out in outs]
        torch.testing.assert_close([*outs[0], *grads[0]], [*outs[1], *grads[1]])


def test_export() -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Any:
            return functional.contractive_linear(x, self.layer.weight, self.layer.bias, "tanh")

    encoder = Encoder()
    exported = torch.export.export(
        encoder, (torch.randn(4, 6),), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}}
    )
    x = torch.randn(9, 6)
    torch.testing.assert_close(exported.module()(x), encoder(x))


def test_autocast() -> None:
    x, weight = torch.randn(5, 8), torch.randn(3, 8)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        code, penalty = functional.contractive_linear(x, weight)
    assert code.dtype == torch.bfloat16 and penalty.dtype == torch.float32


def test_a_saturated_softplus_has_its_tangent() -> None:
    x, one = torch.linspace(-30, 60, 91).unsqueeze(1), torch.ones(1, 1)

    def penalty(x: Tensor) -> Tensor:
        return functional.contractive_linear(x, one, None, "softplus")[1]

    s, other = x.double().sigmoid().flatten(), (-x.double()).sigmoid().flatten()
    torch.testing.assert_close(
        torch.func.jvp(penalty, (x,), (torch.ones_like(x),))[1].double(), 2 * s * s * other, rtol=2e-6, atol=1e-38
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_of_units_always_on_or_never_has_derivatives_of_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([[17.0, 50.0, -90.0, 800.0]], dtype=dtype, requires_grad=True)
    penalty = functional.sparse_activation(x, "sigmoid", penalty="kl")[1]
    (grad,) = torch.autograd.grad(penalty, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert not grad.any() and not second.any()  # their means lie beyond the floor
