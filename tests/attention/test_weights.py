"""The op of attention's weights: values and gradients by the rule, derivatives, transforms, threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import functional, reference
from tests.attention.cases import KEY, Sizes, bool_mask, float_mask, in_pieces, judge, operands, wide
from tests.helpers import Watch, same_for_any_threads, same_products

weights_of = functional.attention_weights
ops = torch.ops.lect11ext

SIZES = [
    Sizes(2, 4, 2, 37, 131, 24, 8),
    Sizes(1, 2, 2, 100, 300, 64, 8),  # several tiles, and several blocks
    Sizes(2, 3, 1, 1, 70, 33, 8),
    Sizes(1, 4, 4, 5, 1, 8, 8),
    Sizes(2, 2, 1, 6, 5, 0, 8),
    Sizes(0, 2, 2, 6, 5, 8, 8),
    Sizes(2, 2, 2, 0, 5, 8, 8),
    Sizes(2, 2, 2, 5, 0, 8, 8),
]
LARGE = Sizes(1, 2, 1, 200, 1300, 16, 8)  # keys in parts
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True, "scale": -0.3},
    "window": {"window": (20, 3), "causal_alignment": "bottom_right", "softcap": 2.0},
    "slopes": {"alibi_slopes": True, "is_causal": True},
    "bool": {"attn_mask": "bool"},
    "float": {"attn_mask": "float", "softcap": 3.0},
    "shared": {"attn_mask": "shared"},
    "padding": {"attn_mask": "padding", "dropout_p": 0.2, "dropout_key": KEY},
    "dropout": {"dropout_p": 0.4, "dropout_key": KEY, "is_causal": True},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def build(sizes: Sizes, name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Any], dict[str, Any]]:
    """Query, key, lse and perhaps a mask, and options."""
    options = {"enable_gqa": True, **OPTIONS[name]}
    query, key, _ = operands(sizes, dtype)
    b, h, queries, keys = sizes.batch, sizes.heads, sizes.queries, sizes.keys
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(b, h)
    mask: Any = {
        "bool": lambda: bool_mask(b, 1, queries, keys),
        "float": lambda: float_mask(b, h, queries, keys, dtype=dtype).requires_grad_(),
        "shared": lambda: float_mask(1, 1, 1, keys, dtype=dtype).requires_grad_(),
        "padding": lambda: float_mask(b, 1, queries, 1, dtype=dtype).requires_grad_(),
        None: lambda: None,
    }[options.pop("attn_mask", None)]()
    given = wide([query, key, mask])
    lse = reference.scaled_dot_product_attention(given[0], given[1], given[1], given[2], **options, return_lse=True)[1]
    lse = lse.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return [query, key, lse, *([] if mask is None else [mask])], options


def with_gradients(function: Any, args: list[Any], cotangent: Tensor | None, options: Any) -> list[Tensor]:
    out = function(*args, **options)
    leaves = [a for a in args if a.requires_grad]
    cotangent = torch.randn(out.shape).to(out) if cotangent is None else cotangent.to(out)
    return [out, *torch.autograd.grad(out, leaves, cotangent)]


def compare(args: list[Any], **options: Any) -> None:
    cotangent = torch.randn(reference.attention_weights(*args, **options).shape).to(args[0].dtype)
    got = with_gradients(weights_of, args, cotangent, options)
    plain = with_gradients(reference.attention_weights, args, cotangent, options)
    exact = with_gradients(reference.attention_weights, wide(args), cotangent, options)
    judge(got, plain, exact, max(1, args[0].size(1) * args[0].size(2), args[1].size(2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name: str, average: bool, dtype: torch.dtype) -> None:
    for sizes in [*SIZES, LARGE] if dtype == torch.float32 else SIZES[:1]:
        args, options = build(sizes, name, dtype)
        compare(args, **options, average_heads=average)


def test_of_no_heads() -> None:
    none = torch.zeros(2, 0, 5, 8)
    assert weights_of(none, none, none[..., 0], average_heads=False).shape == (2, 0, 5, 5)
    assert weights_of(none, none, none[..., 0]).isnan().all()


@pytest.mark.parametrize("average", [True, False])
def test_layouts(average: bool) -> None:
    """Operands and gradients of any strides."""
    packed = torch.randn(2, 70, 3, 4, 16).permute(2, 0, 3, 1, 4)
    query, key = (x.detach().requires_grad_() for x in packed[:2])
    lse = torch.randn(70, 2, 4).permute(1, 2, 0) + 4
    out = weights_of(query, key, lse, average_heads=average)
    dense = [x.detach().contiguous().requires_grad_() for x in (query, key)]
    expected = weights_of(*dense, lse.contiguous(), average_heads=average)
    assert same_products(out, expected)
    apart = torch.randn(*out.shape[:-1], 2 * out.size(-1))[..., ::2]
    for grad in (torch.ones(()).expand_as(out), torch.randn_like(out).mT, apart):
        got = torch.autograd.grad(out, (query, key), grad, retain_graph=True)
        other = torch.autograd.grad(expected, dense, grad.contiguous(), retain_graph=True)
        assert all(same_products(a, b) for a, b in zip(got, other, strict=True))


def test_nan_that_no_query_sees() -> None:
    args, options = build(SIZES[0], "window")
    clean = with_gradients(weights_of, args, torch.ones(2, 37, 131), options)
    seen = clean[0].detach()[0].sum(0) > 0
    assert not seen.all()
    with torch.no_grad():
        args[1][:, :, ~seen] = math.nan
    dirty = with_gradients(weights_of, args, torch.ones(2, 37, 131), options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    mask = seen.expand(37, -1)
    for softcap in (None, 2.0):
        for grad in with_gradients(weights_of, [*args, mask], None, {"enable_gqa": True, "softcap": softcap}):
            assert not grad.isnan().any()


def test_a_query_of_nan_has_nan_where_it_sees() -> None:
    query, key, lse = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 70, 8), torch.zeros(1, 2, 5)
    query[:, 1, 3] = lse[:, 1, 3] = math.nan
    for mask in (None, torch.arange(70) < 66):
        weights = weights_of(query, key, lse, mask, window=(None, 2), average_heads=False)
        expected = reference.attention_weights(query, key, lse, mask, window=(None, 2), average_heads=False)
        assert torch.equal(weights.isnan(), expected.isnan()) and weights.isnan().sum() == 6


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["window", "float", "shared", "dropout"])
def test_derivatives(name: str, average: bool) -> None:
    args, options = build(Sizes(2, 2, 1, 3, 4, 2, 2), name, torch.float64)
    if len(args) > 3:
        args[3] = torch.randn_like(args[3], requires_grad=True)  # differences see no −∞

    def call(*tensors: Tensor) -> Tensor:
        return weights_of(*tensors, **options, average_heads=average)

    assert torch.autograd.gradcheck(call, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["plain", "float", "slopes", "dropout"])
def test_opcheck(name: str, average: bool) -> None:
    args, options = build(Sizes(2, 4, 2, 5, 7, 8, 8), name)
    mask = args[3] if len(args) > 3 else None
    slopes, key = options.get("alibi_slopes"), options.get("dropout_key")
    right = 0 if options.get("is_causal") else None
    arguments = (
        *args[:3], mask, slopes, key, options.get("dropout_p", 0.0), None, 5, right, False, options.get("softcap"),
        average,
    )  # fmt: skip
    torch.library.opcheck(ops.attention_weights.default, arguments)
    grad = torch.randn(2, 5, 7) if average else torch.randn(2, 4, 5, 7)
    for leaf in (False, True):
        given = [a.detach().requires_grad_(leaf and a.requires_grad) if isinstance(a, Tensor) else a for a in arguments]
        torch.library.opcheck(
            ops.attention_weights_backward.default, (grad, *given, [True, True, True, mask is not None])
        )


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["plain", "float", "shared", "slopes", "dropout"])
def test_vmap(name: str, average: bool) -> None:
    samples = [build(Sizes(2, 4, 2, 5, 7, 8, 8), name) for _ in range(3)]
    options = samples[0][1]

    def gradients(*args: Tensor) -> Any:
        def total(*tensors: Tensor) -> Tensor:
            return weights_of(*tensors, **options, average_heads=average).square().sum()

        out = weights_of(*args, **options, average_heads=average)
        return out, *torch.func.grad(total, tuple(range(len(args))))(*args)

    stacked = [torch.stack([s[0][i].detach() for s in samples], i % 2) for i in range(len(samples[0][0]))]
    got = torch.vmap(gradients, tuple(i % 2 for i in range(len(stacked))))(*stacked)
    each = [gradients(*(a.detach() for a in s[0])) for s in samples]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))
    got = torch.vmap(gradients, (0, *[None] * (len(stacked) - 1)))(stacked[0], *(a.detach() for a in samples[0][0][1:]))
    each = [gradients(s[0][0].detach(), *(a.detach() for a in samples[0][0][1:])) for s in samples]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_compiled_whole() -> None:
    def call(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor) -> Tensor:
        return weights_of(query, key, lse, mask, enable_gqa=True, softcap=3.0)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for keys in (7, 9):
        args, _ = build(Sizes(2, 4, 2, 5, keys, 8, 8), "float")
        results = [with_gradients(f, args, torch.ones(2, 5, keys), {}) for f in (compiled, call)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["plain", "float", "shared", "dropout"])
def test_threads_and_repeats_give_the_same_bits(name: str, average: bool) -> None:
    args, options = build(LARGE, name)
    cotangent = torch.randn(1, 200, 1300) if average else torch.randn(1, 2, 200, 1300)
    same_for_any_threads(lambda: with_gradients(weights_of, args, cotangent, {**options, "average_heads": average}))


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_plain_pytorch_of_other_devices(name: str, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (2**20, 4000):
        in_pieces(chunk, monkeypatch)
        args, options = build(SIZES[0], name)
        compare(args, **options, average_heads=average)


@pytest.mark.cpu  # elsewhere the function is plain PyTorch, in pieces
def test_the_op_is_taken() -> None:
    args, _ = build(SIZES[3], "plain")
    with Watch() as watch:
        weights_of(*args)
    assert "lect11ext.attention_weights" in watch.seen


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({1: torch.zeros(2, 4, 7, 8, dtype=torch.float64)}, TypeError, "key must have the type of query, Float"),
        ({2: torch.zeros(2, 4, 5, dtype=torch.float64)}, TypeError, "lse must be Float, but got Double"),
        ({2: torch.zeros(2, 4, 6)}, ValueError, r"lse must have shape \[2, 4, 5\]"),
        ({3: torch.zeros(1, 1, 5, 6)}, ValueError, r"attn_mask must broadcast to"),
        ({6: 0.5}, ValueError, "dropout_key must be given with a dropout_p"),
    ],
)
def test_wrong_calls(change: dict[int, Any], kind: type[Exception], message: str) -> None:
    arguments: list[Any] = [torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 5)]
    arguments += [None, None, None, 0.0, None, None, None, False, None, True]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(kind, match=message):
        ops.attention_weights(*arguments)
    grad = torch.zeros(2, 5, 7)
    with pytest.raises(kind, match=message):
        ops.attention_weights_backward(grad, *arguments, [True, True, True, False])


@pytest.mark.parametrize("devices", [("cpu", "meta"), ()], ids=["op", "plain"])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"query": torch.zeros(2, 4, 5, 8).long()}, TypeError, "query must be float"),
        (
            {"key": torch.zeros(2, 4, 7, 8).double()},
            TypeError,
            "key must have the type of query, (Float|torch.float32)",
        ),
        ({"key": torch.zeros(2, 4, 7, 8).to("meta")}, RuntimeError, "same device, but key is on meta"),
        ({"lse": torch.zeros(2, 4, 5).to("meta")}, RuntimeError, "same device, but lse is on meta"),
        ({"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask must be bool, float32 or of query's type"),
        ({"attn_mask": torch.ones(5, 7).double()}, TypeError, "attn_mask must be bool, float32 or of query's type"),
        ({"attn_mask": torch.ones(5, 7).to("meta")}, RuntimeError, "same device, but attn_mask is on meta"),
        ({"alibi_slopes": torch.ones(4).to("meta")}, RuntimeError, "same device, but alibi_slopes is on meta"),
        ({"softcap": 1e39}, ValueError, "softcap must be in float32's range"),
        ({"softcap": 1e-39}, ValueError, "softcap must be in float32's range"),
        ({"scale": -1e31}, ValueError, r"scale must be from -1e\+30 to 1e\+30 for a query of"),
    ],
)
def test_both_ways_refuse_the_same(
    change: dict[str, Any],
    kind: type[Exception],
    message: str,
    devices: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lect11ext.functional._attention_weights._OP_DEVICES", devices)
    query, key, lse = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 5)
    with pytest.raises(kind, match=message):
        weights_of(**{"query": query, "key": key, "lse": lse, **change})


def test_a_gradient_of_another_shape_is_refused() -> None:
    query, lse = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"grad must have the weights' shape, \[2, 5, 5\], but got \[2, 4, 5, 5\]"):
        ops.attention_weights_backward(
            torch.zeros(2, 4, 5, 5), query, query, lse, None, None, None, 0.0, None, None, None, False, None, True,
            [True, True, True, False],
        )  # fmt: skip
