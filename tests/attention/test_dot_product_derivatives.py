"""Derivatives of dot-product attention: numerically, of every order, in every mode, and of every subset of inputs."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp

from tests.helpers import same_for_any_threads

from .cases import (
    GRADIENTS,
    KEY,
    Sizes,
    at_least,
    finite,
    float_mask,
    judge,
    op_arguments,
    operands,
    plain_sdpa,
    sdpa,
    wide,
)

attention = torch.ops.lect11ext.attention
BOTTOM = {"causal_alignment": "bottom_right"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (1, 2), **BOTTOM, "scale": 0.7},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.7]), "is_causal": True, **BOTTOM},
    "dropout": {"dropout_p": 0.3, "dropout_key": KEY},
    "everything": {
        "alibi_slopes": torch.tensor([0.3, 0.7]), "softcap": 1.5, "window": (2, None), "dropout_p": 0.3,
        "dropout_key": KEY, "scale": -0.6, **BOTTOM,
    },
}  # fmt: skip
SIZES = Sizes(1, 2, 1, 3, 4, 3, 2)
MASKS = {None: (), "full": (1, 2, 3, 4), "heads": (1, 2, 1, 4), "keys": (4,), "queries": (3, 1), "one": (1,)}


def inputs(mask: str | None = None, sizes: Sizes = SIZES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value and perhaps a mask that bars one key from one query; one query sees nothing."""
    args = operands(sizes, dtype)
    if mask is not None:
        numbers = torch.randn(MASKS[mask], dtype=dtype)
        if mask in ("full", "heads"):
            numbers[0, 0, 0, 1] = -math.inf
        if mask == "full":
            numbers[0, 1, 1] = -math.inf
        args.append(numbers.requires_grad_())
    return args


def bound(function: Callable[..., Any] = sdpa, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    return lambda *args: tuple(finite(function(*args, enable_gqa=True, return_lse=True, **options)))


def without_bars(function: Callable[..., Any], args: list[Tensor]) -> tuple[Callable[..., Any], list[Tensor]]:
    """The same with a mask of finite numbers: numerical differences of −∞ are NaN."""
    if len(args) < 4:
        return function, args
    bars = args[3].detach() == -math.inf
    numbers = args[3].detach().masked_fill(bars, 0.0).requires_grad_()
    return lambda *a: function(*a[:3], a[3].masked_fill(bars, -math.inf)), [*args[:3], numbers]


@pytest.mark.parametrize(
    ("name", "mask"), [(n, m) for n in OPTIONS for m in MASKS if m in (None, "full") or n in ("plain", "everything")]
)
def test_gradcheck_of_every_order(name: str, mask: str | None) -> None:
    function, args = without_bars(bound(**OPTIONS[name]), inputs(mask))
    assert gradcheck(function, args, check_forward_ad=True, check_undefined_grad=True, fast_mode=mask is not None)
    assert gradgradcheck(function, args, check_fwd_over_rev=True, fast_mode=True)


def test_slow_gradgradcheck() -> None:
    """Every element of the second derivatives, not a projection alone."""
    for mask, name in ((None, "plain"), ("heads", "everything")):
        function, args = without_bars(bound(**OPTIONS[name]), inputs(mask, Sizes(1, 2, 1, 2, 4, 2, 2)))
        assert gradgradcheck(function, args, check_fwd_over_rev=True, check_rev_over_rev=True)


# The shapes at which the tiled kernels of the derivatives take more than one tile, panel or part.
LARGE = [Sizes(1, 2, 1, 100, 70, 16, 24), Sizes(2, 2, 2, 7, 140, 33, 9), Sizes(1, 1, 1, 1, 1100, 8, 8)]


def second_order(function: Callable[..., Any], args: list[Any]) -> list[Tensor]:
    """Tangents, gradients, their tangents, and a double backward, all in the same directions."""
    torch.manual_seed(3)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    outs = function(*args)
    cotangents = [torch.randn(o.shape).to(o) for o in outs]
    cotangents = [c.requires_grad_() for c in cotangents]
    grads = torch.autograd.grad(outs, leaves, cotangents, create_graph=True)
    directions = [torch.randn(leaf.shape).to(leaf) for leaf in leaves]
    twice = torch.autograd.grad(grads, [*leaves, *cotangents], directions)

    detached = tuple(a.detach() for a in leaves)

    def backward(*a: Tensor) -> tuple[Tensor, ...]:
        return vjp(function, *a)[1](tuple(c.detach() for c in cotangents))

    tangents = jvp(function, detached, tuple(directions))[1]
    forward_over_reverse = jvp(backward, detached, tuple(directions))[1]
    return [t.detach() for t in (*outs, *grads, *twice, *tangents, *forward_over_reverse)]


@pytest.mark.parametrize(
    ("sizes", "name"),
    [(s, n) for n in OPTIONS for s in (LARGE if n in ("plain", "everything") else LARGE[1:2])],
    ids=str,
)
def test_second_order_of_large_ones(sizes: Sizes, name: str, dtype: torch.dtype) -> None:
    """By the rule, for all four types; here the numerical derivatives of gradcheck would take too long."""
    options = dict(OPTIONS[name])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(sizes.heads)
    args: list[Any] = operands(sizes, dtype)
    if name in ("plain", "everything"):
        args.append(float_mask(1, sizes.heads, 1, sizes.keys, dtype=dtype).requires_grad_())
    terms = sum(sizes[3:])
    ways = ((sdpa, args), (plain_sdpa, args), (plain_sdpa, wide(args)))
    # Where a query sees a few keys alone, much cancels to less than what the output's and its tangent's rounding makes.
    results = [[at_least(x, 1.0) for x in second_order(bound(f, **options), a)] for f, a in ways]
    # A product of two tangents is rounded at each of its factors.
    judge(*results, terms=terms**2, low_slack=8.0)


def test_second_order_of_every_capability(dtype: torch.dtype, capability: str) -> None:
    for name in ("plain", "everything"):
        args: list[Any] = operands(Sizes(1, 2, 1, 9, 70, 16, 8), dtype)
        args.append(float_mask(1, 1, 9, 70, dtype=dtype).requires_grad_())
        results = [
            second_order(bound(f, **OPTIONS[name]), a)
            for f, a in ((sdpa, args), (plain_sdpa, args), (plain_sdpa, wide(args)))
        ]
        judge(*results, terms=10**4, low_slack=8.0)


def test_second_order_gives_the_same_bits_with_all_threads(dtype: torch.dtype) -> None:
    args: list[Any] = operands(Sizes(1, 2, 1, 100, 1030, 16, 8), dtype)
    args.append(float_mask(1, 1, 1, 1030, dtype=dtype).requires_grad_())
    same_for_any_threads(lambda: second_order(bound(**OPTIONS["everything"]), args))


@pytest.mark.parametrize("mask", [None, "full", "heads"])
@pytest.mark.parametrize("name", ["plain", "causal", "dropout", "everything"])
def test_third_order(name: str, mask: str | None) -> None:
    """Through the composites: gradients of gradients of gradients, and tangents of them."""
    sizes = Sizes(1, 2, 1, 3, 4, 2, 2)
    args = inputs(mask, sizes)

    def third(module_function: Callable[..., Any]) -> list[Tensor]:
        function = bound(module_function, **OPTIONS[name])

        def first(*a: Tensor) -> Tensor:
            return sum(o.pow(3).sum() for o in function(*a))  # type: ignore[return-value]

        every = tuple(range(len(args)))

        def squared(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return lambda *a: sum(g.square().sum() for g in grad(loss, every)(*a))  # type: ignore[return-value]

        detached = tuple(a.detach() for a in args)
        reverse = grad(squared(squared(first)), every)(*detached)
        directions = tuple(torch.ones_like(a) for a in args)
        forward = jvp(grad(squared(first), every), detached, directions)[1]
        nested = jvp(lambda *a: jvp(function, a, directions)[1], detached, directions)[1]
        over = grad(lambda *a: sum(o.pow(2).sum() for o in jvp(function, a, directions)[1]), every)(*detached)
        return [*reverse, *forward, *nested, *over]

    for got, expected in zip(third(sdpa), third(plain_sdpa), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_hessians_in_every_composition() -> None:
    q, k, v = (x.detach() for x in operands(Sizes(1, 2, 1, 2, 3, 2, 2), torch.float64))

    def loss(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: sum(o.pow(3).sum() for o in function(x, k * x.sum(), v, enable_gqa=True, return_lse=True))

    expected = hessian(loss(plain_sdpa))(q)
    for composed in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(composed(loss(sdpa))(q), expected)


@pytest.mark.parametrize("wanted", [(i,) for i in range(4)] + [(0, 1), (1, 2), (0, 3), (2, 3)], ids=str)
def test_subsets_of_inputs_that_require_grad(wanted: tuple[int, ...]) -> None:
    args = [a.requires_grad_(i in wanted) for i, a in enumerate([x.detach() for x in inputs("heads")])]
    results = []
    for function in (sdpa, plain_sdpa):
        outs = bound(function, is_causal=True)(*args)
        leaves = [args[i] for i in wanted]
        grads = torch.autograd.grad(sum(o.sum() for o in outs), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in grads) + sum(0 * x.sum() for x in leaves)  # values alone: constant
        results.append([*outs, *grads, *torch.autograd.grad(penalty, leaves)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, i=i: f"{i}: {m}")


@pytest.mark.parametrize("which", [0, 1], ids=["output", "lse"])
@pytest.mark.parametrize("mask", [None, "full", "heads", "queries"])
def test_one_of_the_outputs_alone(which: int, mask: str | None) -> None:
    """The other's gradient is undefined, in the backward and in its derivatives."""
    args = inputs(mask)
    results = []
    for function in (sdpa, plain_sdpa):
        out = bound(function, softcap=2.0)(*args)[which]
        nothing = sum(0 * x.nan_to_num().sum() for x in args)  # of which LSE and values are
        grads = torch.autograd.grad(out.pow(2).sum() + nothing, args, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in grads) + nothing, args)
        results.append([out, *grads, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_tangents_of_some_inputs() -> None:
    args = [a.detach() for a in inputs("heads")]
    for some in ((0,), (1,), (2,), (3,), (0, 2), (1, 3)):
        picked = tuple(args[i] for i in some)
        directions = tuple(torch.randn_like(a) for a in picked)

        def run(function: Callable[..., Any], some: tuple[int, ...] = some) -> Callable[..., Any]:
            def call(*values: Tensor) -> Any:
                given = dict(zip(some, values, strict=True))
                return bound(function, is_causal=True)(*(given.get(i, a) for i, a in enumerate(args)))

            return call

        got, expected = (jvp(run(f), picked, directions)[1] for f in (sdpa, plain_sdpa))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_backward_from_outside() -> None:
    """The backward op takes output and LSE from elsewhere: of two halves of the keys, merged."""
    query, key, value = (x.detach() for x in operands(Sizes(1, 2, 2, 9, 40, 8, 8), torch.float64))
    arguments = op_arguments(query, key, value)
    output, lse = attention(*arguments)
    grad_output = torch.randn_like(output)
    backward, mask = torch.ops.lect11ext.attention_backward, [True, True, True, False]
    whole = backward(grad_output, None, *arguments, output, lse, mask)
    halves = []
    for part in (slice(0, 17), slice(17, 40)):
        half = op_arguments(query, key[:, :, part], value[:, :, part])
        halves.append(backward(grad_output, None, *half, output, lse, mask))
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([halves[0][i], halves[1][i]], 2), whole[i])


@pytest.mark.parametrize("mask", [[i == j for i in range(4)] for j in range(4)] + [[False] * 4, [True] * 4], ids=str)
def test_backward_gives_what_is_asked_for(mask: list[bool]) -> None:
    arguments = op_arguments(*(x.detach() for x in inputs("heads")))
    output, lse = attention(*arguments)
    everything = torch.ops.lect11ext.attention_backward(output, lse.clamp_min(-1), *arguments, output, lse, [True] * 4)
    some = torch.ops.lect11ext.attention_backward(output, lse.clamp_min(-1), *arguments, output, lse, mask)
    for name, wanted, a, b in zip(GRADIENTS, mask, some, everything, strict=True):
        assert (a is not None and torch.equal(a, b)) if wanted else (a is None or a.numel() == 0), name


def test_slopes_have_no_derivative_in_the_op() -> None:
    args = [a.detach() for a in inputs()]
    arguments = op_arguments(*args, slopes=torch.rand(2, requires_grad=True))
    with pytest.raises(NotImplementedError, match="alibi_slopes have no derivative here: give -slope"):
        attention(*arguments)


def test_in_place_change_of_a_saved_input_is_noticed() -> None:
    args = inputs()
    out = sdpa(*args, enable_gqa=True)
    with torch.no_grad():
        args[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_graph_is_freed_and_kept() -> None:
    args = inputs("heads")
    out = sdpa(*args, enable_gqa=True)
    out.sum().backward(retain_graph=True)
    first = args[0].grad.clone()
    out.sum().backward()
    torch.testing.assert_close(args[0].grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_nodes_that_are_dropped_free_what_they_keep() -> None:
    """No node holds itself through its outputs: neither a forward's, nor a backward's, nor a tangent's."""
    gc.collect()
    gc.disable()
    try:
        for kind in ("forward", "backward", "tangent"):
            args = inputs("heads")
            inner = [a * 1 for a in args]  # kept by nothing but the graph
            kept = [weakref.ref(x) for x in inner]
            out, lse = sdpa(*inner, enable_gqa=True, return_lse=True)
            if kind == "backward":
                results = torch.autograd.grad(out.sum() + lse.clamp_min(-9).sum(), inner, create_graph=True)
            elif kind == "tangent":
                arguments = op_arguments(*inner)
                results = torch.ops.lect11ext.attention_tangent(*arguments, out, lse, *inner[:3], None)
                del arguments
            else:
                results = (out, lse)
            assert all(r.requires_grad for r in results)
            del out, lse, results, inner
            for _ in range(100 if args[0].is_cuda else 0):  # a thread of autograd's may still be letting go
                if all(ref() is None for ref in kept):
                    break
                time.sleep(0.01)
            assert not any(ref() is not None for ref in kept), kind
    finally:
        gc.enable()


def test_same_tensor_for_all_arguments() -> None:
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (sdpa, plain_sdpa):
        out = function(x, x, x, x)
        (first,) = torch.autograd.grad(out.pow(2).sum(), x, create_graph=True)
        results.append([out, first, *torch.autograd.grad(first.pow(2).sum(), x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
