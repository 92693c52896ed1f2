"""MultiheadAttention as a drop-in: torch.nn's values, weights and gradients, whatever is given."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import nn
from tests.helpers import ONE_STEP, assert_within_rule, chain, seeded

N, L, S, E, H = 3, 4, 5, 12, 2

CONSTRUCTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 7, "bias": False},
]
LAYOUTS = ["positions first", "batch first", "no batch"]
ATTN_MASKS = [None, "bool 2", "bool 3", "float 2", "float 3"]
PADDINGS = [None, "bool", "float"]
WEIGHTS = [(False, True), (True, True), (True, False)]


def pair(**options: Any) -> tuple[nn.MultiheadAttention, torch.nn.MultiheadAttention]:
    """Ours and torch.nn's with the same parameters, biases too not zero."""
    ours, torchs = nn.MultiheadAttention(E, H, **options), torch.nn.MultiheadAttention(E, H, **options)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def inputs(module: Any, layout: str) -> list[Tensor]:
    sizes = ((L, module.embed_dim), (S, module.kdim), (S, module.vdim))
    like = next(module.parameters())
    lead = {"positions first": lambda n: (n, N), "batch first": lambda n: (N, n), "no batch": lambda n: (n,)}[layout]
    return [torch.randn(*lead(n), size).to(like).requires_grad_() for n, size in sizes]


def attn_mask(kind: str | None, batch: int) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(*((batch * H,) if kind.endswith("3") else ()), L, S) < 0.4
    mask[..., 0] = False  # a row without keys is NaN in torch.nn's
    return mask if kind.startswith("bool") else torch.randn(mask.shape).masked_fill(mask, -math.inf)


def padding(kind: str | None, batch: int, unbatched: bool) -> Tensor | None:
    if kind is None:
        return None
    mask = torch.rand(*(() if unbatched else (batch,)), S) < 0.4
    mask[..., 0] = False
    return mask if kind == "bool" else torch.randn(mask.shape).masked_fill(mask, -math.inf)


def call(module: Any, tensors: list[Tensor], **kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of a fixed sum of them to all inputs and parameters."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    outs = [out for out in module(*tensors, **kwargs) if out is not None]
    generator = seeded(5)
    loss = sum((out.double() * torch.randn(out.shape, generator=generator).double()).sum() for out in outs)
    return outs, list(torch.autograd.grad(loss, [*tensors, *module.parameters()]))


def to_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def compare(ours: Any, torchs: Any, tensors: list[Tensor], torch_kwargs: Any = None, **kwargs: Any) -> None:
    """By the rule. Three products in a row with few terms each, and gradients by way of the weights, which have two
    parts that cancel, one by the LSE: torch.nn's error may be zero by luck."""
    got = call(ours, tensors, **kwargs)
    given = kwargs if torch_kwargs is None else torch_kwargs
    plain = call(torchs, tensors, **given)
    wide = {name: to_double(value) for name, value in given.items()}
    exact = call(copy.deepcopy(torchs).double(), [t.double() for t in tensors], **wide)
    for part in range(2):
        for triple in zip(got[part], plain[part], exact[part], strict=True):
            assert_within_rule(*triple, slack=chain(4, triple[0].dtype))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("need_weights", "average"), WEIGHTS)
@pytest.mark.parametrize("mask", ATTN_MASKS)
def test_every_combination_of_masks(layout: str, need_weights: bool, average: bool, mask: str | None) -> None:
    unbatched = layout == "no batch"
    batch = 1 if unbatched else N
    for i, pad in enumerate(PADDINGS):
        # The constructor's arguments take turns; every one of them meets every mask.
        options = CONSTRUCTIONS[(ATTN_MASKS.index(mask) + 2 * i + LAYOUTS.index(layout)) % len(CONSTRUCTIONS)]
        ours, torchs = pair(batch_first=layout == "batch first", **options)
        kwargs: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
        kwargs |= {"attn_mask": attn_mask(mask, batch), "key_padding_mask": padding(pad, batch, unbatched)}
        compare(ours, torchs, inputs(ours, layout), **kwargs)


@pytest.mark.parametrize("options", CONSTRUCTIONS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_construction(options: dict[str, Any], batch_first: bool) -> None:
    ours, torchs = pair(batch_first=batch_first, **options)
    tensors = inputs(ours, "batch first" if batch_first else "positions first")
    for need_weights in (False, True):
        compare(ours, torchs, tensors, need_weights=need_weights)
    out, weights = ours(*tensors)
    expected, expected_weights = torchs(*tensors)
    assert out.shape == expected.shape and weights.shape == expected_weights.shape
    assert out.is_contiguous()


@pytest.mark.parametrize("shared", ["all", "key and value", "query and key"])
@pytest.mark.parametrize("bias", [True, False])
def test_tensors_that_are_given_twice(shared: str, bias: bool) -> None:
    """One product projects them; in torch.nn's the same."""

    class Shared(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, y: Tensor) -> Any:
            three = {"all": (x, x, x), "key and value": (x, y, y), "query and key": (x, x, y)}[shared]
            return self.inner(*three)[0] + 0 * y.sum(), None

    ours, torchs = pair(bias=bias)
    compare(Shared(ours), Shared(torchs), [torch.randn(L, N, E), torch.randn(L, N, E)])


@pytest.mark.parametrize("low", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_types(low: torch.dtype) -> None:
    ours, torchs = (m.to(low) for m in pair(batch_first=True))
    tensors = inputs(ours, "batch first")
    mask = attn_mask("float 2", N)
    assert mask is not None
    for need_weights in (False, True):
        compare(ours, torchs, tensors, attn_mask=mask.to(low), need_weights=need_weights)
    out, weights = ours(*tensors)
    assert out.dtype == weights.dtype == low
    expected = ours(*tensors, attn_mask=mask.to(low))[0]
    for other in (mask.double(), mask.to(low).float()):  # torch.nn's refuses other types
        assert_within_rule(ours(*tensors, attn_mask=other)[0], expected, expected.double(), slack=ONE_STEP)


@pytest.mark.parametrize("options", CONSTRUCTIONS)
def test_initialisation_and_state_dict(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    ours = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(3)
    torchs = torch.nn.MultiheadAttention(E, H, **options)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in torchs.named_parameters()]
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(p, q)
    other = nn.MultiheadAttention(E, H, **options)
    other.load_state_dict(torchs.state_dict(), strict=True)
    torch.nn.MultiheadAttention(E, H, **options).load_state_dict(other.state_dict(), strict=True)
    for p, q in zip(other.parameters(), torchs.parameters(), strict=True):
        assert torch.equal(p, q)
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k"):
        assert (getattr(ours, name) is None) == (getattr(torchs, name) is None)
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "add_zero_attn"):
        assert getattr(ours, name) == getattr(torchs, name)


def test_copies() -> None:
    module = nn.MultiheadAttention(E, H, add_bias_kv=True, num_kv_heads=1, window=(1, None), rope=500.0)
    x = torch.randn(L, N, E)
    expected = module(x, x, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for a, b in zip(other(x, x, x), expected, strict=True):
            assert torch.equal(a, b)
    assert "num_kv_heads=1, window=(1, None), rope=500.0" in repr(module)


def test_the_hint_is_torchs() -> None:
    """With a mask that is not causal the two ways of torch.nn's differ; so do ours."""
    for options in CONSTRUCTIONS:
        ours, torchs = pair(**options)
        tensors = inputs(ours, "positions first")
        mask, pad = attn_mask("bool 2", N), padding("bool", N, False)
        for kwargs in ({"need_weights": False}, {}, {"need_weights": False, "key_padding_mask": pad}):
            compare(ours, torchs, tensors, attn_mask=mask, is_causal=True, **kwargs)


def test_autocast() -> None:
    ours, torchs = pair(batch_first=True)
    tensors = inputs(ours, "batch first")
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        for need_weights in (False, True):
            got, plain = (m(*tensors, need_weights=need_weights) for m in (ours, torchs))
            exact = copy.deepcopy(torchs).double()
            with torch.autocast(torch.get_default_device().type, enabled=False):
                wide = exact(*(t.double() for t in tensors), need_weights=need_weights)
            assert got[0].dtype == plain[0].dtype == torch.bfloat16
            assert_within_rule(got[0], plain[0], wide[0], slack=ONE_STEP)
            if need_weights:
                assert_within_rule(got[1].bfloat16(), plain[1].bfloat16(), wide[1], slack=ONE_STEP)


def test_parametrised_and_functional_weights() -> None:
    ours, _ = pair()
    x = torch.randn(L, N, E)
    expected = ours(x, x, x)[0]
    torch.nn.utils.parametrizations.weight_norm(ours, "in_proj_weight")
    torch.testing.assert_close(ours(x, x, x)[0], expected)
    ours(x, x, x)[0].sum().backward()
    assert ours.parametrizations.in_proj_weight.original0.grad is not None
    plain, _ = pair()
    zeros = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    assert not torch.func.functional_call(plain, zeros, (x, x, x))[0].any()
