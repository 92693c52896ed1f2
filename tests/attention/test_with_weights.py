"""Attention and its weights in one op: what the two ops give, and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import reference
from tests.attention.cases import Sizes, at_least, judge, wide
from tests.attention.test_weights import DTYPES, OPTIONS, build
from tests.helpers import Watch, same_for_any_threads

ops = torch.ops.lect11ext

SIZES = [
    Sizes(2, 4, 2, 37, 131, 24, 8),
    Sizes(1, 2, 2, 100, 600, 64, 40),  # several blocks
    Sizes(1, 2, 1, 70, 1024, 16, 16),  # as many keys as one pass takes
    Sizes(1, 2, 1, 9, 1031, 16, 16),  # and more
    Sizes(1, 2, 1, 3, 1100, 16, 16),  # of few queries
    Sizes(2, 3, 1, 1, 70, 33, 8),
    Sizes(1, 4, 4, 5, 1, 8, 8),
    Sizes(2, 2, 1, 6, 5, 0, 8),
    Sizes(2, 2, 1, 6, 5, 8, 0),
    Sizes(0, 2, 2, 6, 5, 8, 8),
    Sizes(2, 2, 2, 0, 5, 8, 8),
    Sizes(2, 2, 2, 5, 0, 8, 8),
]


def operands(sizes: Sizes, name: str, dtype: torch.dtype = torch.float32) -> tuple[list[Any], dict[str, Any]]:
    """Query, key, value and perhaps a mask, and options."""
    (query, key, _, *mask), options = build(sizes, name, dtype)
    value = torch.randn(sizes.batch, sizes.kv_heads, sizes.keys, sizes.value_dim).to(dtype).requires_grad_()
    return [query, key, value, *mask], options


def arguments(args: list[Any], options: dict[str, Any], average: bool) -> list[Any]:
    """The op's."""
    left, right = options.get("window", (None, None))
    right = 0 if options.get("is_causal") else right
    return [
        *args[:3], args[3] if len(args) > 3 else None, options.get("alibi_slopes"), options.get("dropout_key"),
        options.get("dropout_p", 0.0), options.get("scale"), left, right,
        options.get("causal_alignment") == "bottom_right", options.get("softcap"), average,
    ]  # fmt: skip


def ours(*args: Tensor, average_heads: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return ops.attention_with_weights(*arguments(list(args), options, average_heads))


def plain(*args: Tensor, average_heads: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, *mask = args
    out, lse = reference.scaled_dot_product_attention(query, key, value, *mask, **options, return_lse=True)
    lse = lse.to(torch.promote_types(query.dtype, torch.float32))
    return out, lse, reference.attention_weights(query, key, lse, *mask, **options, average_heads=average_heads)


def with_gradients(
    function: Callable[..., Any], args: list[Any], cotangents: list[Tensor] | None, **options: Any
) -> Any:
    outs = [torch.where(x == -math.inf, -77.0, x) for x in function(*args, **options)]
    leaves = [a for a in args if a.requires_grad]
    cotangents = [torch.ones_like(o) for o in outs] if cotangents is None else cotangents
    return [*outs, *torch.autograd.grad(outs, leaves, [c.to(o) for c, o in zip(cotangents, outs, strict=True)])]


@pytest.mark.parametrize("value_dim", [0, 16])
@pytest.mark.parametrize("keys", [50, 1100])
@pytest.mark.parametrize("queries", [1, 3, 16, 40])
@pytest.mark.parametrize("head_dim", [64, 33])  # a scale that is exact, and one that is not
def test_weights_of_large_scores_sum_to_one(head_dim: int, queries: int, keys: int, value_dim: int) -> None:
    """Scores of 1e6 are rounded to sixteenths: where the LSE is of others than the weights are, sums show it."""
    query, key = torch.randn(1, 1, queries, head_dim) * 1e6, torch.randn(1, 1, keys, head_dim)
    value = torch.randn(1, 1, keys, value_dim)
    _, _, weights = ours(query, key, value, average_heads=False)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, queries), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients(name: str, average: bool, dtype: torch.dtype) -> None:
    for sizes in SIZES if dtype == torch.float32 else SIZES[:1]:
        args, options = operands(sizes, name, dtype)
        options["average_heads"] = average
        cotangents = [torch.randn(o.shape).to(o) for o in plain(*args, **options)]
        calls = (ours, args), (plain, args), (plain, wide(args))
        results = [with_gradients(f, a, cotangents, **options) for f, a in calls]
        for (
            result
        ) in results:  # of one key all gradients cancel, and a weight's relative error is the LSE's absolute one
            result[:] = [at_least(x, 1.0) for x in result]
        judge(*results, sizes.queries * sizes.heads + sizes.keys + sizes.head_dim + sizes.value_dim + 1)


@pytest.mark.parametrize("average", [True, False])
def test_rows_that_see_nothing_and_nan(average: bool) -> None:
    args, _ = operands(Sizes(2, 2, 1, 20, 300, 8, 8), "bool")
    args[3][:, :, 3] = False
    args[3][..., 280:] = False
    clean = with_gradients(ours, args, None, average_heads=average)
    assert not any(x.isnan().any() for x in clean)
    assert not clean[2][..., 3, :].any() and not clean[2][..., 280:].any()
    with torch.no_grad():
        for x in args[1:3]:
            x[:, :, 280:] = math.nan
    dirty = with_gradients(ours, args, None, average_heads=average)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    with torch.no_grad():
        args[0][:, :, 5] = math.nan
    weights = ours(*args, average_heads=average)[2]
    expected = args[3] if not average else args[3][:, 0]
    assert torch.equal(weights[..., 5, :].isnan(), expected[..., 5, :].expand_as(weights[..., 5, :]))
    assert not torch.cat([weights[..., :5, :], weights[..., 6:, :]], -2).isnan().any()


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["window", "float", "shared", "dropout"])
def test_derivatives(name: str, average: bool) -> None:
    args, options = operands(Sizes(2, 2, 1, 3, 4, 2, 2), name, torch.float64)
    if len(args) > 3:
        args[3] = torch.randn_like(args[3], requires_grad=True)  # differences see no −∞

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return ours(*tensors, **options, average_heads=average)

    assert torch.autograd.gradcheck(call, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, args, check_fwd_over_rev=True)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", ["plain", "float", "slopes", "dropout"])
def test_opcheck(name: str, average: bool) -> None:
    args, options = operands(Sizes(2, 4, 2, 5, 7, 8, 8), name)
    torch.library.opcheck(ops.attention_with_weights.default, tuple(arguments(args, options, average)))


@pytest.mark.parametrize("name", ["plain", "float", "shared", "slopes", "dropout"])
def test_vmap(name: str) -> None:
    samples = [operands(Sizes(2, 4, 2, 5, 7, 8, 8), name) for _ in range(3)]
    options = {**samples[0][1], "average_heads": True}

    def gradients(*args: Tensor) -> Any:
        def total(*tensors: Tensor) -> Tensor:
            out, lse, weights = ours(*tensors, **options)
            return out.square().sum() + lse.nan_to_num(neginf=0.0).sum() + weights.square().sum()

        return *ours(*args, **options), *torch.func.grad(total, tuple(range(len(args))))(*args)

    stacked = [torch.stack([s[0][i].detach() for s in samples], i % 2) for i in range(len(samples[0][0]))]
    got = torch.vmap(gradients, tuple(i % 2 for i in range(len(stacked))))(*stacked)
    each = [gradients(*(a.detach() for a in s[0])) for s in samples]
    for a, b in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_compiled_and_autocast() -> None:
    args, options = operands(Sizes(2, 4, 2, 5, 7, 8, 8), "float")
    kind = torch.get_default_device().type

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(kind, torch.bfloat16):
            return ours(*tensors, **options, average_heads=True)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    results = [with_gradients(f, args, None) for f in (compiled, call)]
    assert [x.dtype for x in results[0][:3]] == [torch.bfloat16, torch.float32, torch.bfloat16]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("average", [True, False])
def test_threads_and_repeats_give_the_same_bits(average: bool) -> None:
    args, options = operands(Sizes(2, 4, 2, 150, 700, 32, 32), "dropout")
    same_for_any_threads(lambda: with_gradients(ours, args, None, **options, average_heads=average))


def test_large_scores() -> None:
    """Blocks whose greatest scores are far apart, and beyond the range of a rounded exponent."""
    query, key, value = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 600, 1), torch.randn(1, 1, 600, 4)
    key[0, 0, 300], key[0, 0, 580:582] = 6000.0, 6003.0
    expected = plain(*(x.double() for x in (query, key, value)), average_heads=False)
    for a, b in zip(ours(query, key, value, average_heads=False), expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@pytest.mark.cpu  # elsewhere two functions, of which the second is plain PyTorch
def test_the_module_takes_it() -> None:
    from lect11ext.nn import MultiheadAttention

    attention, x = MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    with Watch() as watch:
        attention(x, x, x)
    assert "lect11ext.attention_with_weights" in watch.seen


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({1: torch.zeros(2, 4, 7, 8, dtype=torch.float64)}, TypeError, "key must have the type of query, Float"),
        ({2: torch.zeros(2, 4, 6, 8)}, ValueError, "value must have"),
        ({3: torch.zeros(1, 1, 5, 6)}, ValueError, "attn_mask must broadcast to"),
        ({6: 0.5}, ValueError, "dropout_key must be given with a dropout_p"),
    ],
)
def test_wrong_calls(change: dict[int, Any], kind: type[Exception], message: str) -> None:
    given: list[Any] = [torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 8)]
    given += [None, None, None, 0.0, None, None, None, False, None, True]
    for i, value in change.items():
        given[i] = value
    with pytest.raises(kind, match=message):
        ops.attention_with_weights(*given)
