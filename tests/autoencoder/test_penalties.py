"""Activations of a code with their penalties: values and gradients by the rule, corners, threads, capabilities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import functional, reference
from lect11ext.reference.autoencoder.penalties import penalized_activation as plain
from tests.helpers import ONE_STEP, check, same_for_any_threads

# A gradient is a sum of two terms, from the code and from the penalty, that may cancel.
SLACK = 2 * ONE_STEP
ACTIVATIONS = ["identity", "relu", "sigmoid", "softplus", "tanh"]
PENALTIES = ["l1", "contractive", "mean"]
CASES = list(itertools.product(ACTIVATIONS, PENALTIES))
op = torch.ops.lect11ext.penalized_activation

# 1023 to 1025: about one tile; 3 rows of 5: several in a tile; 130 × 64: more than one run of rows.
SHAPES = [(3, 5), (7, 1), (1, 1024), (2, 1023), (3, 1025), (2, 2500), (130, 64), (4, 3, 37), (9,)]


def call(function: Callable[..., Any], activation: str, penalty: str) -> Callable[..., Any]:
    return lambda input, scale: function(input, scale, activation, penalty)


def inputs(*shape: int, dtype: torch.dtype = torch.float32, penalty: str = "l1") -> list[Tensor | None]:
    scale = None if penalty == "mean" else torch.rand(shape[-1]).to(dtype).requires_grad_()
    return [(2 * torch.randn(shape)).to(dtype).requires_grad_(), scale]


@pytest.mark.parametrize(("activation", "penalty"), CASES)
def test_values_and_gradients(activation: str, penalty: str, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        args = [
            a if a is None else a.detach().to(device).requires_grad_()
            for a in inputs(*shape, dtype=dtype, penalty=penalty)
        ]
        check(call(op, activation, penalty), call(plain, activation, penalty), args, SLACK)


@pytest.mark.parametrize(("activation", "penalty"), CASES)
def test_capabilities(activation: str, penalty: str, capability: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        args = inputs(33, 70, dtype=dtype, penalty=penalty)
        check(call(op, activation, penalty), call(plain, activation, penalty), args, SLACK)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_keep_their_digits_where_saturated(activation: str, capability: str) -> None:
    """Relative errors, element by element, which the rule's largest norm would not see."""
    a = torch.linspace(-40, 40, 1601)
    for penalty in ("contractive", "mean"):
        got = op(a[:, None], None, activation, penalty)
        expected = plain(a.double()[:, None], None, activation, penalty)
        torch.testing.assert_close(got[0].double(), expected[0], rtol=4e-7, atol=1e-37)
        if penalty == "contractive":
            torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-6, atol=1e-35)
    small = torch.tensor([[1e-30, -3e-8, 2e-4, -0.0]])
    torch.testing.assert_close(op(small, None, "tanh", "l1")[0].double(), small.double().tanh(), rtol=4e-7, atol=0)


def test_threads_agree_on_the_kl_of_many_units() -> None:
    # Of this length the order in which Tensor.sum() adds depends on the number of threads.
    x = torch.randn(2, 70000, dtype=torch.float64)
    penalty = same_for_any_threads(lambda: functional.sparse_activation(x, "sigmoid", penalty="kl")[1:], (1, 2, 3))[0]
    torch.testing.assert_close(penalty, reference.sparse_activation(x, "sigmoid", penalty="kl")[1])


def test_a_subclass_as_scale() -> None:
    class Logged(torch.Tensor):
        pass

    x, scale = torch.randn(3, 4), torch.rand(4)
    code, penalty = functional.sparse_activation(x, scale=scale.as_subclass(Logged))
    assert type(code) is Logged and type(penalty) is Logged
    assert torch.equal(penalty.as_subclass(torch.Tensor), functional.sparse_activation(x, scale=scale)[1])


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3), (2, 3, 0)])
def test_no_elements(shape: tuple[int, ...]) -> None:
    for options in ({"penalty": "l1"}, {"penalty": "kl"}):
        got = functional.sparse_activation(torch.zeros(shape), "sigmoid", **options)
        torch.testing.assert_close(got, reference.sparse_activation(torch.zeros(shape), "sigmoid", **options))


@pytest.mark.parametrize(("activation", "penalty"), CASES)
def test_threads_agree(activation: str, penalty: str) -> None:
    args = inputs(700, 333, penalty=penalty)

    def results() -> Sequence[Tensor]:
        outs = op(*args, activation, penalty)
        leaves = [a for a in args if a is not None]
        return [*outs, *torch.autograd.grad(outs[0].square().sum() + outs[1].sin().sum(), leaves)]

    same_for_any_threads(results, (1, 2, 3))


@pytest.mark.parametrize(("activation", "penalty"), [("sigmoid", "contractive"), ("relu", "l1"), ("softplus", "mean")])
def test_strides(activation: str, penalty: str) -> None:
    base = torch.randn(6, 40, 9)
    views = [
        base.transpose(0, 2), base[:, ::2], base[..., 1:], base[:1].expand(6, 40, 9),
        torch.randn(2 * 50 + 1)[1:].view(4, 25), base.permute(2, 0, 1)[:, None],
    ]  # fmt: skip
    for view in views:
        scale = None if penalty == "mean" else torch.rand(2 * view.size(-1))[::2].requires_grad_()
        args = [view.detach().requires_grad_(), scale]
        check(call(op, activation, penalty), call(plain, activation, penalty), args, SLACK)
    x = torch.randn(5, 8)
    expanded = torch.ones(1, 1).expand(5, 8)
    got = torch.ops.lect11ext.penalized_activation_backward(expanded, None, x, None, activation, penalty, [True, True])
    dense = torch.ops.lect11ext.penalized_activation_backward(
        expanded.contiguous(), None, x, None, activation, penalty, [True, True]
    )
    assert torch.equal(got[0], dense[0]) and got[1] is None


@pytest.mark.parametrize("penalty", PENALTIES)
def test_empty(penalty: str) -> None:
    for shape in ((0, 4), (3, 0), (0,), (2, 0, 5)):
        x = torch.zeros(shape, requires_grad=True)
        scale = None if penalty == "mean" else torch.ones(shape[-1], requires_grad=True)
        code, sums = op(x, scale, "relu", penalty)
        assert code.shape == shape and sums.shape == (shape[-1:] if penalty == "mean" else shape[:-1])
        assert not sums.any()
        (code.sum() + sums.sum()).backward()
        assert x.grad is not None and x.grad.shape == shape
        assert scale is None or (scale.grad is not None and not scale.grad.any())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_stay_in_their_row(activation: str) -> None:
    x = torch.randn(4, 7)
    x[1, 2], x[2, 3], x[3, 4] = math.nan, math.inf, -math.inf
    for penalty in ("l1", "contractive"):
        code, sums = op(x, None, activation, penalty)
        expected = plain(x.double(), None, activation, penalty)
        torch.testing.assert_close(code, expected[0].float(), equal_nan=True, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sums[[0, 2, 3]], expected[1][[0, 2, 3]].float(), rtol=1e-5, atol=1e-6)
        assert penalty == "contractive" or sums[1].isnan()
    x.requires_grad_()
    code, sums = op(x, None, activation, "contractive")
    (grad,) = torch.autograd.grad(sums.sum() + code.clamp(-9, 9).sum(), x)
    assert grad[[0, 2, 3]].isfinite().all()


def test_relu_selects() -> None:
    """An infinite gradient does not come through where the slope is zero."""
    x = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    code, sums = op(x, None, "relu", "l1")
    grads = [torch.tensor([[math.inf, 1.0]]), torch.tensor([0.5])]
    assert torch.autograd.grad([code, sums], x, grads)[0].tolist() == [[0.0, 1.5]]


def test_the_penalty_of_a_layer_is_its_jacobian() -> None:
    x = torch.randn(5, 11, dtype=torch.float64)
    for activation, phi in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("relu", torch.relu)):
        layer = torch.nn.Linear(11, 7).double()
        code, penalty = functional.contractive_linear(x, layer.weight, layer.bias, activation)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda v, layer=layer, phi=phi: phi(layer(v))))(x)
        torch.testing.assert_close(penalty, jacobian.square().sum((1, 2)))
        torch.testing.assert_close(code, phi(layer(x)))


def test_contractive_linear_against_plain_torch(dtype: torch.dtype) -> None:
    args = [torch.randn(9, 30), torch.randn(21, 30) / 5, torch.randn(21)]
    args = [a.to(dtype).requires_grad_() for a in args]
    for activation in ACTIVATIONS:
        check(
            lambda *a, act=activation: functional.contractive_linear(*a, act),
            lambda *a, act=activation: reference.contractive_linear(*a, act),
            args,
            SLACK,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_activation(dtype: torch.dtype) -> None:
    x, scale = torch.randn(40, 17, dtype=dtype, requires_grad=True), torch.rand(17, dtype=dtype, requires_grad=True)
    for options in (
        {},
        {"activation": "tanh", "scale": scale},
        {"activation": "sigmoid", "penalty": "kl", "target": 0.1},
    ):
        ours, theirs = functional.sparse_activation(x, **options), reference.sparse_activation(x, **options)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(o[0].sin().sum() + o[1].sum(), x)[0] for o in (ours, theirs)]
        torch.testing.assert_close(*grads)
    code, kl = functional.sparse_activation(torch.full((6, 3), -math.log(9.0)), "sigmoid", penalty="kl", target=0.1)
    assert kl.shape == () and kl.abs() < 1e-6 and torch.allclose(code, torch.tensor(0.1))
    _, kl = functional.sparse_activation(torch.full((8, 1000), -math.log(19.0)), "sigmoid", penalty="kl")
    assert 0 <= kl < 1e-9  # of a thousand units, each at the target
    _, kl = functional.sparse_activation(torch.full((6, 3), -200.0), "sigmoid", penalty="kl")
    assert kl.isfinite() and kl > 1


M, V = torch.zeros(3, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (op, (M, V, "gelu", "l1"), ValueError, "activation must be one of .* but got 'gelu'"),
        (op, (M, V, "relu", "l2"), ValueError, "penalty must be one of .* but got 'l2'"),
        (op, (M, V[:3], "relu", "l1"), ValueError, r"scale must have shape \[4\] .* but got \[3\]"),
        (op, (M, M, "relu", "l1"), ValueError, r"scale must have shape \[4\]"),
        (op, (M, V, "relu", "mean"), ValueError, "scale must be None for the penalty 'mean'"),
        (op, (M.long(), None, "relu", "l1"), TypeError, "input must be float32, .* but got Long"),
        (op, (M, V.long(), "relu", "l1"), TypeError, "scale must be float32, .* but got Long"),
        (op, (M[0, 0], None, "relu", "l1"), ValueError, "input must have at least one dimension"),
        (op, (M, V.to("meta"), "relu", "l1"), RuntimeError, "Expected all tensors to be on the same device"),
        (functional.sparse_activation, (M, 3), TypeError, "activation must be a str, but got"),
        (functional.sparse_activation, ([1.0], "relu"), TypeError, "input must be a Tensor"),
        (functional.contractive_linear, (M, V), ValueError, r"weight must have shape \[units, in\], but got \[4\]"),
        (
            functional.contractive_linear,
            (M, M[:, :3]),
            ValueError,
            r"input must have shape \[\*, 3\], but got \[3, 4\]",
        ),
        (functional.contractive_linear, (M, M.tolist()), TypeError, "weight must be a Tensor, but got list"),
        (functional.contractive_linear, (M, M, None, "gelu"), ValueError, "activation must be one of"),
        (functional.contractive_linear, (M, M, 1.0), TypeError, "bias must be a Tensor or None, but got float"),
        (functional.contractive_linear, (M, M, V), ValueError, r"bias must have shape \[3\] .* but got \[4\]"),
        (functional.contractive_linear, (M, M, V[0]), ValueError, r"bias must have shape \[3\] .* but got \[\]"),
        (functional.contractive_linear, (M, M.int()), TypeError, "weight must be float32, .* but got torch.int32"),
        (functional.contractive_linear, (M, M.to("meta")), RuntimeError, "but weight is on meta and input on"),
        (functional.contractive_linear, (M, M, V[:3].to("meta")), RuntimeError, "but bias is on meta"),
        (functional.contractive_linear, (M, M, M[:, :3]), ValueError, r"bias must have shape \[3\]"),
    ],
)
def test_errors_name_the_argument(function: Any, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"penalty": "l2"}, ValueError, "penalty must be 'l1' or 'kl', but got 'l2'"),
        ({"penalty": None}, TypeError, "penalty must be a str, but got NoneType"),
        ({"penalty": "kl"}, ValueError, "activation must be 'sigmoid' for the KL penalty, but got 'relu'"),
        ({"penalty": "kl", "activation": "sigmoid", "target": 0.0}, ValueError, "target must lie between 0 and 1"),
        ({"penalty": "kl", "activation": "sigmoid", "target": math.nan}, ValueError, "target must lie between"),
        (
            {"penalty": "kl", "activation": "sigmoid", "target": "a"},
            TypeError,
            "target must be a float or an int, but got str",
        ),
        ({"penalty": "kl", "activation": "sigmoid", "scale": V}, ValueError, "scale must be None for the KL"),
    ],
)
def test_errors_of_options(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.sparse_activation(M, **options)
