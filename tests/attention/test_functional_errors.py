"""What attention's functions refuse, and in what words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lect11ext import functional
from tests.helpers import HERE

sdpa = functional.scaled_dot_product_attention
KEY = torch.tensor([2**63 - 5, -7])
Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 3)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"query": 1}, TypeError, "query must be a Tensor, but got int"),
        ({"key": None}, TypeError, "key must be a Tensor, but got NoneType"),
        ({"query": Q[0, 0, 0]}, ValueError, r"query must have at least 2 dimensions.* but got \[8\]"),
        ({"key": K[..., :3]}, ValueError, r"key must have as many columns as query, 8, but got shape \[2, 4, 7, 3\]"),
        ({"value": V[:, :, 1:]}, ValueError, r"value must have as many positions as key, 7, but got shape \[2, 4, 6, "),
        ({"key": K[:, :3]}, ValueError, "key and value must have as many heads as query, 4, or one, but got 3 and 4"),
        (
            {"key": K[:, :3], "value": V[:, :3], "enable_gqa": True},
            ValueError,
            "key's heads must divide query's, 4, with enable_gqa, but got 3 heads",
        ),
        ({"query": Q.expand(2, 4, 5, 8)[[0, 0, 0]]}, ValueError, r"leading dimensions that broadcast, but got shapes"),
        ({"key": K.double()}, TypeError, "key must have the type of query, Float, but got Double"),
        ({"query": Q.int(), "key": K.int(), "value": V.int()}, TypeError, "query must be"),
        ({"key": K.to("meta")}, RuntimeError, "Expected all tensors to be on the same device, but key is on meta"),
        ({"attn_mask": [1]}, TypeError, "attn_mask must be a Tensor, but got list"),
        (
            {"attn_mask": torch.ones(5, 6)},
            ValueError,
            r"must broadcast to \[2, 4, 5, 7\] \(…, queries, keys\), but got",
        ),
        ({"attn_mask": torch.ones(1, 1, 1, 5, 7)}, ValueError, r"attn_mask must broadcast to \[2, 4, 5, 7\]"),
        ({"attn_mask": torch.ones(5, 7).int()}, TypeError, "attn_mask must be bool, float32 or of query's type, Float"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be a probability, from 0 to 1, but got -0.1"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p must be a probability, from 0 to 1, but got nan"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float or an int, but got str"),
        ({"dropout_p": 0.5, "generator": 3}, TypeError, "generator must be a Generator or None, but got int"),
        ({"dropout_p": 0.5, "dropout_key": 3}, TypeError, "dropout_key must be a Tensor or None, but got int"),
        ({"dropout_key": KEY[:1]}, ValueError, r"dropout_key must have shape \[2\] \(\[seed, off.* but got \[1\]"),
        ({"dropout_key": KEY[None]}, ValueError, r"dropout_key must have shape \[2\].* but got \[1, 2\]"),
        ({"dropout_p": 0.5, "dropout_key": KEY.int()}, TypeError, "dropout_key must be an int64 tensor .* torch.int32"),
        ({"dropout_key": KEY.to("meta")}, RuntimeError, f"same device, but dropout_key is on meta and query on {HERE}"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool, but got int"),
        ({"enable_gqa": "no"}, TypeError, "enable_gqa must be a bool, but got str"),
        ({"scale": math.nan}, ValueError, "scale must be finite, but got nan"),
        ({"scale": 10**400}, ValueError, "scale must be finite, but got 1000"),
        ({"softcap": 10**400}, ValueError, "softcap must be finite, but got 1000"),
        ({"softcap": 1e39}, ValueError, "softcap must be in float32's range, from 1.18e-38 to 3.4e.38, but got 1e.39"),
        ({"softcap": 1e-300}, ValueError, "softcap must be in float32's range, .* but got 1e-300"),
        ({"dropout_p": torch.zeros(2)}, TypeError, "dropout_p must be a float or an int, but got Tensor"),
        ({"dropout_p": False}, TypeError, "dropout_p must be a float or an int, but got bool"),
        ({"value": V.cpu().numpy()}, TypeError, "value must be a Tensor, but got ndarray"),
        ({"scale": "1"}, TypeError, "scale must be a float or an int or None, but got str"),
        ({"softcap": 0}, ValueError, "softcap must be positive, or None for none, but got 0"),
        ({"window": 3}, TypeError, r"window must be \(left, right\), numbers of keys or None, but got 3"),
        ({"window": (1, -2)}, ValueError, "window's right side must be a number of keys, or None for all, but got -2"),
        ({"window": (1.5, 2)}, TypeError, "window's left side must be an int, but got float"),
        ({"causal_alignment": "left"}, ValueError, "causal_alignment must be 'top_left' or 'bottom_right', but got 'l"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must have shape \[4\] \(heads\), or one that"),
        ({"alibi_slopes": torch.ones(4).int()}, TypeError, "alibi_slopes must be floating-point, but got torch.int32"),
        ({"alibi_slopes": 0.5}, TypeError, "alibi_slopes must be a Tensor, but got float"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sdpa(**{"query": Q, "key": K, "value": V, **arguments})


X, STARTS = torch.zeros(7, 4, 8), torch.tensor([0, 3, 7])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: functional.varlen_attention(Q, X, X, STARTS, STARTS), ValueError, r"query must be \[positions, heads"),
        (
            lambda: functional.varlen_attention(X, X, X, STARTS.float(), STARTS),
            TypeError,
            "cu_seqlens_q must be int64 or int32, but got torch.float32",
        ),
        (
            lambda: functional.varlen_attention(X, X, X, STARTS, STARTS[:0]),
            ValueError,
            r"cu_seqlens_k must have shape \[sequences \+ 1\], but got \[0\]",
        ),
        (
            lambda: functional.varlen_attention(X, X, X, STARTS, STARTS[[0, 2]]),
            ValueError,
            "cu_seqlens_k must have as many items as cu_seqlens_q, 3, but got 2",
        ),
        pytest.param(
            lambda: functional.varlen_attention(X, X, X, STARTS, STARTS - 1),
            ValueError,
            "cu_seqlens_k must begin with 0",
            marks=pytest.mark.cpu,  # contents of a GPU's are not looked at
        ),
        (
            lambda: functional.varlen_attention(X, X, X, STARTS, STARTS, alibi_slopes=torch.ones(2, 4)),
            ValueError,
            "alibi_slopes must",
        ),
        (
            lambda: functional.merge_attention(V, V[..., 0], V, V),
            ValueError,
            r"lse_b must have the shape of out_b without its last dimension, \[2, 4, 7\], but got",
        ),
        (
            lambda: functional.merge_attention(V, V[..., 0], K, K[..., 0]),
            ValueError,
            r"out_b must have the shape of out_a, \[2, 4, 7, 3\], but got \[2, 4, 7, 8\]",
        ),
        (
            lambda: functional.merge_attention(V, V[..., 0], V, V[..., 0].to("meta")),
            RuntimeError,
            "but lse_b is on meta and out_a on",
        ),
        (lambda: functional.merge_attention(V.int(), V[..., 0], V, V[..., 0]), TypeError, "out_a must be floating-poi"),
        (
            lambda: functional.merge_attention(V, V[..., 0], V, V[..., 0].long()),
            TypeError,
            "lse_b must be floating-point, but got torch.int64",
        ),
        (
            lambda: functional.attention_weights(Q, K, Q[..., 0], dropout_key=KEY[:1]),
            ValueError,
            r"dropout_key must have shape \[2\]",
        ),
        (
            lambda: functional.attention_weights(Q, K, Q[..., 0], softcap=1e39),
            ValueError,
            "softcap must be in float32's range",
        ),
        (
            lambda: functional.attention_weights(Q, K, Q[..., 0, 0]),
            ValueError,
            r"lse must have shape \[2, 4, 5\], but got \[2, 4\]",
        ),
        (
            lambda: functional.attention_weights(Q, K, Q[..., 0], dropout_p=0.5),
            ValueError,
            "dropout_key must be given where dropout_p is not 0",
        ),
        (lambda: functional.kernel_attention(Q, K, V, 0), ValueError, "width must be finite and at least 7.5e-155.* 0"),
        (lambda: functional.kernel_attention(Q, K, V, "1"), TypeError, "width must be a float or an int or a Tensor"),
        (
            lambda: functional.kernel_attention(Q, K.to("meta"), V, 1.0),
            RuntimeError,
            f"same device, but key is on meta and query on {HERE}",
        ),
        (lambda: functional.attention_weights(Q, K, torch.zeros(3)), ValueError, "lse must have shape .* but got .3."),
        (
            lambda: functional.attention_weights(Q, K, torch.zeros(Q.shape[:-1]).long()),
            TypeError,
            "lse must be floating-point, but got torch.int64",
        ),
        (
            lambda: functional.attention_weights(Q, K[:, :3], torch.zeros(Q.shape[:-1])),
            ValueError,
            "^key must have as many heads as query, 4, or one, but got 3; enable_gqa",
        ),
        (
            lambda: functional.varlen_attention(
                *(torch.zeros(n, 2, 8) for n in (7, 7, 5)), *[torch.tensor([0, 7])] * 2
            ),
            ValueError,
            r"value must have as many positions as key, 7, but got shape \[5, 2, 8\]",
        ),
        (lambda: functional.kernel_attention(Q, K[..., :3], V, 1.0), ValueError, "key must have as many columns as"),
    ],
)
def test_wrong_calls_of_the_others(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_wrong_nested_calls() -> None:
    nested = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 1)], layout=torch.jagged).transpose(1, 2)
    other = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (1, 3)], layout=torch.jagged).transpose(1, 2)
    more = torch.nested.nested_tensor([torch.randn(n, 4, 8) for n in (3, 1, 2)], layout=torch.jagged).transpose(1, 2)
    strided = torch.nested.nested_tensor([torch.randn(4, n, 8) for n in (3, 1)])
    for call, message in (
        (lambda: sdpa(nested, nested, nested, Q[0, 0]), "attn_mask must be None with nested tensors"),
        (lambda: sdpa(nested, nested, Q), "value must be a nested tensor of layout torch.jagged"),
        (lambda: sdpa(nested, nested, other), "value must have key's lengths, but got others"),
        (lambda: sdpa(nested, more, more), "key must have as many sequences as query, 2, but got 3"),
        (lambda: sdpa(Q, nested, nested), "key must not be nested, but got a nested tensor: scaled_dot_product_attent"),
        (lambda: sdpa(Q, K, nested), "value must not be nested"),
        (lambda: sdpa(Q, strided, strided), "key must not be nested"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
