"""Errors of the ops on sparse codes name the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lect11ext import functional

BF16, F64 = torch.bfloat16, torch.float64
V, J, W = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((V[:1], J, W), ValueError, r"values must have shape \[2, 3\] \(that of indices\), but got \[1, 3\]"),
        ((V.long(), J, W), TypeError, "values must be float32, float64, bfloat16 or float16, but got Long"),
        ((V, V, W), TypeError, "indices must be int64 or int32, but got Float"),
        ((V, J, W[0, 0]), ValueError, r"weight must have shape \[atoms, features\], but got \[\]"),
        ((V, J, W[0]), ValueError, r"weight must have shape \[atoms, features\], but got \[4\]"),
        ((V, J, W.int()), TypeError, "weight must be float32"),
        ((V, J, W, V[0]), ValueError, r"bias must have shape \[4\] \(the columns of weight\), but got \[3\]"),
        ((V, J, W, W[0].int()), TypeError, "bias must be float32"),
        ((V, J, W.to("meta")), RuntimeError, "Expected all tensors to be on the same device"),
        ((V, J.to("meta"), W), RuntimeError, "Expected all tensors to be on the same device"),
        ((V[0, 0], J[0, 0], W), ValueError, "indices must have at least one dimension, but got a scalar"),
        (([1.0], J, W), TypeError, "values must be a Tensor, but got list"),
        ((V, [1], W), TypeError, "indices must be a Tensor, but got list"),
        ((V, J, None), TypeError, "weight must be a Tensor, but got NoneType"),
        ((V, J, W, 1.0), TypeError, "bias must be a Tensor or None, but got float"),
    ],
)
def test_errors_of_decode_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.sparse_decode(*arguments)


@pytest.mark.cpu  # a GPU's would have to be waited for
def test_errors_of_what_indices_hold() -> None:
    ops = torch.ops.lect11ext
    for index in (5, -1):
        with pytest.raises(IndexError, match=rf"indices must be in \[0, 5\), the rows of weight, but got {index}"):
            functional.sparse_decode(V, J + index, W)
    with pytest.raises(IndexError, match=r"indices must be in \[0, 0\)"):
        ops.sparse_outer(V, J, torch.zeros(2, 4), 0)
    with pytest.raises(IndexError, match="but got 7"):
        ops.topk_code_backward(V, J + 7, 7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((V, 4), {}, ValueError, r"k must be in \[0, 3\], the last dimension of input, but got 4"),
        ((V, -1), {}, ValueError, r"k must be in \[0, 3\]"),
        ((V, 1.5), {}, TypeError, "k must be an int, but got float"),
        ((V[0, 0], 1), {}, ValueError, "input must have at least one dimension, but got a scalar"),
        ((V.long(), 1), {}, TypeError, "input must be float32"),
        (([1.0], 1), {}, TypeError, "input must be a Tensor, but got list"),
        ((V, 1), {"activation": "tanh"}, ValueError, "activation must be one of 'relu', 'identity', but got 'tanh'"),
        ((V, 1), {"activation": None}, TypeError, "activation must be a str, but got NoneType"),
    ],
)
def test_errors_of_topk_name_the_argument(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        functional.topk_code(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W[0, 0], W), ValueError, r"input must have shape \[\*, 4\], but got \[\]"),
        ((W[:, :3], W), ValueError, r"input must have shape \[\*, 4\], but got \[5, 3\]"),
        ((W, W[0]), ValueError, r"weight must have shape \[atoms, features\], but got \[4\]"),
        ((W, W, W[0]), ValueError, r"bias must have shape \[5\] \(the rows of weight\), but got \[4\]"),
        ((W, W, W[0, 0]), ValueError, r"bias must have shape \[5\] \(the rows of weight\), but got \[\]"),
        ((W.long(), W), TypeError, "input must be float32, float64, bfloat16 or float16, but got torch.int64"),
        ((W, W.bool()), TypeError, "weight must be float32, float64, bfloat16 or float16, but got torch.bool"),
        ((W, W, W[:, 0].long()), TypeError, "bias must be float32, float64, bfloat16 or float16, but got torch.int64"),
    ],
)
def test_errors_of_encode_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.topk_encode(*arguments, k=1)


def test_errors_of_the_derivatives() -> None:
    ops = torch.ops.lect11ext
    with pytest.raises(ValueError, match=r"dense must have shape \[2, 4\]"):
        ops.sparse_dots(torch.zeros(2, 5), J, W, None)
    with pytest.raises(ValueError, match=r"bias must have shape \[5\] \(the rows of weight\), but got \[4\]"):
        ops.sparse_dots(torch.zeros(2, 4), J, W, W[0])
    with pytest.raises(ValueError, match="atoms must be nonnegative"):
        ops.sparse_outer(V, J, torch.zeros(2, 4), -1)
