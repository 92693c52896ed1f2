"""What the functions make of their arguments before the op runs, and of its results: shapes, masks, options, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import functional, reference
from lect11ext._load import _C
from tests.attention.cases import in_pieces
from tests.helpers import ONE_STEP, check, double, flat, seeded

sdpa = functional.scaled_dot_product_attention
KEY = torch.tensor([2**63 - 5, -7])
SLOPES = torch.tensor([0.5, 0.25, 1.0, 0.125])


def operands(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=grad) for shape in shapes]


def compare(
    ours: Callable[..., Any], plain: Callable[..., Any], args: list[Any], slack: float = ONE_STEP, **kwargs: Any
) -> None:
    """By the rule; what is not floating-point is the same for float64."""
    wide = [isinstance(a, Tensor) and a.is_floating_point() for a in args]

    def bound(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: Tensor) -> Any:
            given = iter(tensors)
            outs = flat(function(*(next(given) if w else a for a, w in zip(args, wide, strict=True)), **kwargs))
            return [torch.where(x == -math.inf, -77, x) for x in outs]  # a difference of infinities says nothing

        return call

    check(bound(ours), bound(plain), [a for a, w in zip(args, wide, strict=True) if w], slack)


def both(args: list[Any], function: str = "scaled_dot_product_attention", **kwargs: Any) -> None:
    compare(getattr(functional, function), getattr(reference, function), args, **kwargs)


SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((5, 8), (7, 8), (7, 3)),
    ((4, 5, 8), (4, 7, 8), (4, 7, 3)),
    ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
    ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 3)),
    ((2, 1, 2, 4, 5, 8), (3, 1, 4, 7, 8), (4, 7, 3)),
    ((2, 4, 5, 8), (4, 7, 8), (7, 3)),
    ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 3)),
    ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 3)),
    ((1, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
    ((2, 4, 1, 8), (2, 4, 2, 8), (2, 4, 2, 8)),
    ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 3)),
    ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
    ((0, 3, 4, 5, 8), (0, 3, 4, 7, 8), (0, 3, 4, 7, 3)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes_broadcast(shapes: Any) -> None:
    both(operands(*shapes), return_lse=True)
    both(operands(*shapes), is_causal=True, causal_alignment="bottom_right", scale=0.3)


def test_one_key() -> None:
    """Its weight is 1, and what is left of its score's gradient is rounding."""
    query, key, value = operands((2, 4, 5, 8), (2, 4, 1, 8), (2, 4, 1, 3))
    out = sdpa(query, key, value)
    torch.testing.assert_close(out, value.expand(2, 4, 5, 3))
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    for grad, expected in zip(grads, (0.0, 0.0, 5.0), strict=True):
        torch.testing.assert_close(grad, torch.full_like(grad, expected), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("heads", [(4, 2, 2), (4, 1, 1), (4, 4, 4), (4, 2, 4), (4, 1, 2), (6, 3, 3)])
@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
def test_grouped_queries(heads: tuple[int, int, int], lead: tuple[int, ...]) -> None:
    h, hk, hv = heads
    both(operands((*lead, h, 5, 8), (*lead, hk, 7, 8), (*lead, hv, 7, 3)), enable_gqa=True, return_lse=True)


MASKS = [
    (7,),
    (5, 7),
    (1, 7),
    (5, 1),
    (4, 5, 7),
    (1, 5, 7),
    (2, 1, 1, 7),
    (2, 4, 5, 7),
    (3, 1, 4, 1, 7),
    (1, 2, 1, 5, 7),
]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_broadcast(shape: tuple[int, ...], kind: str) -> None:
    args = operands(*SHAPES[3 if len(shape) == 5 else 2])
    bars = torch.rand(shape) < 0.4
    mask = ~bars if kind == "bool" else torch.randn(shape).masked_fill(bars, -math.inf)
    # What is added to all scores of a query changes nothing: that gradient is zero, and its roundings cannot be judged.
    constant = kind == "float" and shape[-1] == 1
    mask.requires_grad_(kind == "float" and not constant)
    both([*args, mask], return_lse=kind == "bool")
    both([*args, mask], window=(2, 1), softcap=2.0)
    for options in ({}, {"window": (2, 1), "softcap": 2.0}) if constant else ():
        out = sdpa(*args, mask.requires_grad_(), **options)
        (grad,) = torch.autograd.grad(out, mask, torch.randn(out.shape))
        assert grad.abs().max() <= 100 * torch.finfo(torch.float32).eps  # terms of which the sum is about 10


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broadcast operands and masks reach the op as views of what was given."""
    seen: list[Any] = []
    op = _C.attention
    monkeypatch.setattr(_C, "attention", lambda *args: seen.append(args) or op(*args))
    batch, heads, memory = (3, 2), 4, {}
    query, key, value = operands((*batch, heads, 5, 8), (2, 1, 7, 8), (7, 3), grad=False)
    for mask in (torch.randn(7), torch.randn(5, 7), torch.randn(4, 5, 7), torch.randn(3, 2, 1, 1, 7)):
        sdpa(query, key, value, mask)
        for name, x, given in zip("qkvm", seen[-1], (query, key, value, mask), strict=False):
            memory[name] = (x.untyped_storage().data_ptr(), given.untyped_storage().data_ptr())
        assert memory["q"][0] == memory["q"][1] and memory["m"][0] == memory["m"][1]
        assert memory["v"][0] == memory["v"][1]
        assert seen[-1][1].shape == (6, 1, 7, 8) and seen[-1][3].dim() == 4
    one_batch = [query[0], key, value]
    sdpa(*one_batch)
    for x, given in zip(seen[-1], one_batch, strict=False):
        assert x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    assert seen[-1][1].stride(2) == 8 and seen[-1][1].shape == (2, 1, 7, 8)


def test_the_short_way_is_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    args = operands((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3))
    cases: list[dict[str, Any]] = [{}, {"is_causal": True}, {"scale": 0.7}, {"return_lse": True}, {"enable_gqa": True}]
    short = [sdpa(*args, **kwargs) for kwargs in cases]
    monkeypatch.setattr("lect11ext.functional.attention._fit", lambda *args: False)
    for kwargs, out in zip(cases, short, strict=True):
        long = sdpa(*args, **kwargs)
        for a, b in zip(out, long, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("slopes", [(4,), (2, 4), (2, 1)])
def test_alibi(alignment: str, slopes: tuple[int, ...]) -> None:
    args = operands((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3))
    kwargs: dict[str, Any] = {"causal_alignment": alignment, "enable_gqa": True}
    both(args, alibi_slopes=torch.rand(slopes), window=(3, 2), **kwargs)
    args.append(torch.rand(slopes, requires_grad=True))  # slopes with a gradient
    for mask in (None, torch.rand(5, 7) < 0.7, torch.randn(2, 1, 1, 7)):
        ways = [
            lambda q, k, v, s, *m, f=f: f(q, k, v, *m, alibi_slopes=s, return_lse=True, **kwargs)
            for f in (sdpa, reference.scaled_dot_product_attention)
        ]
        compare(*ways, [*args, *([] if mask is None else [mask])])


@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (3, 2, 4)])
def test_dropout(lead: tuple[int, ...]) -> None:
    args = operands((*lead, 5, 8), (*lead, 7, 8), (*lead, 7, 3))
    both(args, dropout_p=0.3, dropout_key=KEY, return_lse=True)
    generator = seeded(0)
    outs = [sdpa(*args, dropout_p=0.5, generator=generator.manual_seed(3)) for _ in range(2)]
    assert torch.equal(*outs)
    before = generator.get_state()
    torch.manual_seed(3)
    assert torch.equal(sdpa(*args, dropout_p=0.5), outs[0])
    assert not sdpa(*args, dropout_p=1.0).any()
    assert torch.equal(sdpa(*args, dropout_p=0.0, generator=generator), sdpa(*args))
    assert torch.equal(generator.get_state(), before)


def test_dropout_keeps_the_mean() -> None:
    query, key, value = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 7, 8), torch.rand(1, 1, 7, 3)
    many = sdpa(query.expand(1, 1, 40000, 8), key, value, dropout_p=0.25)
    torch.testing.assert_close(many.mean(2), sdpa(query, key, value)[0], atol=0.02, rtol=0)


def test_merge() -> None:
    query, key, value = operands((2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 3))
    for cut in (0, 4, 9):
        parts = [sdpa(query, key[:, :, p], value[:, :, p], return_lse=True) for p in (slice(cut), slice(cut, 9))]
        merged = functional.merge_attention(*parts[0], *parts[1])
        whole = sdpa(query, key, value, return_lse=True)
        cotangents = [torch.randn(x.shape) for x in whole]
        for a, b in zip(
            [*merged, *torch.autograd.grad(merged, (query, key, value), cotangents)],
            [*whole, *torch.autograd.grad(whole, (query, key, value), cotangents)],
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_merge_of_nothing_and_its_derivatives() -> None:
    lse_a, lse_b = torch.randn(3, 4).double(), torch.randn(3, 4).double() * 300
    lse_a[0, :2] = lse_b[0, 1:3] = -math.inf
    args = [torch.randn(3, 4, 2).double(), lse_a, torch.randn(3, 4, 2).double(), lse_b]
    args = [a.requires_grad_() for a in args]
    out, lse = functional.merge_attention(*args)
    for got, expected in zip((out, lse), reference.merge_attention(*args), strict=True):
        torch.testing.assert_close(got, expected)
    assert lse[0, 1] == -math.inf and not out[0, 1].any() and torch.equal(out[0, 0], args[2][0, 0])
    grads = torch.autograd.grad((out, lse), args, [torch.randn_like(out), torch.randn_like(lse)])
    assert not any(g.isnan().any() for g in grads)
    finite = [a.detach()[1:].requires_grad_() for a in args]
    finite[3] = (finite[3] / 300).detach().requires_grad_()
    assert torch.autograd.gradcheck(functional.merge_attention, finite, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(functional.merge_attention, finite)
    half = functional.merge_attention(*(a.detach().to(t) for a, t in zip(args, [torch.half, torch.float32] * 2)))  # noqa: B905
    assert [x.dtype for x in half] == [torch.half, torch.float32]


def test_merge_with_what_saw_nothing_and_is_not_finite() -> None:
    out, lse = torch.randn(3, 4, 2), torch.randn(3, 4)
    for waste in (math.nan, math.inf):
        nothing = [torch.full((3, 4, 2), waste).requires_grad_(), torch.full((3, 4), -math.inf).requires_grad_()]
        for a, b in (([out, lse], nothing), (nothing, [out, lse])):
            merged = functional.merge_attention(*a, *b)
            assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
            assert not any(g.any() for g in torch.autograd.grad(merged[0].sum() + merged[1].sum(), nothing))


STARTS_Q, STARTS_K = torch.tensor([0, 3, 3, 11, 12]), torch.tensor([0, 4, 6, 10, 10])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"return_lse": True},
        {"is_causal": True, "scale": 0.2},
        {"window": (1, 2), "causal_alignment": "bottom_right", "softcap": 3.0},
        {"enable_gqa": True, "alibi_slopes": SLOPES},
        {"dropout_p": 0.4, "dropout_key": KEY},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_varlen(kwargs: dict[str, Any], index: torch.dtype) -> None:
    kv_heads = 2 if "enable_gqa" in kwargs else 4
    args = operands((12, 4, 8), (10, kv_heads, 8), (10, kv_heads, 3))
    both([*args, STARTS_Q.to(index), STARTS_K.to(index)], "varlen_attention", **kwargs)


def test_nested_tensors() -> None:
    parts = [torch.randn(n, 4, 8) for n in (3, 1, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    for kwargs in ({}, {"is_causal": True}, {"window": (1, 0), "softcap": 2.0}):
        out, lse = sdpa(nested, nested, nested, return_lse=True, **kwargs)
        assert out.shape == nested.shape and lse.shape == nested.shape[:-1]
        for i, part in enumerate(parts):
            x = part.transpose(0, 1)
            expected, expected_lse = sdpa(x, x, x, return_lse=True, **kwargs)
            torch.testing.assert_close(out.unbind()[i], expected)
            torch.testing.assert_close(lse.transpose(1, 2).unbind()[i].T, expected_lse)
    leaves = [p.clone().requires_grad_() for p in parts]
    again = torch.nested.as_nested_tensor(leaves, layout=torch.jagged).transpose(1, 2)
    grads = torch.autograd.grad(sdpa(again, again, again).values().square().sum(), leaves)
    for leaf, grad in zip(leaves, grads, strict=True):
        x = leaf.transpose(0, 1)
        torch.testing.assert_close(grad, torch.autograd.grad(sdpa(x, x, x).square().sum(), leaf)[0])


WEIGHTS: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "scale": 0.3},
    {"window": (1, 2), "causal_alignment": "bottom_right", "softcap": 2.0},
    {"alibi_slopes": SLOPES},
    {"dropout_p": 0.4, "dropout_key": KEY},
    {"attn_mask": "bool"},
    {"attn_mask": "float"},
]


@pytest.mark.parametrize("kwargs", WEIGHTS, ids=lambda kwargs: " ".join(map(str, kwargs)) or "plain")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("chunk", [None, 2**20, 120])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_weights(
    kwargs: dict[str, Any], average: bool, chunk: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_pieces(chunk, monkeypatch)
    query, key = operands((2, 4, 5, 8), (2, kv_heads, 7, 8))
    options = {"enable_gqa": True, **kwargs}
    args: list[Any] = [query, key]
    mask = options.pop("attn_mask", None)
    if mask is not None:
        bars = torch.rand(2, 1, 5, 7) < 0.4
        bars[0, 0, 2] = bars[..., 3] = True
        with torch.no_grad():
            key[:, :, 3] = math.nan  # no query sees it
        mask = ~bars if mask == "bool" else torch.randn(2, 1, 5, 7).masked_fill(bars, -math.inf)
    lse = reference.scaled_dot_product_attention(query, key, key, mask, **options, return_lse=True)[1]
    args.append(lse.detach().requires_grad_())
    masks = [] if mask is None else [mask if mask.dtype == torch.bool else mask.requires_grad_()]
    options["average_heads"] = average
    both([*args, *masks], "attention_weights", **options)


@pytest.mark.parametrize("shapes", SHAPES[:6] + SHAPES[8:], ids=str)
@pytest.mark.parametrize("average", [True, False])
def test_weights_of_every_shape(shapes: Any, average: bool) -> None:
    query, key, value = operands(*shapes)
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    out, lse = sdpa(query.expand(*lead, *query.shape[-2:]), key, value, return_lse=True)
    weights = functional.attention_weights(query, key, lse, average_heads=False)
    torch.testing.assert_close(weights @ value, out)
    got = functional.attention_weights(query, key, lse, average_heads=average)
    whole = weights if weights.dim() > 2 else weights[None]
    assert torch.allclose(got, whole.mean(-3) if average else weights, atol=1e-6)


def test_derivatives_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    args = double(operands((1, 4, 3, 2), (1, 2, 4, 2), (1, 4, 3)))
    for chunk in (None, 2**20, 12):
        in_pieces(chunk, monkeypatch)

        def weights(*a: Tensor) -> Tensor:
            return functional.attention_weights(*a, enable_gqa=True, is_causal=True, softcap=2.0)

        assert torch.autograd.gradcheck(weights, args)
        assert torch.autograd.gradgradcheck(weights, args)
    monkeypatch.undo()
    assert torch.autograd.gradcheck(weights, args, check_forward_ad=True)
    samples = torch.randn(3, 1, 4, 3, 2)
    got = torch.vmap(lambda q: functional.attention_weights(q, samples[0], torch.ones(1, 4, 3)))(samples)
    each = [functional.attention_weights(q, samples[0], torch.ones(1, 4, 3)) for q in samples]
    torch.testing.assert_close(got, torch.stack(each))


@pytest.mark.parametrize("width", [0.7, torch.tensor(0.7), SLOPES + 0.5], ids=["number", "one", "of heads"])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_kernel_attention(width: Any, mask: str | None, kv_heads: int) -> None:
    args: list[Any] = operands((2, 4, 5, 3), (2, kv_heads, 7, 3), (2, kv_heads, 7, 3))
    args.append(width.clone().requires_grad_() if isinstance(width, Tensor) else width)
    bars = torch.rand(5, 7) < 0.3
    if mask is not None:
        args.append(~bars if mask == "bool" else torch.randn(5, 7).masked_fill(bars, -math.inf))
    both(args, "kernel_attention", enable_gqa=True, return_lse=True, slack=4 * ONE_STEP)  # width's gradient: 280 terms
    # Far from the origin, as years are: float32 has few digits left for squares.
    far = [args[0] + 2000, args[1] + 2000, *args[2:]]
    got = functional.kernel_attention(*far, enable_gqa=True)
    exact = reference.kernel_attention(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in far), enable_gqa=True
    )
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-4)


def test_kernel_regression_of_plain_points() -> None:
    x = torch.linspace(0, 5, 50)[:, None]
    y = functional.kernel_attention(x, x, x.sin(), 0.3)
    expected = torch.softmax(-(x - x.T).square() / (2 * 0.3**2), -1) @ x.sin()
    torch.testing.assert_close(y, expected)


def test_nan_that_no_query_sees() -> None:
    query, key, value = operands((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3), grad=False)
    dirty = [x.index_fill(2, torch.tensor([3]), math.nan).requires_grad_() for x in (key, value)]
    mask = torch.ones(7, dtype=torch.bool)
    mask[3] = False
    for function, extra in ((sdpa, ()), (functional.kernel_attention, (1.0,))):
        out = function(query, *dirty, *extra, mask)
        torch.testing.assert_close(out, function(query, key, value, *extra, mask))
        assert not any(g.isnan().any() for g in torch.autograd.grad(out.sum(), dirty))
