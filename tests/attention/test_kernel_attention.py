"""Kernel regression far from the origin, and what it refuses. Its values and gradients: test_functional.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import functional, reference
from tests.helpers import seeded

kernel_attention = functional.kernel_attention
SEEDED = seeded(0)
Q, K, V = (torch.randn(2, 4, *n, generator=SEEDED) for n in ((5, 3), (7, 3), (7, 2)))

# Leading dimensions of query and key, and whether heads are grouped.
LEADS = [
    ((2, 4), (2, 4), False),
    ((2, 4), (2, 2), True),
    ((2, 4), (2, 1), True),
    ((2, 4), (2, 1), False),
    ((2, 4), (1, 4), False),
    ((2, 4), (1, 2), True),
    ((2, 4), (4,), False),
    ((4,), (4,), False),
    ((4,), (), True),
    ((3, 2, 4), (3, 1, 2), True),
]


@pytest.mark.parametrize(("lead", "key_lead", "grouped"), LEADS, ids=str)
@pytest.mark.parametrize("width", [0.7, torch.tensor(0.7)], ids=["number", "tensor"])
def test_sequences_far_apart(lead: Any, key_lead: Any, grouped: bool, width: Any) -> None:
    """Each keeps the digits that it has alone: the others' places are nothing to it."""
    key, value = torch.randn(*key_lead, 7, 3), torch.randn(*key_lead, 7, 2)
    where = torch.randint(-2, 3, (*key_lead, 1, 3)) * 8192.0
    heads = where.dim() > 2 and grouped
    of_queries = where.repeat_interleave(lead[-1] // key_lead[-1], -3) if heads else where
    query = torch.randn(*lead, 5, 3)
    far = query + of_queries, key + where, value
    near = far[0] - of_queries, far[1] - where, value  # the same points, to the last bit
    options: dict[str, Any] = {"return_lse": True, "enable_gqa": grouped}
    wide = [x.double() for x in near]
    if grouped and key.dim() < 3:
        wide[1:] = [x[None] for x in wide[1:]]
    exact = reference.kernel_attention(*wide, 0.7, **options)
    for got, alone, e in zip(
        kernel_attention(*far, width, **options), kernel_attention(*near, width, **options), exact, strict=True
    ):
        allowed = (alone - e).abs().max()
        assert (got - e).abs().max() <= 2 * allowed + 2e-6 * e.abs().max()


def test_an_outlier_spoils_its_own_sequence_alone() -> None:
    query = Q.clone()
    query[0] += 1e6
    alone = kernel_attention(Q[1:], K[1:], V[1:], 0.5)
    torch.testing.assert_close(kernel_attention(query, K, V, 0.5)[1:], alone)


@pytest.mark.parametrize(("queries", "keys", "lead"), [(0, 7, (2, 4)), (5, 0, (2, 4)), (5, 7, (0, 4))])
def test_nothing(queries: int, keys: int, lead: Any) -> None:
    key = torch.randn(*lead[:-1], 2, keys, 3, requires_grad=True)
    query = torch.randn(*lead, queries, 3, requires_grad=True)
    out = kernel_attention(query, key, key, 0.5, enable_gqa=True)
    assert out.shape == (*lead, queries, 3) and not out.isnan().any()
    assert not any(g.isnan().any() for g in torch.autograd.grad(out.sum(), (query, key)))


@pytest.mark.parametrize("width", [1e-3, 1e-6, 1e-12])
def test_narrow_kernels_have_finite_gradients(width: float) -> None:
    query, key = Q.clone().requires_grad_(), K.clone().requires_grad_()
    w = torch.tensor(width, requires_grad=True)
    out, lse = kernel_attention(query, key, V, w, return_lse=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (query, key, w), retain_graph=True))
    assert lse.isfinite().all()


def _near(got: Tensor, *arguments: Tensor, **options: Any) -> None:
    """As the same points, told apart in float64."""
    exact = reference.kernel_attention(*(x.double() for x in arguments[:3]), *arguments[3:], **options)
    assert (got - exact).abs().max() <= 4 * torch.finfo(got.dtype).eps * exact.abs().max()


@pytest.mark.parametrize(("span", "width"), [(100.0, 0.1), (1000.0, 0.1), (1000.0, 0.5), (1e4, 1e-2)])
def test_points_of_many_widths(span: float, width: float) -> None:
    x = torch.linspace(0, span, 1501)[:, None]
    _near(kernel_attention(x, x, x.sin(), width), x, x, x.sin(), width)


@pytest.mark.parametrize("far", [1e4, 1e20])
@pytest.mark.parametrize("which", ["query", "key", "barred key"])
def test_one_point_far_away_is_nothing_to_the_others(which: str, far: float) -> None:
    query, key, value = (torch.rand(n, 2, generator=SEEDED) for n in (5, 7, 7))
    alone = kernel_attention(query, key, value, 0.3)
    point, mask = torch.full((1, 2), far), torch.ones(5, 8, dtype=torch.bool)
    if which == "query":
        got = kernel_attention(torch.cat([query, point]), key, value, 0.3)[:5]
    else:
        mask[:, 7] = which == "key"
        got = kernel_attention(query, torch.cat([key, point]), torch.cat([value, value[:1]]), 0.3, mask)
    torch.testing.assert_close(got, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_kernels_of_16_bits(dtype: torch.dtype) -> None:
    query, key, value = (x[0, 0].to(dtype) for x in (Q, K, V))
    for width in (0.003, 1e-4):
        got = kernel_attention(query, key, value, torch.tensor(width))
        _near(got, query, key, value, width)
        assert torch.equal(got, kernel_attention(query, key, value, torch.tensor(width).item()))


def test_mixed_types_are_autocasts_business() -> None:
    """Of which both lose the same, though one of them has few digits for the centre."""
    query, key = (torch.randint(-3, 4, x.shape) + 300.0 for x in (Q, K))
    key = key.bfloat16()  # in steps of 2
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = kernel_attention(query, key, V, 2.0)
    torch.testing.assert_close(out.float(), reference.kernel_attention(query, key, V, 2.0), atol=0.05, rtol=0.05)


NESTED = torch.nested.nested_tensor([torch.randn(n, 4, 3) for n in (3, 1)], layout=torch.jagged).transpose(1, 2)
SMALL = "width must be finite and at least 7.5e-155, so that 1/width² is"
WIDTHS = [([1.0, 0, 1, 1], "0.0 to 1.0"), (math.inf, "inf to inf"), (math.nan, "nan to nan")]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"query": [1]}, TypeError, "query must be a Tensor, but got list"),
        ({"query": Q[0, 0, 0]}, ValueError, r"query must have at least 2 dimensions.* but got \[3\]"),
        ({"value": 3}, TypeError, "value must be a Tensor, but got int"),
        ({"query": Q.long()}, TypeError, "query must be floating-point, but got torch.int64"),
        ({"value": V.int()}, TypeError, "value must be floating-point, but got torch.int32"),
        ({"key": K.double()}, TypeError, "key must have the type of query, torch.float32, but got torch.float64"),
        ({"query": Q.double()}, TypeError, "key must have the type of query, torch.float64, but got torch.float32"),
        ({"query": NESTED}, ValueError, "query must not be nested, but got a nested tensor"),
        ({"key": NESTED}, ValueError, "key must not be nested"),
        ({"attn_mask": torch.ones(5, 6)}, ValueError, r"attn_mask must broadcast to \[2, 4, 5, 7\]"),
        ({"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask must be bool, or floating-point of at most tor"),
        ({"attn_mask": torch.ones(5, 7).double()}, TypeError, "attn_mask must be bool, .* but got torch.float64"),
        ({"attn_mask": 3}, TypeError, "attn_mask must be a Tensor, but got int"),
        ({"width": 1e-200}, ValueError, f"{SMALL}, but got 1e-200"),
        ({"width": 10**400}, ValueError, f"{SMALL}.*, but got 1000"),
        ({"width": math.inf}, ValueError, f"{SMALL}.*, but got inf"),
        ({"width": math.nan}, ValueError, f"{SMALL}.*, but got nan"),
        ({"width": True}, TypeError, "width must be a float or an int or a Tensor, but got bool"),
        ({"width": torch.tensor(1)}, TypeError, "width must be floating-point, but got torch.int64"),
        ({"width": torch.tensor(1j)}, TypeError, "width must be floating-point, but got torch.complex64"),
        ({"width": torch.ones(3)}, ValueError, r"width must broadcast to \[2, 4\] \(…, heads\), but got shape \[3\]"),
        ({"width": torch.ones(1, 2, 4)}, ValueError, r"width must broadcast to \[2, 4\].* but got shape \[1, 2, 4\]"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa must be a bool, but got int"),
        *(
            pytest.param(
                {"width": torch.tensor(width)},
                ValueError,
                f"width must be positive and finite, but got {got}",
                marks=pytest.mark.cpu,  # contents of a GPU's are not looked at
            )
            for width, got in WIDTHS
        ),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        kernel_attention(**{"query": Q, "key": K, "value": V, "width": 1.0, **arguments})


def test_widths_at_the_ends() -> None:
    for dtype in (torch.float32, torch.float64):
        q, k, v = (x.to(dtype) for x in (Q, K, V))
        assert not kernel_attention(q, k, v, 7.6e-155).isinf().any()
        torch.testing.assert_close(kernel_attention(q, k, v, 1e200), v.mean(-2, keepdim=True).expand(2, 4, 5, 2))
    with pytest.raises(ValueError, match=SMALL):
        kernel_attention(Q.double(), K.double(), V.double(), 1e-160)
    assert kernel_attention(Q[0, 0], K[0, 0], V[0, 0], torch.tensor(0.5)).shape == (5, 2)
    with pytest.raises(ValueError, match=r"width must broadcast to \[\] "):
        kernel_attention(Q[0, 0], K[0, 0], V[0, 0], torch.ones(1))


def test_a_tensors_values_are_not_looked_at_where_there_are_none() -> None:
    def call(width: Tensor) -> Tensor:
        return kernel_attention(Q, K, V, width)

    widths = torch.tensor([0.5, 1.0])
    expected = torch.stack([call(w) for w in widths])
    torch.testing.assert_close(torch.vmap(call)(widths), expected)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(widths[0]), expected[0])
    traced = torch.fx.experimental.proxy_tensor.make_fx(call)(widths[0])
    torch.testing.assert_close(traced(widths[1]), expected[1])
