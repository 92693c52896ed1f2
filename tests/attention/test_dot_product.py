"""Values and gradients of dot-product attention, through every option, shape, type and build of the kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lect11ext.reference.random import philox_words
from tests.helpers import same_for_any_threads

from .cases import KEY, Sizes, bool_mask, compare, float_mask, operands, plain_sdpa, same_of_any_layout, sdpa

# Around the kernel's steps: 64 keys a panel, 256 a block, 96 queries a tile, 16 and 32 columns, 512 keys a part.
SIZES = [
    Sizes(1, 1, 1, 1, 1, 1, 1),
    Sizes(2, 3, 3, 5, 7, 3, 2),
    Sizes(1, 2, 1, 13, 31, 16, 8),
    Sizes(2, 4, 2, 17, 64, 40, 24),
    Sizes(1, 1, 1, 64, 65, 64, 64),
    Sizes(3, 2, 1, 1, 257, 64, 64),
    Sizes(1, 1, 1, 193, 1, 7, 65),
]
LARGE = [
    Sizes(1, 4, 2, 97, 130, 33, 47),
    Sizes(1, 1, 1, 256, 3, 128, 128),
    Sizes(1, 1, 1, 70, 300, 256, 200),
    Sizes(1, 2, 1, 40, 1100, 20, 12),
]
EMPTY = [
    Sizes(0, 2, 2, 3, 4, 5, 5),
    Sizes(2, 0, 0, 3, 4, 5, 5),
    Sizes(2, 2, 2, 0, 4, 5, 3),
    Sizes(2, 2, 1, 3, 0, 5, 3),
    Sizes(2, 2, 2, 3, 4, 0, 5),
    Sizes(2, 2, 2, 3, 4, 5, 0),
    Sizes(2, 2, 2, 0, 0, 5, 5),
]
BOTTOM = {"causal_alignment": "bottom_right"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal-bottom": {"is_causal": True, **BOTTOM},
    "window": {"window": (6, 3)},
    "window-left": {"window": (70, None), **BOTTOM},
    "window-right": {"window": (None, 0)},
    "window-diagonal": {"window": (0, 0), **BOTTOM},
    "window-causal": {"window": (20, 9), "is_causal": True},
    "softcap": {"softcap": 0.7},
    "scale": {"scale": -0.3},
    "scale-0": {"scale": 0.0, "attn_mask": "float"},
    "alibi": {"alibi_slopes": "heads"},
    "alibi-causal": {"alibi_slopes": "batch", "is_causal": True, **BOTTOM},
    "bool": {"attn_mask": "bool"},
    "float": {"attn_mask": "float"},
    "dropout": {"dropout_p": 0.4},
    "everything": {
        "attn_mask": "float", "alibi_slopes": "batch", "softcap": 2.0, "window": (90, None), "is_causal": True,
        "dropout_p": 0.2, "scale": 0.4, **BOTTOM,
    },
}  # fmt: skip


def build(
    sizes: Sizes, options: dict[str, Any], dtype: torch.dtype, device: str | None = None
) -> tuple[list[Any], Any]:
    """Tensors for what an entry of OPTIONS names."""
    b, h, _, queries, keys, *_ = sizes
    args, options = operands(sizes, dtype, device), dict(options)
    mask, slopes = options.pop("attn_mask", None), options.get("alibi_slopes")
    if mask == "bool":
        args.append(bool_mask(b, 1, queries, keys, device=device))
    elif mask == "float":
        args.append(float_mask(b, h, queries, keys, dtype=dtype, device=device).requires_grad_())
    if slopes is not None:
        options["alibi_slopes"] = (torch.rand(h) if slopes == "heads" else torch.rand(b, h)).to(device)
    if "dropout_p" in options:
        options["dropout_key"] = KEY.to(device)
    return args, options


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", SIZES + EMPTY, ids=str)
def test_values_and_gradients(sizes: Sizes, name: str, dtype: torch.dtype, device: str) -> None:
    args, options = build(sizes, OPTIONS[name], dtype, device)
    # Of one key, gradients of scores are zero: what is left of them is what the output's rounding makes of it.
    compare(args, low_slack=4.0 if sizes.keys == 1 else 2.0, **options)


@pytest.mark.parametrize("name", ["plain", "causal-bottom", "float", "everything"])
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_values_and_gradients_of_large_ones(sizes: Sizes, name: str, dtype: torch.dtype, device: str) -> None:
    args, options = build(sizes, OPTIONS[name], dtype, device)
    compare(args, **options)


@pytest.mark.cpu  # on a GPU D is made of the rounded output, as in flash attention
@pytest.mark.parametrize("keys", [1, 2, 3, 8, 16])
def test_gradients_of_few_keys_are_not_left_to_the_outputs_rounding(keys: int, dtype: torch.dtype) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        args = [
            *operands(Sizes(1, 2, 1, 130, keys, 24, 70), dtype),
            float_mask(2, 130, keys, dtype=dtype).requires_grad_(),
        ]
        compare(args, low_slack=1.0, dropout_p=0.3, dropout_key=KEY, window=(126, None), **BOTTOM)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_score_of_a_single_key_has_no_gradient(dtype: torch.dtype, capability: str) -> None:
    query, key, value = operands(Sizes(2, 3, 3, 130, 1, 64, 64), dtype)
    grad_out = torch.randn((*value.shape[:2], 130, 64), dtype=dtype)
    grad_query, grad_key, _ = torch.autograd.grad(sdpa(query, key, value), (query, key, value), grad_out)
    # As far as the inner product, divided by a weight of which it is a multiple, is itself.
    scores = 2 * torch.finfo(dtype).eps * (grad_out * value).sum(-1, keepdim=True).abs() / 64**0.5
    assert (grad_query.abs() <= scores * key.abs()).all()
    assert (grad_key.abs() <= (scores * query.abs()).sum(-2, keepdim=True)).all()


@pytest.mark.cpu
@pytest.mark.parametrize("keys", [2, 5, 16])
def test_gradients_of_few_keys_with_large_scores(keys: int, capability: str) -> None:
    """exp(score − LSE) is off by the rounding of scores near 160; neither weights nor D must be."""
    args = [t.detach() for t in operands(Sizes(1, 2, 2, 64, keys, 32, 32), torch.float32)]
    for t in args[:2]:
        t[..., 0] += 30
    grad_out = torch.randn(args[0].shape)

    def gradients(function: Any, inputs: list[Any]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(function(*leaves), leaves, grad_out.to(leaves[0].dtype)))

    ways = gradients(sdpa, args), gradients(plain_sdpa, args), gradients(plain_sdpa, [t.double() for t in args])
    for ours, plain, exact in list(zip(*ways, strict=True))[::2]:  # what queries gain, and what values do
        # How the scores are rounded is a matter of chance; with D of the output and weights as they come out it is up
        # to 15 times as much, and 25 times.
        assert (ours - exact).abs().max() <= 4 * (plain - exact).abs().max()


@pytest.mark.cpu
@pytest.mark.parametrize(("dtype", "gap", "size"), [(torch.float32, 15, 1e4), (torch.bfloat16, 9, 1e3)], ids=str)
def test_a_part_of_the_keys_has_the_d_of_all(dtype: torch.dtype, gap: float, size: float, capability: str) -> None:
    """As in a ring: of the third key, which has next to no weight and huge values, only output and LSE know."""
    query, key, value = (t.detach() for t in operands(Sizes(1, 1, 1, 4, 3, 16, 16), dtype))
    query[...], query[..., 0] = 0, 4  # scores are the keys' first elements
    key[..., 0] = torch.tensor([0.0, 0.3, -gap])
    value[..., 2, :] *= size
    grad_out = torch.randn(query.shape).to(dtype)
    output, lse = sdpa(query, key, value, return_lse=True)
    options = [None, None, None, None, None, 0.0, 0.25, None, None, False, None]
    part = torch.ops.lect11ext.attention_backward(
        grad_out, None, query, key[..., :2, :], value[..., :2, :], *options, output, lse, [True, True, False, False]
    )
    q, k, v, g = (t.double() for t in (query, key, value, grad_out))
    weights, of_values = (q @ k.mT / 4).softmax(-1), g @ v.mT
    scores = weights * (of_values - (weights * of_values).sum(-1, keepdim=True)) / 4
    for got, exact in zip(part, (scores[..., :2] @ k[..., :2, :], (scores.mT @ q)[..., :2, :]), strict=False):
        assert (got.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_capability(name: str, dtype: torch.dtype, capability: str) -> None:
    for sizes in (Sizes(1, 4, 2, 37, 131, 24, 40), Sizes(1, 1, 1, 1, 70, 33, 9)):
        args, options = build(sizes, OPTIONS[name], dtype)
        compare(args, **options)


SHAPES = [(b, h, queries, keys) for b in (1, 2) for h in (1, 4) for queries in (1, 37) for keys in (1, 131)]


@pytest.mark.parametrize("shape", [s[i:] for s in SHAPES for i in range(4) if all(n == 1 for n in s[:i])], ids=str)
@pytest.mark.parametrize("kind", ["bool", "own", "float32"])
def test_masks_of_every_shape(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> None:
    args: list[Any] = operands(Sizes(2, 4, 2, 37, 131, 16, 16), dtype, device)
    if kind == "bool":
        args.append(bool_mask(*shape, device=device))
    elif kind == "own":
        args.append(float_mask(*shape, dtype=dtype, device=device).requires_grad_())
    elif dtype.itemsize == 2:
        args.append(float_mask(*shape, device=device).requires_grad_())
    else:
        args.append(float_mask(*shape, dtype=dtype, device=device, barred=0))  # without a gradient
    compare(args, is_causal=kind == "own")


def test_masks_of_every_stride(dtype: torch.dtype) -> None:
    b, h, queries, keys = 2, 2, 19, 75
    args: list[Any] = operands(Sizes(b, h, h, queries, keys, 16, 16), dtype)
    masks = [
        float_mask(b, h, keys, queries).transpose(2, 3),
        float_mask(b, h, queries, 2 * keys)[..., ::2],
        float_mask(1, 1, 1, keys).expand(b, h, queries, keys),
        float_mask(b, 1, queries, 1).expand(b, h, queries, keys),
        float_mask(queries, h, keys, b).permute(3, 1, 0, 2),
        float_mask(b, h, queries, keys + 3)[..., 3:],
    ]
    for mask in masks:
        compare([*args, mask == -math.inf])
        compare([*args, mask.to(dtype).requires_grad_()])


def test_strides(dtype: torch.dtype, device: str) -> None:
    b, h, queries, keys, d = 2, 3, 21, 83, 24

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype)

    layouts: list[list[Tensor]] = [
        [random(b, n, h, d).transpose(1, 2) for n in (queries, keys, keys)],  # as projections leave them
        list(random(b, keys, 3, h, d).permute(2, 0, 3, 1, 4)),  # packed in one
        [random(b, h, d, n).transpose(2, 3) for n in (queries, keys, keys)],  # columns apart: copied
        [random(1, 1, n, d).expand(b, h, n, d) for n in (queries, keys, keys)],
        [random(b, h, 1, d).expand(b, h, n, d) for n in (queries, keys, keys)],
        [random(b, h, n, 1).expand(b, h, n, d) for n in (queries, keys, keys)],
        [random(b * h * n * d + 1)[1:].view(b, h, n, d) for n in (queries, keys, keys)],  # misaligned
        [random(b, h, 2 * n, d + 3)[:, :, ::2, 2 : d + 2] for n in (queries, keys, keys)],
        [random(h, n, b, d).permute(2, 0, 1, 3) for n in (queries, keys, keys)],
        [random(b, h, n, 2 * d)[..., ::2] for n in (queries, keys, keys)],
    ]
    for layout in layouts:
        # Where keys are all alike, gradients cancel to less than what the output's rounding makes of them.
        compare([x.requires_grad_() for x in layout], is_causal=True, low_slack=4.0)
        dense = [x.detach().contiguous() for x in layout]
        assert same_of_any_layout(*(sdpa(*x, window=(9, 9)) for x in (layout, dense)), dtype)


def test_gradients_that_arrive_in_any_layout() -> None:
    args = operands(Sizes(2, 3, 3, 21, 83, 24, 24))
    out, lse = sdpa(*args, return_lse=True)
    for grad in (
        torch.randn(()).expand(out.shape),
        torch.randn(2, 3, 24, 21).transpose(2, 3),
        torch.randn(2, 3, 21, 48)[..., ::2],
        torch.randn(21, 2, 3, 24).permute(1, 2, 0, 3),
    ):
        grad_lse = torch.randn(3, 2, 42).transpose(0, 1)[..., ::2]
        got = torch.autograd.grad((out, lse), args, (grad, grad_lse), retain_graph=True)
        expected = torch.autograd.grad((out, lse), args, (grad.contiguous(), grad_lse.contiguous()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["plain", "causal", "float", "everything"])
@pytest.mark.parametrize("sizes", [Sizes(1, 1, 1, 300, 1300, 32, 32), Sizes(2, 4, 2, 100, 200, 16, 16)], ids=str)
def test_threads_and_repeats_give_the_same_bits(sizes: Sizes, name: str, dtype: torch.dtype) -> None:
    args, options = build(sizes, OPTIONS[name], dtype)
    if name == "float":  # reduced over everything that it is broadcast over
        args[3] = float_mask(1, 1, 1, sizes.keys, dtype=dtype).requires_grad_()

    def results() -> Sequence[Tensor]:
        outs = sdpa(*args, enable_gqa=True, return_lse=True, **options)
        leaves = [a for a in args if a.requires_grad]
        return [*outs, *torch.autograd.grad(outs[0].square().sum() + outs[1].clamp_min(-9).sum(), leaves)]

    same_for_any_threads(results)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    broadcast=st.lists(st.booleans(), min_size=4, max_size=4),
    kind=st.sampled_from(["bool", "float"]),
    share=st.floats(0, 1),
    window=st.tuples(*[st.one_of(st.none(), st.integers(0, 9))] * 2),
    causal=st.booleans(),
    alignment=st.sampled_from(["top_left", "bottom_right"]),
    seed=st.integers(0, 2**32),
)
def test_any_mask(
    batch: int, kv_heads: int, group: int, queries: int, keys: int, broadcast: list[bool], kind: str, share: float,
    window: Any, causal: bool, alignment: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    sizes = Sizes(batch, kv_heads * group, kv_heads, queries, keys, 3, 2)
    args: list[Any] = operands(sizes)
    full = (batch, kv_heads * group, queries, keys)
    shape = [1 if one else n for one, n in zip(broadcast, full, strict=True)]
    args.append(
        bool_mask(*shape, share=share) if kind == "bool" else float_mask(*shape, barred=1 - share).requires_grad_()
    )
    compare(args, window=window, is_causal=causal, causal_alignment=alignment)


def test_dropout_drops_what_the_reference_drops(dtype: torch.dtype) -> None:
    """Weights of identical keys, seen through an identity: which are zero shows."""
    keys = 77
    query, key = torch.zeros(2, 3, 50, 8, dtype=dtype), torch.zeros(2, 3, keys, 8, dtype=dtype)
    eye = torch.eye(keys, dtype=dtype).expand(2, 3, keys, keys)
    for p in (0.1, 0.5, 0.99):
        got = sdpa(query, key, eye, dropout_p=p, dropout_key=KEY)
        expected = plain_sdpa(query, key, eye, dropout_p=p, dropout_key=KEY)
        assert torch.equal(got != 0, expected != 0)
        assert abs((got != 0).double().mean().item() - (1 - p)) < 0.02


@pytest.mark.parametrize("between", [-0.4, 0.0, 0.4, 0.6])
def test_dropout_compares_half_words(between: float) -> None:
    """A half is kept if it is at least dropout_p · 2¹⁶, rounded."""
    halves = philox_words(*KEY.tolist(), 1).astype("<u4").view("<u2").reshape(-1)  # of a query's eight keys
    half = int(halves[3])
    out = sdpa(
        *(torch.zeros(1, 1, n, 4) for n in (1, 8)), torch.eye(8).view(1, 1, 8, 8), dropout_key=KEY,
        dropout_p=(half + between) / 2**16,
    )  # fmt: skip
    assert (out[0, 0, 0] != 0).tolist() == [int(h) >= half + (between > 0.5) for h in halves]


def test_dropout_of_everything() -> None:
    args = [*operands(Sizes(2, 2, 2, 9, 70, 8, 8)), float_mask(9, 70).requires_grad_()]
    out, lse = sdpa(*args, dropout_p=1.0, dropout_key=KEY, return_lse=True)
    assert not out.any() and torch.equal(lse, sdpa(*args, return_lse=True)[1])
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), args, retain_graph=True))
    for a, b in zip(
        torch.autograd.grad(lse.sum(), args[:2]),
        torch.autograd.grad(sdpa(*args, return_lse=True)[1].sum(), args[:2]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [*range(1, 40), 47, 48, 63, 64, 65, 80, 96, 127, 128, 129, 192, 255, 256])
def test_every_head_dim(head_dim: int, dtype: torch.dtype, capability: str) -> None:
    for queries, keys in ((1, 65), (7, 64), (98, 259)):
        for value_dim in (head_dim, 256 // head_dim):
            compare(operands(Sizes(1, 2, 1, queries, keys, head_dim, value_dim), dtype), is_causal=queries % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_length(name: str, dtype: torch.dtype) -> None:
    lengths = [1, 2, 3, 5, 63, 64, 65, 95, 96, 97, 127, 129, 191, 193, 255, 256, 257, 511, 513]
    for queries in lengths:
        for keys in lengths:
            args, options = build(Sizes(1, 1, 1, queries, keys, 16, 16), OPTIONS[name], dtype)
            # Where many queries see one key alone, its gradients are the sum of their roundings.
            compare(args, least=1.0, low_slack=8.0, **options)
