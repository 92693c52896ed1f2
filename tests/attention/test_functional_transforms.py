"""Attention's functions under vmap, jvp and vjp, torch.compile, subclasses, function modes and autocast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lect11ext import functional
from tests.attention.test_functional import operands
from tests.helpers import ONE_STEP, Tagged, Watch, assert_within_rule

sdpa = functional.scaled_dot_product_attention


def test_transforms() -> None:
    query, key, value = operands((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 3), grad=False)
    expected = sdpa(query, key, value)
    torch.testing.assert_close(torch.vmap(sdpa)(query, key, value), expected)
    torch.testing.assert_close(torch.vmap(sdpa, (0, None, None))(query, key[0], value[0])[0], expected[0])
    for randomness in ("same", "different"):
        dropped = torch.vmap(lambda q: sdpa(q, key[0], value[0], dropout_p=0.5), randomness=randomness)(
            query[:1].expand(3, -1, -1, -1, -1)
        )
        assert torch.equal(dropped[0], dropped[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.vmap(lambda q: sdpa(q, key[0], value[0], dropout_p=0.5))(query)

    def slopes_to_out(slopes: Tensor) -> Tensor:
        return sdpa(query[0].double(), key[0].double(), value[0].double(), alibi_slopes=slopes)

    slopes = torch.rand(4)
    for function in (slopes_to_out, lambda q: sdpa(q, key[0], value[0])):
        x = slopes if function is slopes_to_out else query[0]
        tangent = torch.randn(x.shape)
        out, out_t = torch.func.jvp(function, (x,), (tangent,))
        cotangent = torch.randn(out.shape).to(out)
        grad = torch.func.vjp(function, x)[1](cotangent)[0]
        torch.testing.assert_close((out_t * cotangent).sum(), (grad * tangent).sum().to(out), atol=1e-4, rtol=1e-3)


def test_derivatives_of_slopes_in_float64() -> None:
    """Slopes that become a mask keep their digits."""
    args = [x.double() for x in operands((1, 4, 3, 2), (1, 4, 5, 2), (1, 4, 5, 3), grad=False)]
    for shape in ((4,), (1, 4)):
        slopes = torch.rand(shape, dtype=torch.float64, requires_grad=True)

        def attend(s: Tensor) -> Any:
            return sdpa(*args, alibi_slopes=s, return_lse=True)

        def weights(s: Tensor) -> Tensor:
            return functional.attention_weights(args[0], args[1], torch.ones(1, 4, 3).double(), alibi_slopes=s)

        for function in (attend, weights):
            assert torch.autograd.gradcheck(function, slopes, check_forward_ad=True)
            assert torch.autograd.gradgradcheck(function, slopes)
    sdpa(*(x.float() for x in args), alibi_slopes=slopes).sum().backward()
    assert slopes.grad is not None and slopes.grad.dtype == torch.float64


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_traced_without_a_warning() -> None:
    query, key, value = operands((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3), grad=False)
    traced = torch.jit.trace(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), (query, key, value))
    args = operands((1, 4, 9, 8), (1, 2, 6, 8), (1, 2, 6, 3), grad=False)
    torch.testing.assert_close(traced(*args), sdpa(*args, is_causal=True, enable_gqa=True))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_traced_with_one_head_of_keys() -> None:
    args = operands((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 3), grad=False)
    torch.testing.assert_close(torch.jit.trace(lambda *x: sdpa(*x), args)(*args), sdpa(*args))


class Scaled(torch.nn.Module):
    """Numbers that differ from instance to instance: torch.compile makes symbols of them."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Any:
        return (
            sdpa(x, x, x, scale=self.number),
            sdpa(x, x, x, softcap=self.number),
            functional.kernel_attention(x, x, x, self.number),
        )


def test_compiled_with_symbolic_numbers() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 2, 7, 8)
    for number in (0.5, 0.7, 1.1):
        got = torch.compile(Scaled(number), fullgraph=True, backend="aot_eager")(x)
        for a, b in zip(got, Scaled(number)(x), strict=True):
            torch.testing.assert_close(a, b)
    compiled = torch.compile(lambda q: sdpa(q, q, q, scale=q.size(-1) ** -0.5), fullgraph=True, dynamic=True,
                             backend="aot_eager")  # fmt: skip
    for columns in (8, 12, 16):
        q = torch.randn(2, 2, 7, columns)
        torch.testing.assert_close(compiled(q), sdpa(q, q, q))
    symbolic = make_fx(lambda q: sdpa(q, q, q, scale=q.size(-1) ** -0.5), tracing_mode="symbolic")(x)
    torch.testing.assert_close(symbolic(x), sdpa(x, x, x))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_whole(backend: str) -> None:
    def everything(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, slopes: Tensor) -> Any:
        out, lse = sdpa(query, key, value, mask, enable_gqa=True, window=(3, None), return_lse=True)
        weights = functional.attention_weights(query, key, lse, mask, enable_gqa=True, window=(3, None))
        other = sdpa(query[0], key[0], value[0], alibi_slopes=slopes, is_causal=True, enable_gqa=True)
        merged = functional.merge_attention(out, lse, out, lse)
        return out, weights, other, *merged, functional.kernel_attention(query, key, value, 2.0, enable_gqa=True)

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    for keys in (7, 9):
        args = operands((2, 4, 5, 8), (2, 2, keys, 8), (2, 2, keys, 3))
        args += [torch.rand(2, 1, 5, keys) < 0.7, torch.rand(4, requires_grad=True)]
        for x, dim in ((args[1], 2), (args[2], 2), (args[3], 3)):
            torch._dynamo.mark_dynamic(x, dim)
        got, expected = compiled(*args), everything(*args)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        leaves = [*args[:3], args[4]]
        sums = [sum(x.square().sum() for x in outs if x.isfinite().all()) for outs in (got, expected)]
        for a, b in zip(*(torch.autograd.grad(s, leaves) for s in sums), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()
    dropped = torch.compile(lambda q: (sdpa(q, q, q, dropout_p=0.5), sdpa(q, q, q, dropout_p=0.5)), fullgraph=True,
                            backend=backend)(torch.randn(1, 2, 5, 8))  # fmt: skip
    assert not torch.equal(*dropped)


def test_subclasses_and_function_modes_see_the_call() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert type(sdpa(x.as_subclass(Tagged), x, x)) is Tagged
    with Watch() as watch:
        sdpa(x, x, x)
        sdpa(x, x, x, x[..., :3])
    assert watch.seen.count("lect11ext.attention") == 2


def test_a_default_device_changes_nothing() -> None:
    """It is a function mode, but none that has to see the call."""
    x = torch.randn(1, 2, 3, 4)
    with torch.device("meta"):
        assert torch.equal(sdpa(x, x, x), sdpa(x, x, x, x.new_zeros(3)))
        assert type(sdpa(x.as_subclass(Tagged), x, x)) is Tagged
        with pytest.raises(TypeError, match="score_weight must be a Tensor, but got NoneType"):
            functional.additive_attention(x, x, x, None)  # type: ignore[arg-type]
        with Watch() as watch:
            sdpa(x, x, x)
    assert "lect11ext.attention" in watch.seen


def test_autocast() -> None:
    query, key, value = operands((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3), grad=False)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out, lse = sdpa(query, key, value, return_lse=True)
        weights = functional.attention_weights(query, key, lse)
    low = [x.bfloat16() for x in (query, key, value)]
    assert out.dtype == torch.bfloat16 and torch.equal(out, sdpa(*low))
    exact = torch.softmax(query.double() @ key.double().mT / math.sqrt(8), -1).mean(1)
    plain = torch.softmax((low[0] @ low[1].mT).float() / math.sqrt(8), -1).mean(1)
    assert_within_rule(weights, plain, exact, slack=ONE_STEP)
