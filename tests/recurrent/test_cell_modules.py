"""The modules as drop-ins: checkpoints, initialisation, missing states, prepacking, errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from lect11ext import functional, nn
from tests.helpers import flat

PAIRS = [(nn.LSTMCell, torch.nn.LSTMCell), (nn.GRUCell, torch.nn.GRUCell)]


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_round_trip_and_initialisation(ours: Any, torchs: Any, bias: bool) -> None:
    torch.manual_seed(3)
    a = ours(5, 7, bias)
    torch.manual_seed(3)
    b = torchs(5, 7, bias)
    assert list(a.state_dict()) == list(b.state_dict())
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    other = ours(5, 7, bias)
    other.load_state_dict(b.state_dict(), strict=True)
    torchs(5, 7, bias).load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(4, 5)
    for p, q in zip(flat(other(x)), flat(b(x)), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_unbatched_and_missing_state(ours: Any, torchs: Any) -> None:
    cell = ours(5, 7)
    like = torchs(5, 7)
    like.load_state_dict(cell.state_dict())
    x = torch.randn(5)
    for p, q in zip(flat(cell(x)), flat(like(x)), strict=True):
        assert p.shape == (7,)
        torch.testing.assert_close(p, q)
    state = torch.randn(7)
    hx = (state, state) if ours is nn.LSTMCell else state
    for p, q in zip(flat(cell(x, hx)), flat(like(x, hx)), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_copies_and_repr(ours: Any, torchs: Any) -> None:
    cell = ours(5, 7, grad_clip=2.0)
    x = torch.randn(3, 5)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert all(torch.equal(a, b) for a, b in zip(flat(cell(x)), flat(other(x)), strict=True))
    assert repr(cell) == f"{ours.__name__}(5, 7, grad_clip=2.0)"
    assert repr(ours(5, 7)) == repr(torchs(5, 7))


def test_keyword_arguments_reach_the_function() -> None:
    x = torch.randn(3, 5)
    cell = nn.LSTMCell(5, 7, candidate="sigmoid")
    zeros = torch.zeros(3, 7)
    expected = functional.lstm_cell(x, (zeros, zeros), *cell.parameters(), candidate="sigmoid")
    assert torch.equal(cell(x)[0], expected[0])
    gru = nn.GRUCell(5, 7, reset_after=False)
    assert torch.equal(gru(x, zeros + 1), functional.gru_cell(x, zeros + 1, *gru.parameters(), reset_after=False))
    assert not torch.equal(gru(x, zeros + 1), functional.gru_cell(x, zeros + 1, *gru.parameters()))


def test_parametrised_weights() -> None:
    cell = nn.LSTMCell(5, 7)
    x, before = torch.randn(3, 5), cell.weight_ih.detach().clone()
    torch.nn.utils.parametrizations.weight_norm(cell, "weight_ih")
    torch.testing.assert_close(cell.weight_ih, before)
    cell(x)[0].sum().backward()
    assert cell.parametrizations.weight_ih.original0.grad is not None


def test_functional_call_replaces_the_weights() -> None:
    cell, x = nn.GRUCell(5, 7), torch.randn(1, 5)
    zeros = {name: torch.zeros_like(p) for name, p in cell.named_parameters()}
    with torch.no_grad():
        cell.prepack()
        assert torch.equal(torch.func.functional_call(cell, zeros, (x,)), torch.zeros(1, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda *a, **k: nn.LSTMCell(*a, **k),
        lambda *a, **k: nn.GRUCell(*a, **k),
        lambda *a, **k: nn.GRUCell(*a, reset_after=False, **k),
    ],
)
@pytest.mark.parametrize("sizes", [(5, 7), (33, 70), (64, 64)])
def test_prepack(make: Any, dtype: torch.dtype, sizes: tuple[int, int], capability: str) -> None:
    cell = make(*sizes, dtype=dtype)
    x = torch.randn(1, sizes[0]).to(dtype)
    with torch.no_grad():
        plain = flat(cell(x))
        packed = flat(cell.prepack()(x))
    assert (cell._packed is not None) == (dtype != torch.bfloat16)
    for a, b in zip(plain, packed, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 6, 7, 20])
def test_packed_ops_for_every_batch(batch: int, capability: str) -> None:
    for cell, op in ((nn.LSTMCell(9, 21), "lstm_cell_packed"), (nn.GRUCell(9, 21), "gru_cell_packed")):
        x, state = torch.randn(batch, 9), torch.randn(batch, 21)
        states = (state, state) if isinstance(cell, nn.LSTMCell) else (state,)
        last = "tanh" if isinstance(cell, nn.LSTMCell) else True
        with torch.no_grad():
            expected = flat(cell(x, states if len(states) == 2 else state))
            packed = cell.prepack()._packed
            got = flat(getattr(torch.ops.lect11ext, op)(x, *states, *packed, cell.bias_ih, cell.bias_hh, last))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_what_undoes_prepack() -> None:
    x = torch.randn(1, 5)

    def packed() -> nn.LSTMCell:
        return nn.LSTMCell(5, 7).eval().prepack()

    assert packed().train()._packed is None
    assert packed().double()._packed is None
    assert copy.deepcopy(packed())._packed is None
    assert pickle.loads(pickle.dumps(packed()))._packed is None
    cell = packed()
    cell.load_state_dict(nn.LSTMCell(5, 7).state_dict())
    assert cell._packed is None
    cell = packed()
    cell.weight_hh = torch.nn.Parameter(torch.zeros(28, 7))
    with torch.no_grad():
        fresh = nn.LSTMCell(5, 7)
        fresh.load_state_dict(cell.state_dict())
        assert torch.equal(cell(x)[0], fresh(x)[0])
    cell = packed()
    cell(x)[0].sum().backward()  # grad is on: the packed copy is not used
    assert cell.weight_ih.grad is not None


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
    with pytest.raises(TypeError, match="reset_after must be a bool, but got str"):
        functional.gru_cell(X, H, W[:21], U[:21], reset_after="no")  # type: ignore[arg-type]


def test_errors_of_options() -> None:
    with pytest.raises(ValueError, match="candidate must be 'tanh' or 'sigmoid', but got 'relu'"):
        functional.lstm_cell(X, (H, H), W, U, candidate="relu")
    with pytest.raises(ValueError, match="candidate must be 'tanh' or 'sigmoid'"):
        nn.LSTMCell(5, 7, candidate="relu")
    with pytest.raises(ValueError, match="grad_clip must be nonnegative, but got -1"):
        functional.lstm_cell(X, (H, H), W, U, grad_clip=-1.0)
    with pytest.raises(ValueError, match="grad_clip must be nonnegative"):
        functional.gru_cell(X, H, W[:21], U[:21], grad_clip=float("nan"))
