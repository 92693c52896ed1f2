"""What MultiheadAttention is given: nothing at all, masks that are made where it is compiled, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import nn
from tests.attention.test_multihead import CONSTRUCTIONS, E, H, L, N
from tests.helpers import HERE


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("options", [*CONSTRUCTIONS, {"rope": True, "num_kv_heads": 1}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_nothing(sizes: tuple[int, int, int], options: dict[str, Any], batch_first: bool) -> None:
    batch, queries, keys = sizes
    ours = nn.MultiheadAttention(E, H, batch_first=batch_first, **options)
    torchs = None if "rope" in options else torch.nn.MultiheadAttention(E, H, batch_first=batch_first, **options)
    tensors = [
        torch.randn((batch, n, e) if batch_first else (n, batch, e), requires_grad=True)
        for n, e in ((queries, E), (keys, ours.kdim), (keys, ours.vdim))
    ]
    for need_weights in (True, False):
        padding = torch.zeros(batch, keys, dtype=torch.bool)
        for masks in ({}, {"attn_mask": torch.zeros(queries, keys)}, {"key_padding_mask": padding}):
            out, weights = ours(*tensors, need_weights=need_weights, **masks)
            assert out.shape == (*tensors[0].shape[:2], E) and not out.isnan().any()
            if weights is not None and torchs is not None:  # without them torch.nn's fails for nothing, too
                expected = torchs(*tensors, **masks)
                assert out.shape == expected[0].shape and weights.shape == expected[1].shape
            out.sum().backward()
            assert not any(p.grad.isnan().any() for p in ours.parameters() if p.grad is not None)
    alone = [t.detach()[(0,) if batch_first else (slice(None), 0)] for t in tensors] if batch else []
    if alone:
        out, weights = ours(*alone)
        assert out.shape == (queries, E) and weights.shape[0] == queries


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("lengths", [(0, 0), (0, 3)])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_sequences_without_tokens(layout: torch.layout, lengths: tuple[int, int]) -> None:
    x = torch.nested.nested_tensor([torch.randn(n, E) for n in lengths], layout=layout)
    for options in ({}, {"rope": True, "num_kv_heads": 1}):
        out, weights = nn.MultiheadAttention(E, H, **options)(x, x, x)
        assert [len(part) for part in out.unbind()] == list(lengths)
        assert weights.shape == (2, max(lengths), max(lengths))


class Masked(torch.nn.Module):
    """Makes its mask itself, as models do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attention, self.kind = nn.MultiheadAttention(E, H, batch_first=True), kind
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.kind == "padding":
            masks = {"key_padding_mask": torch.arange(length, device=x.device).expand(batch, length) > 3}
        elif self.kind == "made":
            masks = {"attn_mask": torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)}
        elif self.kind == "for each head":
            masks = {"attn_mask": torch.zeros(batch * H, length, length, device=x.device)}
        else:
            masks = {"attn_mask": self.mask[:length, :length]}
        return self.attention(x, x, x, **masks)[0]


@pytest.mark.parametrize("kind", ["padding", "made", "for each head", "buffer"])
def test_compiled_with_dynamic_sizes_and_masks_of_its_own(kind: str) -> None:
    torch._dynamo.reset()
    module = Masked(kind)
    compiled = torch.compile(module, dynamic=True, fullgraph=True, backend="aot_eager")
    for length in (5, 7):
        x = torch.randn(N, length, E)
        torch.testing.assert_close(compiled(x), module(x))


def test_compiled_with_a_constant_mask() -> None:
    torch._dynamo.reset()
    module = nn.MultiheadAttention(E, H, batch_first=True)

    def call(x: Tensor) -> Tensor:
        return module(x, x, x, attn_mask=torch.zeros(L, L), key_padding_mask=torch.zeros(N, L) > 0)[0]

    x = torch.randn(N, L, E)
    torch.testing.assert_close(torch.compile(call, dynamic=True, fullgraph=True, backend="aot_eager")(x), call(x))


def test_repr() -> None:
    assert "\n  embed_dim=12, num_heads=2\n" in repr(nn.MultiheadAttention(E, H))
    module = nn.MultiheadAttention(
        E, H, 0.1, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=3, vdim=5, batch_first=True, num_kv_heads=1
    )
    assert (
        "embed_dim=12, num_heads=2, dropout=0.1, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=3, vdim=5, "
        "batch_first=True, num_kv_heads=1\n" in repr(module)
    )


def test_rope_at_the_ends() -> None:
    x = torch.randn(2, 30, 64)
    for base in (1e-20, 1e38, 10**37):
        assert nn.MultiheadAttention(64, 1, batch_first=True, rope=base)(x, x, x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"dropout": "x"}, TypeError, "dropout must be a float or an int, but got str"),
        ({"embed_dim": "8"}, TypeError, "embed_dim must be an int, but got str"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int, but got float"),
        ({"kdim": "8"}, TypeError, "kdim must be an int or None, but got str"),
        ({"vdim": 8.0}, TypeError, "vdim must be an int or None, but got float"),
        ({"rope": 10**400}, ValueError, r"rope must be True, False or a base from 1e-20 to 1e\+38, but got 1000"),
        ({"rope": 1e-300}, ValueError, r"rope must be True, False or a base from 1e-20 to 1e\+38, but got 1e-300"),
        ({"rope": float("nan")}, ValueError, "rope must be True, False or a base .*, but got nan"),
        ({"rope": 0}, ValueError, "rope must be True, False or a base .*, but got 0"),
    ],
)
def test_wrong_constructions(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        nn.MultiheadAttention(**{"embed_dim": E, "num_heads": H, **arguments})


X = torch.zeros(N, L, E)


def jagged(*lengths: int) -> Any:
    return torch.nested.nested_tensor([torch.randn(n, E) for n in lengths], layout=torch.jagged)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda m: m(X, X, X, key_padding_mask=torch.zeros(N, L, device="meta") > 0),
            RuntimeError,
            f"on the same device, but key_padding_mask is on meta and query on {HERE}",
        ),
        (
            lambda m: m(X, X, X, attn_mask=torch.zeros(L, L, device="meta")),
            RuntimeError,
            f"on the same device, but attn_mask is on meta and query on {HERE}",
        ),
        # Also where the hint lets the mask be left out.
        (
            lambda m: m(X, X, X, attn_mask="m", is_causal=True, need_weights=False),
            TypeError,
            "attn_mask must be a Tensor",
        ),
        (
            lambda m: m(X, X, X, attn_mask=torch.ones(L, L).int(), is_causal=True, need_weights=False),
            TypeError,
            "attn_mask must be bool or floating-point, but got torch.int32",
        ),
        (
            lambda m: m(X, X, X, attn_mask=torch.ones(L + 1, L), is_causal=True, need_weights=False),
            ValueError,
            "attn_mask must have shape",
        ),
        (lambda m: m(X, jagged(3, 1, 2), X), ValueError, "query, key and value must all be nested tensors, or none"),
        (lambda m: m(X, X, jagged(3, 1, 2)), ValueError, "query, key and value must all be nested tensors, or none"),
        (
            lambda m: m(jagged(3, 1), jagged(3, 1, 2), jagged(3, 1, 2)),
            ValueError,
            "key must have as many sequences as query, 2, but got 3",
        ),
        (
            lambda m: m(*[jagged(3, 1).unflatten(-1, (2, 6))] * 3),
            ValueError,
            r"query must be 3-D \(\[N, j, E\]\) where it is nested, but got 4-D",
        ),
    ],
)
def test_wrong_calls(call: Callable[[Any], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(nn.MultiheadAttention(E, H, batch_first=True))
