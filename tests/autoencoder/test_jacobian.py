"""The contractive penalty of deep encoders, and the tangent directions of an encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from lect11ext import functional
from lect11ext import nn as fused
from tests.helpers import seeded

KEY = torch.tensor([3, 0])


def encoder(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4), nn.Sigmoid()).to(dtype)


def jacobian(function: Any, x: Tensor) -> Tensor:
    return vmap(jacrev(lambda v: function(v[None])[0]))(x)


def test_the_exact_penalty() -> None:
    model, x = encoder(), torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    code, penalty = functional.jacobian_penalty(model, x, num_probes=None)
    expected = jacobian(model, x).square().sum((1, 2))
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(code, model(x))
    leaves = [x, *(p for n, p in model.named_parameters() if n != "2.bias"), model[2].bias]
    ours = torch.autograd.grad(penalty.sin().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sin().sum(), leaves))


def test_probes_estimate_without_bias() -> None:
    model, x = encoder(), torch.randn(6, 9, dtype=torch.float64)
    _, exact = functional.jacobian_penalty(model, x, num_probes=None)
    _, one = functional.jacobian_penalty(model, x, key=KEY)
    _, many = functional.jacobian_penalty(model, x, num_probes=4000, key=KEY)
    full = jacobian(model, x)
    deviation = (2 * (full @ full.mT).square().sum((1, 2)) / 4000).sqrt()
    assert ((many - exact).abs() < 5 * deviation).all()
    assert torch.equal(one, functional.jacobian_penalty(model, x, key=KEY)[1])
    assert not torch.equal(one, functional.jacobian_penalty(model, x, key=KEY + 1)[1])
    torch.manual_seed(0)
    drawn = functional.jacobian_penalty(model, x)[1]
    torch.manual_seed(0)
    assert torch.equal(drawn, functional.jacobian_penalty(model, x)[1])
    generator = seeded(0)
    assert not torch.equal(*(functional.jacobian_penalty(model, x, generator=generator)[1] for _ in range(2)))


def test_agrees_with_the_closed_form() -> None:
    layer = fused.ContractiveLinear(9, 4, activation="tanh").double()
    x = torch.randn(5, 9, dtype=torch.float64)
    _, closed = layer(x)
    _, products = functional.jacobian_penalty(lambda v: layer(v)[0], x, num_probes=None)
    torch.testing.assert_close(products, closed)


def test_through_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The penalty's gradient is a double backward through the LSTM. cuDNN's has none."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    lstm = fused.LSTM(3, 5, batch_first=True).double()
    plain = nn.LSTM(3, 5, batch_first=True).double()
    plain.load_state_dict(lstm.state_dict())
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    results = []
    for module in (lstm, plain):
        _, penalty = functional.jacobian_penalty(lambda v, m=module: m(v)[0][:, -1], x, num_probes=2, key=KEY)
        results.append([penalty, *torch.autograd.grad(penalty.sum(), list(module.parameters()))])
    torch.testing.assert_close(*results)


def test_shapes_types_and_transforms() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Tanh())
    code, penalty = functional.jacobian_penalty(model, torch.randn(5, 3, 4))
    assert code.shape == (5, 3) and penalty.shape == (5,) and penalty.dtype == torch.float32
    _, penalty = functional.jacobian_penalty(model.bfloat16(), torch.randn(5, 3, 4).bfloat16())
    assert penalty.dtype == torch.float32
    _, penalty = functional.jacobian_penalty(lambda v: v * 2, torch.randn(5), num_probes=None)
    torch.testing.assert_close(penalty, torch.full((5,), 4.0))
    empty = functional.jacobian_penalty(encoder(), torch.zeros(0, 9, dtype=torch.float64), num_probes=None)
    assert empty[0].shape == (0, 4) and empty[1].shape == (0,)
    double = encoder()
    x = torch.randn(5, 9, dtype=torch.float64)
    by_func = torch.func.grad(lambda v: functional.jacobian_penalty(double, v, key=KEY)[1].sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(
        by_func, torch.autograd.grad(functional.jacobian_penalty(double, x, key=KEY)[1].sum(), x)[0]
    )


def test_compile() -> None:
    model, x = encoder(torch.float32), torch.randn(5, 9)
    compiled = torch.compile(
        lambda v: functional.jacobian_penalty(model, v, key=KEY), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), functional.jacobian_penalty(model, x, key=KEY))


def test_tangents_of_a_linear_encoder_are_its_right_singular_vectors() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ torch.linalg.qr(torch.randn(5, 3))[0].mT
    directions, strengths = functional.tangent_directions(lambda x: x @ weight.mT, torch.randn(4, 5))
    torch.testing.assert_close(strengths, torch.tensor([3.0, 2.0, 1.0]).expand(4, 3))
    torch.testing.assert_close(directions @ directions.mT, torch.eye(3).expand(4, 3, 3))
    torch.testing.assert_close((directions @ weight.mT).norm(dim=-1), strengths)
    assert (directions.gather(-1, directions.abs().argmax(-1, keepdim=True)) > 0).all()


def test_tangents_of_a_curve() -> None:
    """An encoder of the unit circle's angle sees along the circle, and nothing across it."""
    angle = torch.linspace(-3, 3, 7)
    points = torch.stack([angle.cos(), angle.sin()], 1)
    directions, strengths = functional.tangent_directions(lambda x: torch.atan2(x[:, 1:], x[:, :1]), points)
    torch.testing.assert_close((directions[:, 0] * points).sum(1), torch.zeros(7), rtol=0, atol=1e-5)
    torch.testing.assert_close(strengths[:, 0], torch.ones(7))


def test_tangents_of_wide_codes_and_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 20), nn.Tanh())
    x = torch.randn(3, 2, 3)
    directions, strengths = functional.tangent_directions(model, x, 4)
    assert directions.shape == (3, 4, 2, 3) and strengths.shape == (3, 4)
    expected = torch.linalg.svdvals(jacobian(model, x).flatten(2))
    torch.testing.assert_close(strengths, expected[:, :4])
    half = functional.tangent_directions(model.bfloat16(), x.bfloat16(), 1)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32


def test_no_rows() -> None:
    x = torch.zeros(0, 9, dtype=torch.float64)
    directions, strengths = functional.tangent_directions(encoder(), x, 2)
    assert directions.shape == (0, 2, 9) and strengths.shape == (0, 2)
    code, penalty = functional.jacobian_penalty(encoder(), x)
    assert code.size(0) == 0 and penalty.shape == (0,)
    with pytest.raises(ValueError, match="num_directions must lie between 1 and 4"):
        functional.tangent_directions(encoder(), x, 5)


X = torch.zeros(2, 9, dtype=torch.float64)
NESTED = torch.nested.nested_tensor([X, X[:1]], layout=torch.jagged)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (functional.jacobian_penalty, (encoder(), X.tolist()), {}, TypeError, "input must be a Tensor, but got"),
        (functional.jacobian_penalty, (encoder(), X), {"num_probes": 0}, ValueError, "num_probes must be at least 1"),
        (functional.jacobian_penalty, (encoder(), X), {"num_probes": 1.5}, TypeError, "num_probes must be an int or"),
        (functional.jacobian_penalty, (encoder(), X), {"num_probes": True}, TypeError, "num_probes must be an int or"),
        (functional.jacobian_penalty, (encoder(), X), {"key": KEY, "generator": 7}, TypeError, "generator must be a"),
        (functional.jacobian_penalty, (encoder(), NESTED), {}, TypeError, "input must have rows of one size, but got"),
        (functional.jacobian_penalty, (encoder(), X[0, 0]), {}, ValueError, "input must have a batch dimension"),
        (functional.jacobian_penalty, (lambda v: v.sum(), X), {}, ValueError, r"encoder must return one code a row"),
        (functional.jacobian_penalty, (lambda v: v.sum(0), X), {}, ValueError, r"one code a row, \[2, \*\], but got"),
        (functional.jacobian_penalty, (lambda v: (v, v), X), {}, TypeError, "encoder must return a Tensor, but got"),
        (functional.jacobian_penalty, (encoder(), X), {"key": KEY.int()}, TypeError, "key must be an int64 tensor"),
        (functional.jacobian_penalty, (None, X), {}, TypeError, "encoder must be callable, but got NoneType"),
        (functional.jacobian_penalty, (encoder(), X.long()), {}, TypeError, "input must have a floating-point type"),
        (functional.jacobian_penalty, (torch.tanh, X.cfloat()), {"num_probes": None}, TypeError, "input must have a"),
        (functional.jacobian_penalty, (lambda v: v.cfloat(), X), {}, TypeError, "encoder must return a floating-point"),
        (functional.jacobian_penalty, (encoder(), X), {"num_probes": 2**70}, ValueError, "num_probes must fit in 64"),
        (functional.tangent_directions, (3, X), {}, TypeError, "encoder must be callable, but got int"),
        (functional.tangent_directions, (encoder(), X.long()), {}, TypeError, "input must have a floating-point type"),
        (functional.tangent_directions, (torch.tanh, X[:, :0]), {}, ValueError, r"elements, but got \[0\] and"),
        (functional.tangent_directions, (lambda v: v[:, :0], X), {}, ValueError, r"but got \[9\] and \[0\] a row"),
        (functional.tangent_directions, (encoder(), X, 0), {}, ValueError, "num_directions must lie between 1 and 4"),
        (functional.tangent_directions, (encoder(), X, 5), {}, ValueError, "num_directions must lie between 1 and 4"),
        (functional.tangent_directions, (encoder(), X, 1.0), {}, TypeError, "num_directions must be an int"),
    ],
)
def test_errors_name_the_argument(
    function: Any, arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*arguments, **options)
