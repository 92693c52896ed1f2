"""What dot-product attention says of arguments that do not fit: the ops, and the functions before them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import functional
from tests.helpers import HERE

from .cases import KEY, op_arguments

ops = torch.ops.lect11ext
Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 3)
STARTS = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
ONE = {"query": Q[:1], "key": K[:1], "value": V[:1]}

CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": Q[0]}, ValueError, r"query must be 4-D \(\[batch, heads, positions, columns\]\), but got 3-D"),
    ({"key": K[0]}, ValueError, "key must be 4-D .* but got 3-D"),
    ({"value": V[None]}, ValueError, "value must be 4-D .* but got 5-D"),
    ({"query": Q.int()}, TypeError, "query must be float32, float64, bfloat16 or float16, but got Int"),
    ({"query": Q.cfloat()}, TypeError, "query must be float32, float64, bfloat16 or float16"),
    ({"key": K.double()}, TypeError, "key must have the type of query, Float, but got Double"),
    ({"value": V.bfloat16()}, TypeError, "value must have the type of query, Float, but got BFloat16"),
    ({"key": K.to("meta")}, RuntimeError, "Expected all tensors to be on the same device, but key is on meta"),
    ({"value": V.to("meta")}, RuntimeError, "same device, but value is on meta"),
    (
        {"key": K[:1]}, ValueError,
        r"key must have size 2 \(the batch of query\) in dimension 0, but got shape \[1, 2, 7, 8\]",
    ),
    ({"value": V[:1]}, ValueError, r"value must have size 2 \(the batch of query\) in dimension 0"),
    ({"key": K[..., :6]}, ValueError, r"key must have size 8 \(the columns of query\) in dimension 3"),
    ({"value": V[:, :1]}, ValueError, r"value must have size 2 \(the heads of key\) in dimension 1"),
    ({"value": V[:, :, 1:]}, ValueError, r"value must have size 7 \(the positions of key\) in dimension 2"),
    (
        {"query": Q[:, :3]}, ValueError,
        "key must have a number of heads that divides those of query, 3, but got 2",
    ),
    ({"key": K[:, :0], "value": V[:, :0]}, ValueError, "a number of heads that divides those of query, 4, but got 0"),
    ({"query": Q[:, :1]}, ValueError, "a number of heads that divides those of query, 1, but got 2"),
    ({"attn_mask": torch.zeros(5, 7)}, ValueError, "attn_mask must be 4-D here, but got 2-D"),
    (
        {"attn_mask": torch.zeros(1, 1, 5, 6)}, ValueError,
        r"attn_mask must broadcast to \[batch, heads, queries, keys\] = \[2, 4, 5, 7\], but got \[1, 1, 5, 6\]",
    ),
    ({"attn_mask": torch.zeros(1, 2, 5, 7)}, ValueError, r"attn_mask must broadcast to .* but got \[1, 2, 5, 7\]"),
    (
        {"attn_mask": torch.zeros(1, 1, 5, 7).int()}, TypeError,
        "attn_mask must be bool, float32 or of query's type, Float, but got Int",
    ),
    ({"attn_mask": torch.zeros(1, 1, 5, 7).half()}, TypeError, "attn_mask must be bool, .* Float, but got Half"),
    ({"attn_mask": torch.zeros(1, 1, 5, 7, device="meta")}, RuntimeError, "same device, but attn_mask is on meta"),
    ({"slopes": torch.zeros(4).double()}, TypeError, "alibi_slopes must be float32, but got Double"),
    (
        {"slopes": torch.zeros(2)}, ValueError,
        r"alibi_slopes must have shape \[heads\] or \[batch, heads\], \[2, 4\], but got \[2\]",
    ),
    ({"slopes": torch.zeros(4, 2)}, ValueError, r"alibi_slopes must have shape .* but got \[4, 2\]"),
    ({"starts": (STARTS[0], None), **ONE}, ValueError, "cu_seqlens_q and cu_seqlens_k must be given together"),
    ({"starts": (None, STARTS[1]), **ONE}, ValueError, "cu_seqlens_q and cu_seqlens_k must be given together"),
    ({"starts": STARTS}, ValueError, "query must have a batch of 1 where there are cu_seqlens, but got 2"),
    (
        {"starts": STARTS, **ONE, "attn_mask": torch.zeros(1, 1, 5, 7)}, ValueError,
        "attn_mask must be None where there are cu_seqlens",
    ),
    (
        {"starts": (STARTS[0].float(), STARTS[1]), **ONE}, TypeError,
        "cu_seqlens_q must be int32 or int64, but got Float",
    ),
    (
        {"starts": (STARTS[0], STARTS[1][None]), **ONE}, ValueError,
        r"cu_seqlens_k must have shape \[sequences \+ 1\], but got \[1, 3\]",
    ),
    ({"starts": (STARTS[0], STARTS[1][:0]), **ONE}, ValueError, r"cu_seqlens_k must have shape \[sequences \+ 1\]"),
    (
        {"starts": (STARTS[0], torch.tensor([0, 7])), **ONE}, ValueError,
        "cu_seqlens_q and cu_seqlens_k must be as long as one another, but got 3 and 2",
    ),
    ({"starts": (STARTS[0].to("meta"), STARTS[1]), **ONE}, RuntimeError, "same device, but cu_seqlens_q is on meta"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\], but got 1.5"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\], but got -0.1"),
    ({"dropout_p": math.nan}, ValueError, r"dropout_p must be in \[0, 1\], but got nan"),
    ({"dropout_p": 0.5, "dropout_key": KEY.int()}, TypeError, "key must be an int64 tensor .* but got Int"),
    ({"dropout_p": 0.5, "dropout_key": KEY[:1]}, ValueError, r"key must have shape \[2\]"),
    ({"dropout_p": 0.5, "dropout_key": KEY.to("meta")}, RuntimeError, f"Expected dropout_key to be on {HERE}"),
    ({"scale": math.nan}, ValueError, r"scale must be from -1e\+30 to 1e\+30 for a query of Float, but got nan"),
    ({"scale": -1e31}, ValueError, r"scale must be from -1e\+30 to 1e\+30 for a query of Float, but got -1e\+31"),
    ({"softcap": 0.0}, ValueError, r"softcap must be positive and at most 1e\+30 for a query of Float, but got 0"),
    ({"softcap": -1.0}, ValueError, "softcap must be positive and at most .*, but got -1"),
    ({"softcap": math.inf}, ValueError, "softcap must be positive and at most .*, but got inf"),
    ({"window": (-1, None)}, ValueError, "window_left must be nonnegative, but got -1"),
    ({"window": (None, -2)}, ValueError, "window_right must be nonnegative, but got -2"),
]  # fmt: skip


# What is known of the contents is asked of the CPU alone: a GPU's would have to be waited for.
CONTENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"starts": (STARTS[0] + 1, STARTS[1]), **ONE}, ValueError,
        "cu_seqlens_q must begin with 0 and end with the positions, 5, but got 1 and 6",
    ),
    (
        {"starts": (STARTS[0], STARTS[1][:2]), **ONE}, ValueError,
        "cu_seqlens_k must begin with 0 and end with the positions, 7, but got 0 and 3",
    ),
    (
        {"starts": (torch.tensor([0, 6, 5]), STARTS[1]), **ONE}, ValueError,
        "cu_seqlens_q must not descend, but got 6 before 5",
    ),
]  # fmt: skip


def shared(arguments: dict[str, Any]) -> tuple[Any, ...]:
    given = {"query": Q, "key": K, "value": V, **arguments}
    return op_arguments(given.pop("query"), given.pop("key"), given.pop("value"), **given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"), [*CASES, *(pytest.param(*case, marks=pytest.mark.cpu) for case in CONTENTS)]
)
def test_every_op_names_the_argument(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """The same words from all four: none trusts that the forward has looked."""
    inputs = shared(arguments)
    output, lse = torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5)
    for call in (
        lambda: ops.attention(*inputs),
        lambda: ops.attention_backward(output, lse, *inputs, output, lse, [True] * 4),
        lambda: ops.attention_tangent(*inputs, output, lse, Q, None, None, None),
        lambda: ops.attention_backward_tangent(
            output, lse, *inputs, output, lse, None, None, Q, None, None, None, output, lse, [True] * 4
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_dropout_needs_a_key() -> None:
    inputs = list(shared({}))
    inputs[8] = 0.5
    with pytest.raises(ValueError, match="dropout_key must be given with a dropout_p"):
        ops.attention(*inputs)


@pytest.mark.parametrize(
    ("index", "name", "wrong", "error", "message"),
    [
        (0, "grad_output", torch.zeros(2, 4, 5, 8), ValueError, r"must have shape \[2, 4, 5, 3\]"),
        (0, "grad_output", torch.zeros(2, 4, 5, 3).double(), TypeError, "must have the type of query, Float"),
        (0, "grad_output", torch.zeros(2, 4, 5, 3, device="meta"), RuntimeError, "same device, but grad_output is on"),
        (1, "grad_lse", torch.zeros(2, 4), ValueError, r"must have shape \[2, 4, 5\]"),
        (1, "grad_lse", torch.zeros(2, 4, 5).half(), TypeError, "must be Float, but got Half"),
        (16, "output", torch.zeros(2, 5, 4, 3), ValueError, r"must have shape \[2, 4, 5, 3\]"),
        (17, "lse", torch.zeros(2, 5, 4), ValueError, r"must have shape \[2, 4, 5\]"),
        (17, "lse", torch.zeros(2, 4, 5).double(), TypeError, "must be Float, but got Double"),
    ],
)
def test_backward_checks_what_it_is_given(
    index: int, name: str, wrong: Tensor, error: type[Exception], message: str
) -> None:
    output, lse = torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5)
    arguments: list[Any] = [output, lse, *shared({}), output, lse, [True, True, True, False]]
    arguments[index] = wrong
    with pytest.raises(error, match=f"{name} .*{message}|{message}"):
        ops.attention_backward(*arguments)


@pytest.mark.parametrize(
    ("tangents", "error", "message"),
    [
        ((Q[:1], None, None, None), ValueError, r"query_t must have shape \[2, 4, 5, 8\] \(that of its primal\)"),
        ((None, K.double(), None, None), TypeError, "key_t must be Float, but got Double"),
        ((None, None, V[..., :1], None), ValueError, r"value_t must have shape \[2, 2, 7, 3\]"),
        ((None, None, V.to("meta"), None), RuntimeError, "same device, but value_t is on meta"),
        ((None, None, None, Q), ValueError, "attn_mask_t must be None without an additive attn_mask"),
    ],
)
def test_tangents_are_checked(tangents: Any, error: type[Exception], message: str) -> None:
    output, lse = torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5)
    with pytest.raises(error, match=message):
        ops.attention_tangent(*shared({}), output, lse, *tangents)
    with pytest.raises(error, match=message):
        ops.attention_backward_tangent(
            output, lse, *shared({}), output, lse, None, None, *tangents, output, lse, [True, True, True, False]
        )


def test_tangents_of_masks_are_checked() -> None:
    output, lse = torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5)
    mask = torch.zeros(1, 4, 1, 7)
    inputs = shared({"attn_mask": mask})
    with pytest.raises(ValueError, match=r"attn_mask_t must have shape \[1, 4, 1, 7\]"):
        ops.attention_tangent(*inputs, output, lse, None, None, None, mask.expand(2, 4, 5, 7))
    inputs = shared({"attn_mask": mask == 0})
    with pytest.raises(ValueError, match="attn_mask_t must be None without an additive attn_mask"):
        ops.attention_tangent(*inputs, output, lse, None, None, None, mask)
    for i, (name, wrong) in enumerate(
        [("grad_output_t", lse), ("grad_lse_t", output), ("output_t", lse), ("lse_t", output)]
    ):
        extra: list[Any] = [None, None, None, None, None, None, output, lse]
        extra[(0, 1, 6, 7)[i]] = wrong
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            ops.attention_backward_tangent(output, lse, *shared({}), output, lse, *extra, [True, True, True, False])


def test_the_compiler_sees_the_same_errors() -> None:
    """Checks that need no values hold for tensors without any."""
    fake = [x.to("meta") for x in (Q, K[:, :, :6], V)]
    with pytest.raises(ValueError, match=r"value must have size 6 \(the positions of key\) in dimension 2"):
        ops.attention(*op_arguments(*fake))


def test_functions_name_their_own_arguments() -> None:
    """Where the functions have other words than the op: test_functional.py. Here, that nothing slips past them."""
    attend = functional.scaled_dot_product_attention
    for options, error, message in (
        ({"attn_mask": torch.zeros(5, 7).int()}, TypeError, "attn_mask must be bool"),
        ({"attn_mask": torch.zeros(3, 5, 7)}, ValueError, r"attn_mask must broadcast to \[2, 4, 5, 7\]"),
        ({"scale": math.inf}, ValueError, "scale must be finite, but got inf"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"softcap": math.nan}, ValueError, "softcap must be finite, but got nan"),
        ({"window": (-1, 0)}, ValueError, "window's left side must be a number of keys"),
        ({"window": (1,)}, TypeError, r"window must be \(left, right\)"),
        ({"dropout_p": 2}, ValueError, "dropout_p must be a probability"),
        ({"dropout_p": 0.5, "dropout_key": KEY.int()}, TypeError, "int64"),
        ({"dropout_key": 3}, TypeError, "dropout_key must be a Tensor or None, but got int"),
        ({"generator": 3}, TypeError, "generator must be a Generator or None, but got int"),
        ({"causal_alignment": None}, ValueError, "causal_alignment must be 'top_left' or 'bottom_right'"),
        ({"alibi_slopes": torch.ones(2, 3)}, ValueError, r"alibi_slopes must have shape \[4\]"),
    ):
        with pytest.raises(error, match=message):
            attend(Q, K, V, enable_gqa=True, **options)
    with pytest.raises(ValueError, match="must have as many heads as query, 4, or one"):
        attend(Q, K, V)
    with pytest.raises(TypeError, match="value must be a Tensor, but got list"):
        attend(Q, K, V.tolist(), enable_gqa=True)
