"""What the cells say of arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import functional, nn

X, H, W, U, B = (torch.zeros(s) for s in ((3, 5), (3, 7), (28, 5), (28, 7), (28,)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[None], (H, H), W, U), ValueError, "Expected input to be 1D or 2D, got 3D"),
        ((X, (H[0], H), W, U), ValueError, "Expected h to be 2D, as input is, got 1D"),
        ((X, (H, H[0]), W, U), ValueError, "Expected c to be 2D"),
        ((X, (H[:2], H), W, U), ValueError, r"h must have shape \[3, 7\].*got \[2, 7\]"),
        ((X, (H, H[:, :6]), W, U), ValueError, r"c must have shape \[3, 7\]"),
        ((X, (H, H), W[:27], U), ValueError, r"weight_ih must have shape \[28, 5\].*got \[27, 5\]"),
        ((X[:, :4], (H, H), W, U), ValueError, "input must have input_size columns, as weight_ih has: 5, but got 4"),
        ((X, (H[:, :6], H), W, U), ValueError, "h must have hidden_size columns, as weight_hh has: 7, but got 6"),
        ((X, (H, H), W, U[:, :6]), ValueError, r"weight_hh must have shape \[28, 7\]"),
        ((X, (H, H), W[0], U), ValueError, "weight_ih must be 2-D, but got 1-D"),
        ((X, (H, H), W, U, B[:27]), ValueError, r"bias_ih must have shape \[28\].*got \[27\]"),
        ((X, (H, H), W, U, None, B[:1]), ValueError, r"bias_hh must have shape \[28\]"),
        ((X.long(), (H, H), W, U), TypeError, "input must be float32, float64, bfloat16 or float16, but got Long"),
        ((X.cfloat(), (H, H), W, U), TypeError, "input must be float32"),
        ((X, (H.double(), H), W, U), TypeError, "h must have the type of input, Float, but got Double"),
        ((X, (H, H), W.half(), U), TypeError, "weight_ih must have the type of input"),
        ((X, (H, H), W, U, B.double()), TypeError, "bias_ih must have the type of input"),
        ((X, (H.to("meta"), H), W, U), RuntimeError, "Expected all tensors to be on the same device"),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.lstm_cell(*arguments)
    if "c must" in message or "Expected c" in message:
        return
    x, (h, _), w, u, *biases = arguments
    biases = [b if b is None else b[:21] if b.numel() == 28 else b[:20] for b in biases]
    cut = w[:21] if w.size(0) == 28 or w.dim() == 1 else w[:20]
    with pytest.raises(error, match=message.replace("28", "21").replace("27", "20")):
        functional.gru_cell(x, h, cut if w.dim() == 2 else w, u[:21], *biases)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, [1.0], "input must be a Tensor, but got list"),
        (0, None, "input must be a Tensor, but got NoneType"),
        (1, 3, "h must be a Tensor, but got int"),
        (2, None, "weight_ih must be a Tensor, but got NoneType"),
        (3, 1.5, "weight_hh must be a Tensor, but got float"),
        (4, "b", "bias_ih must be a Tensor or None, but got str"),
        (5, 0, "bias_hh must be a Tensor or None, but got int"),
    ],
)
def test_wrong_python_types_are_named(position: int, value: Any, message: str) -> None:
    arguments: list[Any] = [X, H, W, U, B, B]
    arguments[position] = value
    with pytest.raises(TypeError, match=message):
        functional.lstm_cell(arguments[0], (arguments[1], H), *arguments[2:])
    arguments = [X, H, W[:21], U[:21], B[:21], B[:21]]
    arguments[position] = value
    with pytest.raises(TypeError, match=message):
        functional.gru_cell(*arguments)


def test_wrong_types_of_options_are_named() -> None:
    for state in (None, H, (H, H, H), 3):
        with pytest.raises(TypeError, match=r"state must be \(h, c\), two tensors, but got"):
            functional.lstm_cell(X, state, W, U)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="candidate must be a str, but got NoneType"):
        functional.lstm_cell(X, (H, H), W, U, candidate=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="grad_clip must be a float or an int or None, but got str"):
        functional.lstm_cell(X, (H, H), W, U, grad_clip="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="grad_clip must be a float or an int or None, but got bool"):
        functional.lstm_cell(X, (H, H), W, U, grad_clip=True)
    with pytest.raises(TypeError, match="grad_clip must be a float or an int or None, but got bool"):
        functional.gru_cell(X, H, W[:21], U[:21], grad_clip=False)
    with pytest.raises(TypeError, match="reset_after must be a bool, but got str"):
        functional.gru_cell(X, H, W[:21], U[:21], reset_after="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.LSTM, nn.GRU])
def test_options_of_a_wrong_type_are_no_modules(cell: Any) -> None:
    for clip in ("1", 1j, torch.ones(2), True):
        with pytest.raises(TypeError, match=f"grad_clip must be .* or None, but got {type(clip).__name__}"):
            cell(5, 7, grad_clip=clip)
    for flag in (None, 2, "yes") if cell in (nn.GRUCell, nn.GRU) else ():
        with pytest.raises(TypeError, match=f"reset_after must be a bool, but got {type(flag).__name__}"):
            cell(5, 7, reset_after=flag)


def test_errors_of_options() -> None:
    with pytest.raises(ValueError, match="candidate must be 'tanh' or 'sigmoid', but got 'relu'"):
        functional.lstm_cell(X, (H, H), W, U, candidate="relu")
    with pytest.raises(ValueError, match="candidate must be 'tanh' or 'sigmoid'"):
        nn.LSTMCell(5, 7, candidate="relu")
    with pytest.raises(ValueError, match="grad_clip must be nonnegative, but got -1"):
        functional.lstm_cell(X, (H, H), W, U, grad_clip=-1.0)
    with pytest.raises(ValueError, match="grad_clip must be nonnegative, but got -1"):
        nn.GRUCell(5, 7, grad_clip=-1)
    with pytest.raises(ValueError, match="grad_clip must fit in 64 bits"):
        functional.lstm_cell(X, (H, H), W, U, grad_clip=10**400)
    with pytest.raises(ValueError, match="grad_clip must be nonnegative"):
        functional.gru_cell(X, H, W[:21], U[:21], grad_clip=float("nan"))


def test_raw_backward_ops_check_what_they_are_given() -> None:
    ops, z = torch.ops.lect11ext, torch.zeros
    inputs = (z(64, 5), z(64, 40), z(64, 40), z(160, 5), z(160, 40), None, None, "tanh", None)
    gates, mask = z(64, 160), [True] * 7
    for device in ("cpu", "meta"):
        move = [t.to(device) if isinstance(t, Tensor) else t for t in (*inputs, gates, z(64, 40), z(1, 1))]
        *args, kept, c_out, bad = move
        for wrong, name in (((bad, None), "grad_h"), ((None, bad), "grad_c")):
            with pytest.raises(ValueError, match=f"{name} must have shape"):
                ops.lstm_cell_backward(*wrong, *args, kept, c_out, mask)
        with pytest.raises(ValueError, match="gates must have shape"):
            ops.lstm_cell_backward(c_out, None, *args, bad, c_out, mask)
        with pytest.raises(ValueError, match="c_out must have shape"):
            ops.lstm_cell_backward(c_out, None, *args, kept, bad, mask)
        gru = (args[0], args[1], args[3][:120], args[4][:120], None, None, True, None)
        with pytest.raises(ValueError, match="grad_h must have shape"):
            ops.gru_cell_backward(bad, *gru, kept, [True] * 6)
        with pytest.raises(ValueError, match="gates must have shape"):
            ops.gru_cell_backward(c_out, *gru, bad, [True] * 6)
