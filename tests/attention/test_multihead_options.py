"""MultiheadAttention where it differs from torch.nn's: masked rows, causal, grouped queries, windows, RoPE, nesting."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lect11ext import nn, reference
from tests.attention.test_multihead import E, H, L, N, S, attn_mask, inputs, pair
from tests.helpers import Ops, Tagged, Watch


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, E // H)).transpose(1, 2)


def plainly(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
    """[N, L, E] tensors by the reference."""
    kv = (module.num_kv_heads or module.num_heads) * module.head_dim
    weights, biases = module.in_proj_weight.split([E, kv, kv]), module.in_proj_bias.split([E, kv, kv])
    q, k, v = (heads(x @ w.T + b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if module.rope:
        q, k = turned(q, module.rope), turned(k, module.rope)
    kwargs["enable_gqa"] = module.num_kv_heads is not None
    out, lse = reference.scaled_dot_product_attention(q, k, v, **kwargs, return_lse=True)
    return module.out_proj(out.transpose(1, 2).flatten(2)), reference.attention_weights(q, k, lse, **kwargs)


def turned(x: Tensor, rope: bool | float) -> Tensor:
    """By complex numbers."""
    half = x.size(-1) // 2
    base = 10000.0 if rope is True else rope
    angles = torch.arange(x.size(-2))[:, None].double() * base ** (-torch.arange(half).double() / half)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1).to(x.dtype)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["bool 2", "bool 3", "float 2"])
def test_a_row_without_keys(need_weights: bool, kind: str) -> None:
    ours, _ = pair(batch_first=True)
    tensors = inputs(ours, "batch first")
    mask = attn_mask(kind, N)
    assert mask is not None
    mask[..., 1, :] = True if mask.dtype == torch.bool else -math.inf
    out, weights = ours(*tensors, attn_mask=mask, need_weights=need_weights)
    torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(N, E))
    assert weights is None or not weights[:, 1].any()
    (out.sum() + (0 if weights is None else weights.square().sum())).backward()
    assert not any(p.grad.isnan().any() for p in (*tensors, *ours.parameters()))
    assert not tensors[0].grad[:, 1].any()


def test_a_sequence_without_keys() -> None:
    ours, _ = pair(batch_first=True)
    tensors = inputs(ours, "batch first")
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*tensors, key_padding_mask=padding)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(L, E))
    assert not weights[1].any()
    torch.testing.assert_close(weights[[0, 2]].sum(-1), torch.ones(2, L))


@pytest.mark.parametrize("need_weights", [False, True])
def test_padded_positions_may_hold_nan(need_weights: bool) -> None:
    ours, _ = pair(batch_first=True)
    query, key, value = inputs(ours, "batch first")
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[:, 3:] = True
    dirty = [x.detach().masked_fill(padding[..., None], math.nan).requires_grad_() for x in (key, value)]
    out, weights = ours(query, *dirty, key_padding_mask=padding, need_weights=need_weights)
    expected, expected_weights = ours(query, key, value, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(out, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
    grad_query = torch.autograd.grad(out.sum() + (weights.square().sum() if need_weights else 0), query)[0]
    assert not grad_query.isnan().any()


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_without_a_mask(options: dict[str, Any], need_weights: bool, padded: bool) -> None:
    ours, torchs = pair(**options)
    tensors = inputs(ours, "positions first")
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    padding = (torch.arange(S) > 2).expand(N, S) if padded else None
    got = ours(*tensors, is_causal=True, key_padding_mask=padding, need_weights=need_weights)
    expected = torchs(*tensors, attn_mask=causal, key_padding_mask=padding)
    torch.testing.assert_close(got[0], expected[0])
    if need_weights:
        torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("window", [(1, 0), (0, 2), (None, 1), (2, None)])
@pytest.mark.parametrize("options", [{}, {"add_zero_attn": True}])
def test_window(window: Any, options: dict[str, Any]) -> None:
    ours, torchs = pair(**options)
    ours.window = window
    tensors = inputs(ours, "positions first")
    left, right = window
    offsets = torch.arange(S) - torch.arange(L)[:, None]
    barred = (offsets < -(S if left is None else left)) | (offsets > (S if right is None else right))
    for kwargs in ({}, {"need_weights": False}, {"attn_mask": attn_mask("float 3", N)}, {"is_causal": True}):
        mask = torch.zeros(N * H, L, S) if kwargs.get("attn_mask") is None else kwargs["attn_mask"]
        mask = mask.masked_fill(barred | (offsets > 0) if kwargs.get("is_causal") else barred, -math.inf)
        got, expected = ours(*tensors, **kwargs), torchs(*tensors, attn_mask=mask)
        seen = (mask > -math.inf).any(-1).all(0) | ("add_zero_attn" in options)
        torch.testing.assert_close(got[0][seen], expected[0][seen])
        if got[1] is not None:
            torch.testing.assert_close(got[1][:, seen], expected[1][:, seen])


@pytest.mark.parametrize("rope", [True, 100.0])
@pytest.mark.parametrize("num_kv_heads", [None, 1])
def test_grouped_queries_and_rope(rope: Any, num_kv_heads: int | None) -> None:
    ours = nn.MultiheadAttention(E, H, batch_first=True, rope=rope, num_kv_heads=num_kv_heads, window=(2, 1))
    rows = 3 * E if num_kv_heads is None else 2 * E
    assert ours.in_proj_weight.shape == (rows, E) and ours.in_proj_bias.shape == (rows,)
    tensors = inputs(ours, "batch first")
    got, expected = ours(*tensors), plainly(ours, *tensors, window=(2, 1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    cotangents = [torch.randn(x.shape) for x in got]
    everything = [*tensors, *ours.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, everything, cotangents),
        torch.autograd.grad(expected, everything, cotangents),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_grouped_queries_with_separate_projections() -> None:
    ours = nn.MultiheadAttention(E, 4, num_kv_heads=2, kdim=5, vdim=7, add_bias_kv=True)
    assert ours.q_proj_weight.shape == (E, E) and ours.k_proj_weight.shape == (E // 2, 5)
    assert ours.v_proj_weight.shape == (E // 2, 7) and ours.bias_k.shape == (1, 1, E // 2)
    wide = nn.MultiheadAttention(E, 4, kdim=5, vdim=7, add_bias_kv=True)
    with torch.no_grad():
        wide.q_proj_weight.copy_(ours.q_proj_weight)
        for name in ("k_proj_weight", "v_proj_weight"):
            both = getattr(ours, name).unflatten(0, (2, 3)).repeat_interleave(2, 0).flatten(0, 1)
            getattr(wide, name).copy_(both)
        for name in ("bias_k", "bias_v"):
            getattr(wide, name).copy_(getattr(ours, name).unflatten(-1, (2, 3)).repeat_interleave(2, -2).flatten(-2))
        wide.out_proj.load_state_dict(ours.out_proj.state_dict())
    tensors = inputs(ours, "positions first")
    for a, b in zip(ours(*tensors), wide(*tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_rope_knows_distances_alone() -> None:
    ours = nn.MultiheadAttention(E, H, rope=True, batch_first=True)
    x = torch.randn(1, 6, E)
    shifted = torch.cat([torch.zeros(1, 3, E), x], 1)
    unseen = torch.arange(9)[None] < 3
    torch.testing.assert_close(ours(shifted, shifted, shifted, key_padding_mask=unseen)[0][:, 3:], ours(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout(need_weights: bool) -> None:
    ours, _ = pair(dropout=0.5, batch_first=True)
    tensors = inputs(ours, "batch first")
    plain = ours.eval()(*tensors)
    assert torch.equal(plain[0], ours(*tensors)[0])
    ours.train()
    torch.manual_seed(1)
    out, weights = ours(*tensors, need_weights=need_weights, average_attn_weights=False)
    torch.manual_seed(1)
    again, _ = ours(*tensors, need_weights=need_weights, average_attn_weights=False)
    assert torch.equal(out, again) and not torch.equal(out, ours(*tensors)[0])
    if need_weights:  # what they say is what was dropped
        whole = ours.eval()(*tensors, average_attn_weights=False)[1]
        kept = weights != 0
        assert 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(weights, torch.where(kept, 2 * whole, 0))
        value = heads(tensors[2] @ ours.in_proj_weight[2 * E :].T + ours.in_proj_bias[2 * E :])
        torch.testing.assert_close(out, ours.out_proj((weights @ value).transpose(1, 2).flatten(2)))
    ours.train()
    ours.dropout = 1.0
    torch.testing.assert_close(ours(*tensors)[0], ours.out_proj.bias.expand(N, L, E))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("options", [{}, {"rope": True, "num_kv_heads": 1, "window": (2, None)}])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_sequences(layout: torch.layout, options: dict[str, Any]) -> None:
    ours = nn.MultiheadAttention(E, H, **options)
    queries = [torch.randn(n, E) for n in (3, 1, 5)]
    keys = [torch.randn(n, E) for n in (2, 4, 6)]
    q, k = (torch.nested.nested_tensor(parts, layout=layout) for parts in (queries, keys))
    for is_causal in (False, True):
        for own in (False, True):
            out, weights = ours(q, q if own else k, q if own else k, is_causal=is_causal)
            assert out.is_nested and out.layout == layout and weights.shape == (3, 5, 5 if own else 6)
            for i, part in enumerate(out.unbind()):
                other = queries[i] if own else keys[i]
                expected, expected_weights = ours(queries[i], other, other, is_causal=is_causal)
                torch.testing.assert_close(part, expected)
                torch.testing.assert_close(weights[i, : len(part), : len(other)], expected_weights)
                assert not weights[i, len(part) :].any() and not weights[i, :, len(other) :].any()
    assert ours(q, k, k, need_weights=False)[1] is None
    if layout == torch.jagged:
        assert (ours(q, q, q)[0] + q).shape == q.shape  # a residual connection


def test_nested_sequences_in_training() -> None:
    ours = nn.MultiheadAttention(E, H)
    parts = [torch.randn(n, E, requires_grad=True) for n in (3, 1, 5)]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    everything = [*parts, *ours.parameters()]
    got = torch.autograd.grad(ours(nested, nested, nested)[0].values().square().sum(), everything)
    outs = [ours(x, x, x)[0] for x in parts]
    expected = torch.autograd.grad(sum(out.square().sum() for out in outs), everything)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_averaged_weights_need_little_memory() -> None:
    """No tensor of [N, H, L, S], forward or backward, not even for autograd."""
    length = 1100
    ours = nn.MultiheadAttention(16, 8, batch_first=True)
    x = torch.randn(1, length, 16, requires_grad=True)
    with Ops() as ops:
        weights = ours(x, x, x)[1]
        weights.square().sum().backward()
    outputs = [x for _, out in ops.calls for x in (out if isinstance(out, (tuple, list)) else [out])]
    largest = max(x.untyped_storage().nbytes() for x in outputs if isinstance(x, Tensor))
    assert length**2 * 4 <= largest < 1.1 * length**2 * 4
    expected = ours(x, x, x, average_attn_weights=False)[1].mean(1)
    torch.testing.assert_close(weights, expected)
    grad, x.grad = x.grad, None
    expected.square().sum().backward()
    torch.testing.assert_close(grad, x.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_whole(backend: str) -> None:
    torch._dynamo.reset()
    ours = nn.MultiheadAttention(E, H, batch_first=True, rope=True)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for length in (4, 5):
        x = torch.randn(N, length, E)
        torch._dynamo.mark_dynamic(x, 1)
        for kwargs in ({}, {"need_weights": False, "is_causal": True}):
            got, expected = compiled(x, x, x, **kwargs), ours(x, x, x, **kwargs)
            torch.testing.assert_close(got[0], expected[0])
            if expected[1] is not None:
                torch.testing.assert_close(got[1], expected[1])
            everything = list(ours.parameters())
            for a, b in zip(
                torch.autograd.grad(got[0].square().sum(), everything),
                torch.autograd.grad(expected[0].square().sum(), everything),
                strict=True,
            ):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_one_op_runs() -> None:
    ours, _ = pair()
    x = torch.randn(L, N, E)
    assert type(ours(x.as_subclass(Tagged), x, x)[0]) is Tagged
    with Watch() as watch:
        ours(*inputs(ours, "positions first"), need_weights=False)
    assert sum(name == "lect11ext.attention" for name in watch.seen) == 1
    assert not any("softmax" in name for name in watch.seen)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"embed_dim": 0}, ValueError, "embed_dim and num_heads must be greater than 0, got embed_dim=0 and"),
        ({"num_heads": 5}, ValueError, "embed_dim must be divisible by num_heads, 5, but got 12"),
        ({"dropout": 1.5}, ValueError, "dropout must be a probability, from 0 to 1, but got 1.5"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads, 2, but got 3"),
        ({"num_kv_heads": 1.0}, TypeError, "num_kv_heads must be an int or None, but got float"),
        ({"window": 3}, TypeError, r"window must be \(left, right\), numbers of keys or None, but got 3"),
        ({"window": (-1, 0)}, ValueError, "window's left side must be a number of keys, or None for all, but got -1"),
        ({"rope": -1.0}, ValueError, "rope must be True, False or a base from .*, but got -1.0"),
        ({"rope": "yes"}, TypeError, "rope must be a bool or a float or an int, but got str"),
        ({"rope": True, "num_heads": 4}, ValueError, "rope needs an even head dimension, but got 3"),
    ],
)
def test_wrong_constructions(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, **arguments})


X = torch.zeros(N, L, E)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"query": 3}, TypeError, "query must be a Tensor, but got int"),
        ({"query": X[0]}, ValueError, "must all be 3-D, or 2-D without a batch, but got 2-D, 3-D and 3-D"),
        ({"key": X[..., :5]}, ValueError, r"key must have 12 columns, but got shape \[3, 4, 5\]"),
        ({"value": X[:, :2]}, ValueError, r"value must have key's batch and positions, \[3, 4\], but got \[3, 2\]"),
        ({"query": X[:2]}, ValueError, "key must have query's batch, 2, but got 3"),
        ({"attn_mask": X[0]}, ValueError, r"attn_mask must have shape \[4, 4\] or \[6, 4, 4\], but got \[4, 12\]"),
        ({"attn_mask": [1]}, TypeError, "attn_mask must be a Tensor, but got list"),
        ({"attn_mask": torch.ones(L, L).int()}, TypeError, "attn_mask must be bool or floating-point, but got torch.i"),
        ({"key_padding_mask": torch.ones(N, 9) > 0}, ValueError, r"key_padding_mask must have shape \[3, 4\], but got"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(kind, match=message):
        module(**{"query": X, "key": X, "value": X, **arguments})


def test_wrong_nested_calls() -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, E) for n in (3, 1)], layout=torch.jagged)
    other = torch.nested.nested_tensor([torch.randn(n, E) for n in (1, 3)], layout=torch.jagged)
    module = nn.MultiheadAttention(E, H)
    for call, message in (
        (lambda: module(nested, nested, nested, attn_mask=torch.ones(3, 3) > 0), "attn_mask must be None with nested"),
        (lambda: module(nested, nested, X), "query, key and value must all be nested tensors, or none"),
        (lambda: module(nested, nested, other), "value must have key's lengths, but got others"),
        (
            lambda: nn.MultiheadAttention(E, H, add_zero_attn=True)(nested, nested, nested),
            "nested tensors do not go with add_bias_kv or add_zero_attn",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_transforms_and_export() -> None:
    module = nn.MultiheadAttention(E, H, batch_first=True)
    many = torch.randn(5, N, L, E)
    expected = [module(x, x, x) for x in many]
    for got, parts in zip(torch.vmap(lambda x: module(x, x, x))(many), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(parts))
    parameters, x = dict(module.named_parameters()), many[0]

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out, weights = torch.func.functional_call(module, parameters, (x, x, x))
        return out.square().sum() + weights.square().sum()

    whole = torch.func.grad(loss)(parameters, x)
    each = torch.vmap(torch.func.grad(lambda p, row: loss(p, row[None])), (None, 0))(parameters, x)
    for name, grad in whole.items():
        torch.testing.assert_close(each[name].sum(0), grad, atol=1e-5, rtol=1e-4)
    tangents = {name: torch.randn(p.shape) for name, p in parameters.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x), (parameters,), (tangents,))
    expected_slope = sum((whole[name] * tangents[name]).sum() for name in whole)
    torch.testing.assert_close(slope, expected_slope, atol=1e-4, rtol=1e-4)

    length = torch.export.Dim("length")
    shapes = {name: {1: length} for name in ("query", "key", "value")}
    exported = torch.export.export(module, (x, x, x), dynamic_shapes=shapes).module()
    longer = torch.randn(N, L + 3, E)
    for got, want in zip(exported(longer, longer, longer), module(longer, longer, longer), strict=True):
        torch.testing.assert_close(got, want)


def test_checkpoints_drop_the_same_again() -> None:
    module = nn.MultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(L, N, E)
    grads = []

    def call(x: Tensor) -> Tensor:
        return module(x, x, x)[0]

    # A checkpoint keeps the generators of the devices on which its arguments are.
    for function in (call, lambda x: checkpoint(call, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(function(x).square().sum(), module.in_proj_weight)[0])
    assert torch.equal(*grads)
