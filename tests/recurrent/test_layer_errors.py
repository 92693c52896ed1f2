"""What nn.LSTM and nn.GRU say of arguments that do not fit: torch.nn's words where it has some."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lect11ext import functional, nn
from tests.helpers import HERE

KINDS = ["LSTM", "GRU"]
X, H = torch.randn(6, 3, 5), torch.randn(2, 3, 7)
W2 = [torch.randn(28, 5), torch.randn(28, 7)]


def failure(function: Any, *args: Any, **options: Any) -> tuple[type[Exception], str]:
    with warnings.catch_warnings(), pytest.raises(Exception) as info:
        warnings.simplefilter("ignore")
        function(*args, **options)
    return info.type, str(info.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"dropout": True},
        {"num_layers": 0},
        {"input_size": 0},
        {"input_size": 5.0},
        {"hidden_size": 0},
        {"hidden_size": "7"},
        {"bias": 1},
        {"batch_first": 1},
        {"proj_size": -1},
        {"proj_size": 7},
    ],
    ids=str,
)
def test_constructors_fail_as_torchs_do(kind: str, options: dict[str, Any]) -> None:
    if kind == "GRU" and "proj_size" in options:
        with pytest.raises(TypeError, match="proj_size"):
            nn.GRU(5, 7, **options)
        return
    arguments = {"input_size": 5, "hidden_size": 7, **options}
    assert failure(getattr(nn, kind), **arguments) == failure(getattr(torch.nn, kind), **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_one_layer_warns_as_torchs_does(kind: str) -> None:
    messages = []
    for place in (nn, torch.nn):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as caught:
            getattr(place, kind)(5, 7, dropout=0.5)
        messages.append([str(w.message) for w in caught])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("x", "h"),
    [
        (X[0, 0], None),
        (X[None], None),
        (X[..., :4], None),
        (X[:, 0, :4], None),
        (X.double(), None),
        (X, H[:1]),
        (X, H[:, :2]),
        (X, H[..., :6]),
        (X, H[0]),
        (X, H[None]),
        (X[:, 0], H),
        (X[:, 0], H[:, 0, :6]),
        (X[:, 0], H[:1, 0]),
    ],
    ids=lambda t: "none" if t is None else f"{str(t.dtype)[6:]}{list(t.shape)}",
)
def test_calls_fail_as_torchs_do(kind: str, x: Any, h: Any) -> None:
    good = H if x.dim() == 3 else H[:, 0]
    choices = [None] if h is None else [h] if kind == "GRU" else [(h, h), (good, h), (h, good)]
    for hx in choices:
        ours, torchs = (failure(getattr(place, kind)(5, 7, 2), x, hx) for place in (nn, torch.nn))
        assert ours == torchs


@pytest.mark.parametrize("kind", KINDS)
def test_packed_calls(kind: str) -> None:
    """torch.nn.LSTM leaves some of these to the kernel; torch.nn.GRU's words are ours, for both."""
    packed, layer = pack_padded_sequence(X, [6, 3, 1]), getattr(nn, kind)(5, 7, 2)
    wrap = (lambda h: (h, h)) if kind == "LSTM" else (lambda h: h)
    for h, shape in ((H[:, :2], "2, 2, 7"), (H[0], "3, 7"), (H[..., :6], "2, 3, 6")):
        kind_, message = failure(layer, packed, wrap(h))
        assert kind_ is RuntimeError
        assert re.fullmatch(rf"Expected hidden(\[0\])? size \(2, 3, 7\), got \[{shape}\]", message)
    with pytest.raises(RuntimeError, match=r"Expected 5, got 4"):
        layer(pack_padded_sequence(X[..., :4], [6, 3, 1]))
    for options in ({"lengths": torch.tensor([6, 3, 1])}, {"reset": torch.zeros(6, 3, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="lengths and reset go with padded input"):
            layer(packed, **options)
        with pytest.raises(ValueError, match=f"{kind}: lengths and reset need a batched, 3-D input"):
            layer(X[:, 0], **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [X, X[:, 0], pack_padded_sequence(X, [6, 3, 1])], ids=["batch", "unbatched", "packed"])
def test_wrong_types_of_hx_are_named(kind: str, x: Any) -> None:
    layer, h = getattr(nn, kind)(5, 7, 2), H
    if kind == "GRU":
        for hx in (3, "h", [h], (h, h)):
            with pytest.raises(TypeError, match=f"hx must be a Tensor or None, but got {type(hx).__name__}"):
                layer(x, hx)
        return
    for hx, got in (
        (3, "int"),
        (h, "Tensor"),
        ("hc", "str"),
        ((h,), r"\(Tensor\)"),
        ((h, None), r"\(Tensor, NoneType\)"),
        ([h, h, 3], r"\(Tensor, Tensor, int\)"),
    ):
        with pytest.raises(TypeError, match=rf"hx must be \(h, c\), two tensors, but got {got}"):
            layer(x, hx)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a Tensor or a PackedSequence, but got list"),
        ({"input": None}, TypeError, "input must be a Tensor or a PackedSequence, but got NoneType"),
        ({"lengths": [6, 3, 1]}, TypeError, "lengths must be a Tensor or None, but got list"),
        ({"lengths": torch.tensor([6, 3, 1]).int()}, TypeError, "lengths must be int64, but got Int"),
        ({"lengths": torch.tensor([6, 3])}, ValueError, r"lengths must have shape \[3\].*got \[2\]"),
        ({"lengths": torch.tensor([6, 3, 1]).to("meta")}, RuntimeError, "lengths is on meta"),
        ({"reset": True}, TypeError, "reset must be a Tensor or None, but got bool"),
        ({"reset": torch.zeros(6, 3)}, TypeError, "reset must be bool, but got Float"),
        ({"reset": torch.zeros(3, 6) > 0}, ValueError, r"reset must have shape \[6, 3\] \(steps, batch\)"),
        ({"reset": torch.zeros(6, 3).to("meta") > 0}, RuntimeError, "reset is on meta"),
        ({"hx": H.double()}, TypeError, "h must have the type of input, Float, but got Double"),
        ({"hx": H.to("meta")}, RuntimeError, f"h is on meta and input is on {HERE}"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors_name_the_argument(kind: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"input": X, **options}
    if kind == "LSTM" and "hx" in options:
        arguments["hx"] = (options["hx"], H)
    with pytest.raises(error, match=message):
        getattr(nn, kind)(5, 7, 2)(**arguments)


def test_options_of_the_modules() -> None:
    with pytest.raises(ValueError, match="candidate must be 'tanh' or 'sigmoid', but got 'relu'"):
        nn.LSTM(5, 7, candidate="relu")
    for kind in KINDS:
        with pytest.raises(ValueError, match="grad_clip must be nonnegative, but got -1"):
            getattr(nn, kind)(5, 7, grad_clip=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[3, 2, 1], [3, 2, 2, 1], [2, 3, 2], [3, 0, 4], [7, 0], [8, -1], []], ids=str)
def test_packed_sequences_that_no_function_makes(kind: str, sizes: list[int]) -> None:
    """torch.nn's leave rows out, or fail in the kernel."""
    packed = PackedSequence(torch.randn(7, 5), torch.tensor(sizes, dtype=torch.int64, device="cpu"))
    with pytest.raises(ValueError, match="positive, in descending order, and sum to the rows of its data, 7, but got"):
        getattr(nn, kind)(5, 7)(packed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"input": X[..., :4]},
        {"input": X.double()},
        {"input": X.long()},
        {"state": H[:1, :2]},
        {"state": H[:1, :, :6]},
        {"state": H[:1].double()},
        {"lengths": [6, 3, 1]},
        {"lengths": 10**400},
        {"lengths": torch.tensor([6, 3, 1]).int()},
        {"lengths": torch.tensor([6, 3])},
        {"lengths": torch.tensor([6])},
        {"lengths": torch.tensor(6)},
        {"lengths": torch.tensor([6, 3, 1]).to("meta")},
        {"reset": torch.zeros(6, 3)},
        {"weights": [None, torch.randn(28, 7)]},
        {"weights": [torch.randn(28), torch.randn(28, 7)]},
        {"weights": [torch.randn(28, 5), None]},
        {"weights": [torch.randn(28, 5).double(), torch.randn(28, 7)]},
        {"weights": [torch.randn(28, 5), torch.randn(28, 6)]},
        {"weights": [torch.randn(28, 5), torch.randn(28, 7), torch.randn(27), None]},
        {"candidate": "relu"},
        {"truncate": -1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_norm_changes_no_error(kind: str, change: dict[str, Any]) -> None:
    rows = 28 if kind == "LSTM" else 21
    arguments: dict[str, Any] = {"input": X, "state": H[:1], "weights": [torch.randn(28, 5), torch.randn(28, 7)]}
    arguments |= change
    arguments["weights"] = [[w if w is None else w[:rows] if len(w) == 28 else w[: rows - 1]
                             for w in arguments["weights"]]]  # fmt: skip
    if kind == "LSTM":
        arguments["state"] = (arguments["state"], H[:1])
    elif "candidate" in change:
        return
    like = next((w for w in arguments["weights"][0] if w is not None), X)
    dtype = like.dtype
    scales = [(torch.ones(rows, dtype=dtype), torch.ones(rows))] if dtype == torch.float32 else None
    plain = failure(getattr(functional, kind.lower()), **arguments)
    assert re.match("input|h|lengths|reset|weight_ih|weight_hh|bias_ih|candidate|truncate|Expected all", plain[1])
    if scales is not None:
        assert failure(getattr(functional, kind.lower()), layer_norms=scales, **arguments) == plain


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight_hh", (16,), "weight_hh must be 2-D, but got 1-D"),
        ("weight_hh", (16, 3), r"weight_hh must have shape \[16, 2\] \(gates \* hidden_size, size of h\), but got"),
        ("weight_hh", (20, 2), r"weight_hh must have shape \[16, 2\]"),
        ("weight_hr", (2, 5), r"weight_hr must have shape \[2, 4\] \(size of h, hidden_size\), but got \[2, 5\]"),
        ("weight_hr", (3, 4), r"weight_hr must have shape \[2, 4\]"),
        ("c", (1, 2, 5), r"c must have shape \[2, 4\] \(batch of input, hidden_size\), but got \[2, 5\]"),
        ("h", (1, 2, 4), r"h must have shape \[2, 2\] \(batch of input, size of weight_hr\), but got \[2, 4\]"),
    ],
)
def test_the_one_of_a_projection_that_does_not_fit_is_named(name: str, shape: tuple[int, ...], message: str) -> None:
    shapes = {"weight_ih": (16, 3), "weight_hh": (16, 2), "weight_hr": (2, 4), "h": (1, 2, 2), "c": (1, 2, 4)}
    t = {n: torch.zeros(s) for n, s in (shapes | {name: shape}).items()}
    with pytest.raises(ValueError, match=message):
        functional.lstm(
            torch.zeros(5, 2, 3), (t["h"], t["c"]), [[t["weight_ih"], t["weight_hh"], None, None, t["weight_hr"]]]
        )


ONES = torch.ones(28)


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        (True, TypeError, "layer_norms must be a sequence of pairs of tensors, but got bool"),
        ([], ValueError, "layer_norms must have as many items as weights, 1, but got 0"),
        ([3], TypeError, r"layer_norms\[0\] must be a sequence of two tensors, but got int"),
        ([(ONES,)], ValueError, r"layer_norms\[0\] must be \(scale_ih, scale_hh\), but got 1 items"),
        ([(None, ONES)], TypeError, r"scale_ih of layer_norms\[0\] must be a Tensor, but got NoneType"),
        ([(ONES, None)], TypeError, r"scale_hh of layer_norms\[0\] must be a Tensor, but got NoneType"),
        ([(ONES[0], ONES)], ValueError, r"scale_ih of .* must have shape \[28\] \(rows of weight_ih\), but got \[\]"),
        ([(ONES[:27], ONES)], ValueError, r"scale_ih of .* must have shape \[28\] .*, but got \[27\]"),
        ([(ONES.expand(3, 28), ONES)], ValueError, r"scale_ih of .* must have shape \[28\] .*, but got \[3, 28\]"),
        ([(ONES.expand(6, 3, 28), ONES)], ValueError, r"must have shape \[28\] .*, but got \[6, 3, 28\]"),
        ([(ONES, ONES[:27])], ValueError, r"scale_hh of layer_norms\[0\] must have shape \[28\]"),
        ([(ONES.double(), ONES)], TypeError, "scale_ih of .* must have the type of weight_ih, .*32, but got .*64"),
        ([(ONES, ONES.double())], TypeError, "scale_hh of .* must have the type of weight_ih, .*32, but got .*64"),
        ([(ONES.to("meta"), ONES)], RuntimeError, f"scale_ih of .* is on meta and weight_ih on {HERE}"),
    ],
)
def test_scales_of_norms(norms: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.lstm(X, (H[:1], H[:1]), [W2], layer_norms=norms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("dropout", ("a", None, True), "must be a float or an int, but got"),
        ("recurrent_dropout", (None, True, torch.tensor(0.5)), "must be a float or an int, but got"),
        ("grad_clip", (1j, True, torch.ones(2)), "must be a float or an int or None, but got"),
        ("truncate", (torch.tensor(2.5), True, 2.0), "must be an int, but got"),
        ("recompute", (torch.tensor(2), True, None), "must be an int, but got"),
        ("generator", (3, "a", torch.tensor([1, 0])), "must be a Generator or None, but got"),
        ("training", ("no", None, 1), "must be a bool, but got"),
        ("bidirectional", ("no", None, 1), "must be a bool, but got"),
        ("batch_first", (None, 1), "must be a bool, but got"),
        ("weights", (None, 3, iter([]), {"a": 1}, {W2[0]}), "must be a sequence of sequences of tensors, but got"),
    ],
)
def test_wrong_types_of_options_are_named(kind: str, name: str, values: tuple[Any, ...], message: str) -> None:
    for value in values:
        arguments = {"input": X, "state": (H[:1], H[:1]) if kind == "LSTM" else H[:1], "weights": [W2], name: value}
        with pytest.raises(TypeError, match=f"^{name} {message} {type(value).__name__}"):
            getattr(functional, kind.lower())(**arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_types_of_the_modules_options_are_named(kind: str) -> None:
    flags = ["layer_norm", "peephole" if kind == "LSTM" else "reset_after"]
    for name, value in [*((f, v) for f in flags for v in ("yes", None, 2)), ("truncate", True), ("recompute", H)]:
        with pytest.raises(TypeError, match=f"{name} must be an? (bool|int), but got {type(value).__name__}"):
            getattr(nn, kind)(5, 7, **{name: value})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": H[0]}, TypeError, r"state must be \(h, c\), two tensors, but got Tensor"),
        ({"state": 3}, TypeError, r"state must be \(h, c\), two tensors, but got int"),
        ({"state": (H[:1], 3)}, TypeError, "c must be a Tensor, but got int"),
        ({"state": (H[:1], H[0])}, ValueError, "Expected c to be 3D, as input is, got 2D"),
        ({"state": (H, H)}, ValueError, r"h must have as many entries as weights, layers \* directions = 1, but got 2"),
        (
            {"state": (H[:1, :2], H[:1, :2])},
            ValueError,
            r"h must have shape \[1, 3, 7\] \(layers \* directions, batch, size\), but got \[1, 2, 7\]",
        ),
        ({"input": X[0, 0]}, ValueError, "lstm: Expected input to be 2D or 3D, got 1D"),
        ({"input": [X]}, TypeError, "input must be a Tensor, but got list"),
        ({"weights": W2}, TypeError, r"weights must be a sequence of sequences .* but weights\[0\] is a Tensor"),
        ({"weights": [W2[:1]]}, ValueError, "each item of weights must be .* but got 1 tensors"),
        ({"weights": [[W2[0], None]]}, TypeError, "weight_hh must be a Tensor, but got NoneType"),
        ({"weights": [[*W2, 1, None]]}, TypeError, "bias_ih must be a Tensor or None, but got int"),
        ({"weights": [[*W2, 1]]}, TypeError, "weight_hr must be a Tensor or None, but got int"),
        ({"weights": [3]}, TypeError, r"weights\[0\] must be a sequence of tensors, but got int"),
        ({"weights": [], "state": (H[:0], H[:0])}, ValueError, "weights must have 1 items a layer, one layer or more"),
        ({"bidirectional": True}, ValueError, "weights must have 2 items a layer"),
        ({"dropout": 1.5}, ValueError, "dropout must be a probability, from 0 to 1, but got 1.5"),
        ({"return_cells": 1}, TypeError, "return_cells must be a bool, but got int"),
        ({"peepholes": 3}, TypeError, "peepholes must be a sequence of tensors, but got int"),
        ({"peepholes": [None]}, TypeError, r"peepholes\[0\] must be a Tensor, but got NoneType"),
        ({"candidate": None}, TypeError, "candidate must be a str, but got NoneType"),
        ({"candidate": "relu"}, ValueError, "candidate must be 'tanh' or 'sigmoid', but got 'relu'"),
        ({"grad_clip": "1"}, TypeError, "grad_clip must be a float or an int or None, but got str"),
        ({"batch_first": "no"}, TypeError, "batch_first must be a bool, but got str"),
    ],
)
def test_errors_of_the_function(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"input": X, "state": (H[:1], H[:1]), "weights": [W2], **change}
    with pytest.raises(error, match=message):
        functional.lstm(**arguments)
    if {"state", "candidate", "return_cells", "peepholes"} & set(change) or "weight_hr" in message or "lstm" in message:
        return
    gru = [
        [w[:21] if isinstance(w, torch.Tensor) else w for w in weight] if isinstance(weight, list) else weight
        for weight in arguments["weights"]
    ]
    with pytest.raises(error, match=message):
        functional.gru(**{**arguments, "state": H[:1], "weights": gru})
