"""nn.LSTM and nn.GRU as drop-ins: every argument of torch.nn's, packed sequences, masks of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lect11ext import functional, nn
from tests.helpers import HERE, ONE_STEP, check

KINDS = ["LSTM", "GRU"]
T, B, F, H = 5, 3, 4, 6


def make(kind: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """Our layer and torch.nn's with the same weights."""
    ours, torchs = (getattr(place, kind)(*(sizes or (F, H)), **options) for place in (nn, torch.nn))
    torchs.load_state_dict(ours.state_dict(), strict=True)
    return ours, torchs


def pack_states(states: tuple[Tensor, ...]) -> Any:
    return states if len(states) == 2 else states[0]


def flat(result: Any) -> list[Tensor]:
    """Output, of a packed one its data, and states."""
    output, states = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *states] if isinstance(states, tuple) else [output, states]


def plain(layer: Any, x: Any, hx: Any) -> Any:
    return layer(x, hx)


def dense(states: Iterable[Tensor]) -> Any:
    """As torch.nn needs them where it is cuDNN; ours takes any strides."""
    return pack_states(tuple(s.contiguous() for s in states))


def states_of(layer: Any, batch: int = B, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    entries = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
    return [(torch.randn(entries, batch, size) * 0.5).to(dtype).requires_grad_() for size in sizes]


def as_function(layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call(layer, input, hx)`` as a function of input, states and parameters."""
    names = [name for name, _ in layer.named_parameters()]

    class Calls(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, hx: Any) -> list[Tensor]:
            return flat(call(self.layer, x, hx))

    def function(x: Tensor, *rest: Tensor) -> list[Tensor]:
        states, weights = rest[: -len(names)], rest[-len(names) :]
        parameters = {f"layer.{name}": w for name, w in zip(names, weights, strict=True)}
        return torch.func.functional_call(Calls(), parameters, (x, pack_states(states) if states else None))

    return function


def compare(
    ours: Any,
    torchs: Any,
    x: Tensor,
    states: list[Tensor],
    call: Callable[..., Any] = plain,
    reference: Callable[..., Any] | None = None,
) -> None:
    """Outputs, states and all gradients by the rule, with a step's room: torch.nn's errors add up alike."""
    weights = [w.detach().requires_grad_() for w in torchs.parameters()]
    functions = as_function(ours, call), as_function(torchs, reference or call)
    check(*functions, [x, *states, *weights], ONE_STEP)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_argument(kind: str, bidirectional: bool, layers: int, dtype: torch.dtype) -> None:
    for bias, batch_first, proj in itertools.product([True, False], [False, True], [0, 3] if kind == "LSTM" else [0]):
        options: dict[str, Any] = {"proj_size": proj} if proj else {}
        ours, torchs = make(
            kind, F, H, layers, bias, batch_first=batch_first, bidirectional=bidirectional, dtype=dtype, **options
        )
        x = torch.randn((B, T, F) if batch_first else (T, B, F)).to(dtype).requires_grad_()
        states = states_of(ours, dtype=dtype)
        compare(ours, torchs, x, states)
        missing, zeros = ours(x), ours(x, pack_states(tuple(torch.zeros_like(s) for s in states)))
        assert all(torch.equal(a, b) for a, b in zip(flat(missing), flat(zeros), strict=True))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_unbatched(kind: str, batch_first: bool) -> None:
    ours, torchs = make(kind, F, H, 2, batch_first=batch_first, bidirectional=True)

    def with_dense_states(layer: Any, x: Tensor, hx: Any) -> Any:
        return layer(x, hx if hx is None else dense(hx if isinstance(hx, tuple) else (hx,)))

    x = torch.randn(T, F, requires_grad=True)
    for states in ([], [s.detach()[:, 0].requires_grad_() for s in states_of(ours)]):
        compare(ours, torchs, x, states, plain, with_dense_states)


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_and_no_rows(kind: str) -> None:
    ours, torchs = make(kind, F, H, 2, bidirectional=True)
    for x in (torch.randn(T, 0, F), torch.randn(0, B, F)):
        states = [s.detach() for s in states_of(ours, x.size(1))]
        output, *last = flat(ours(x, pack_states(tuple(states))))
        assert output.shape == (*x.shape[:2], 2 * H)
        assert [s.shape for s in last] == [s.shape for s in states]
    assert all(torch.equal(a, b) for a, b in zip(last, states, strict=True))  # no step: the state as it was
    if HERE == "cpu":  # the one place where torch.nn refuses what we take, in cuDNN's words on a GPU
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            torchs(torch.randn(0, B, F))


@pytest.mark.cpu  # cuDNN draws otherwise
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_draws_torchs_mask(kind: str, bidirectional: bool, batch_first: bool) -> None:
    """torch.nn draws for ``[T, B, H]`` of every layer but the last, whatever comes first, and so does ours."""
    ours, torchs = make(kind, F, H, 3, dropout=0.4, bidirectional=bidirectional, batch_first=batch_first)
    x = torch.randn(B, T, F) if batch_first else torch.randn(T, B, F)
    for training in (True, False):
        results = []
        for layer in (ours.train(training), torchs.train(training)):
            torch.manual_seed(5)
            results.append(layer(x)[0])
        torch.testing.assert_close(*results)
    torch.manual_seed(6)
    assert not torch.allclose(ours.train()(x)[0], results[0], atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_statistic(kind: str, packed: bool) -> None:
    """With one hidden unit and one step the second layer sees 0 or h / (1 - p), and its output tells which."""
    rows, p = 4000, 0.3
    layer = getattr(nn, kind)(1, 1, 2, batch_first=True, dropout=p)
    x = torch.ones(rows, 1, 1)
    output = layer(pack_padded_sequence(x, torch.ones(rows).cpu(), batch_first=True) if packed else x)[0]
    values, counts = (output.data if packed else output).flatten().round(decimals=5).unique(return_counts=True)
    first = functional_layer(layer, 0, torch.ones(1, 1, 1))
    expected = [functional_layer(layer, 1, v).item() for v in (torch.zeros(1, 1, 1), first / (1 - p))]
    torch.testing.assert_close(sorted(values.tolist()), sorted(expected), rtol=0, atol=1e-4)  # of the rounding
    dropped = counts[(values - expected[0]).abs().argmin()].item()
    assert abs(dropped - p * rows) < 5 * (rows * p * (1 - p)) ** 0.5  # five standard deviations


def functional_layer(layer: Any, index: int, x: Tensor) -> Tensor:
    zeros = (torch.zeros(1, 1, 1),) * (2 if isinstance(layer, nn.LSTM) else 1)
    function = functional.lstm if isinstance(layer, nn.LSTM) else functional.gru
    return function(x, pack_states(zeros), [layer.all_weights[index]])[0].detach()


ORDERS = {"sorted": [5, 3, 3], "unsorted": [2, 5, 3], "ones": [1, 1, 1]}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str, order: str, batch_first: bool) -> None:
    ours, torchs = make(kind, F, H, 2, batch_first=batch_first, bidirectional=True)
    lengths = torch.tensor(ORDERS[order])

    def call(layer: Any, x: Tensor, hx: Any) -> Any:
        return layer(pack_padded_sequence(x, lengths.cpu(), batch_first, enforce_sorted=order != "unsorted"), hx)

    x = torch.randn((B, T, F) if batch_first else (T, B, F), requires_grad=True)
    for states in ([], states_of(ours)):
        compare(ours, torchs, x, states, call)
    packed, expected = call(ours, x, None)[0], call(torchs, x, None)[0]
    assert torch.equal(packed.batch_sizes, expected.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(packed, name), getattr(expected, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    padded, their_lengths = pad_packed_sequence(packed, batch_first)
    assert torch.equal(their_lengths, lengths.cpu())
    steps = int(lengths.max())
    by_lengths = ours(x[:, :steps] if batch_first else x[:steps], lengths=lengths)[0]
    torch.testing.assert_close(padded, by_lengths)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "proj"), [("LSTM", 0), ("GRU", 0), ("LSTM", 3)])
def test_lengths_against_packed_torch(kind: str, proj: int, batch_first: bool) -> None:
    options = {"proj_size": proj} if proj else {}
    ours, torchs = make(kind, F, H, 2, batch_first=batch_first, bidirectional=True, **options)
    lengths = torch.tensor([2, 0, 5, 1, 0, 3])
    kept = lengths.nonzero().flatten()

    def packed(layer: Any, x: Tensor, hx: Any) -> Any:
        """torch.nn takes no row of no steps: its output is zero, and its state as it was."""
        states = hx if isinstance(hx, tuple) else (hx,)
        x = x.transpose(0, 1) if layer.batch_first else x
        layer.batch_first = False
        sequence = pack_padded_sequence(x[:, kept], lengths[kept].cpu(), enforce_sorted=False)
        output, last = layer(sequence, pack_states(tuple(s[:, kept] for s in states)))
        layer.batch_first = batch_first
        padded = pad_packed_sequence(output, total_length=T)[0]
        full = x.new_zeros(T, len(lengths), padded.size(-1)).index_copy(1, kept, padded)
        last = last if isinstance(last, tuple) else (last,)
        merged = tuple(s.index_copy(1, kept, new) for s, new in zip(states, last, strict=True))
        return full.transpose(0, 1) if batch_first else full, pack_states(merged)

    x = torch.randn(T, len(lengths), F)
    x[torch.arange(T)[:, None] >= lengths] = torch.nan
    x = (x.transpose(0, 1) if batch_first else x).contiguous().requires_grad_()
    compare(ours, torchs, x, states_of(ours, len(lengths)), lambda layer, x, hx: layer(x, hx, lengths=lengths), packed)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "options"), [("LSTM", {"proj_size": 3}), ("LSTM", {"layer_norm": True}),
                                               ("GRU", {"layer_norm": True})], ids=str)  # fmt: skip
def test_what_stands_beyond_the_lengths_is_not_used(kind: str, options: dict[str, Any], batch_first: bool) -> None:
    layer = getattr(nn, kind)(F, H, 2, bidirectional=True, batch_first=batch_first, **options)
    lengths, results = torch.tensor([2, 0, 5]), []
    beyond = (torch.arange(T)[:, None] >= lengths)[..., None]
    clean = torch.randn(T, B, F)
    for fill in (0.0, torch.nan, torch.inf):
        x = clean.masked_fill(beyond, fill)
        x = (x.transpose(0, 1) if batch_first else x).requires_grad_()
        outs = flat(layer(x, lengths=lengths))
        results.append([*outs, *torch.autograd.grad(sum(o.sum() for o in outs), [x, *layer.parameters()])])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def in_episodes(layer: Any, x: Tensor, states: tuple[Tensor, ...], reset: Tensor) -> Any:
    """Row by row, cut where ``reset`` is True; every piece but the first begins with zeros, as does a reset first."""
    outputs, last = [], []
    for row in range(x.size(1)):
        starts = [0, *[t for t in range(1, x.size(0)) if reset[t, row]], x.size(0)]
        hx = None if reset[0, row] else dense(s[:, row] for s in states)
        pieces = []
        for begin, end in itertools.pairwise(starts):
            output, final = layer(x[begin:end, row], hx)
            pieces.append(output)
            hx = None
        outputs.append(torch.cat(pieces))
        last.append(final if isinstance(final, tuple) else (final,))
    return torch.stack(outputs, 1), pack_states(tuple(torch.stack(s, 1) for s in zip(*last, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_reset_against_episodes(kind: str) -> None:
    ours, torchs = make(kind, F, H, 2)
    reset = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 1]]).bool()

    def episodes(layer: Any, x: Tensor, hx: Any) -> Any:
        return in_episodes(layer, x, hx if isinstance(hx, tuple) else (hx,), reset)

    x = torch.randn(T, B, F, requires_grad=True)
    compare(ours, torchs, x, states_of(ours), lambda layer, x, hx: layer(x, hx, reset=reset), episodes)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_of_both_directions(kind: str) -> None:
    """The reverse direction is the forward one over everything turned round."""
    ours = getattr(nn, kind)(F, H, bidirectional=True, batch_first=True)
    x, reset = torch.randn(B, T, F), torch.rand(B, T) < 0.4
    states = tuple(s.detach() for s in states_of(ours))
    output, *last = flat(ours(x, pack_states(states), reset=reset))
    for direction, suffix in enumerate(("", "_reverse")):
        torchs = getattr(torch.nn, kind)(F, H)
        weights = {name: ours.state_dict()[name + suffix] for name in torchs.state_dict()}
        torchs.load_state_dict(weights)
        turn: Callable[[Tensor], Tensor] = (lambda t: t.flip(0)) if direction else (lambda t: t)
        own = tuple(s[direction : direction + 1] for s in states)
        expected, *final = flat(in_episodes(torchs, turn(x.transpose(0, 1)), own, turn(reset.t())))
        torch.testing.assert_close(output[..., direction * H : (direction + 1) * H], turn(expected).transpose(0, 1))
        for a, b in zip(last, final, strict=True):
            torch.testing.assert_close(a[direction], b[0])


@pytest.mark.parametrize("kind", KINDS)
def test_state_carried_between_calls(kind: str) -> None:
    ours = getattr(nn, kind)(F, H, 2)
    x = torch.randn(12, B, F)
    expected = flat(ours(x))
    outputs, hx = [], None
    for piece in x.split([1, 4, 0, 7]):
        output, hx = ours(piece, hx)
        outputs.append(output)
    for a, b in zip(flat((torch.cat(outputs), hx)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_in_eval(kind: str) -> None:
    ours = getattr(nn, kind)(F, H, 2, bidirectional=True)
    x = torch.randn(T, B, F)
    grads = []
    for training in (True, False):
        grads.append(torch.autograd.grad(ours.train(training)(x)[0].square().sum(), list(ours.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_options_reach_the_function() -> None:
    x = torch.randn(T, B, F)
    zeros = torch.zeros(1, B, H)
    lstm = nn.LSTM(F, H, candidate="sigmoid", grad_clip=1e-3)
    got = lstm(x)[0]
    expected = functional.lstm(x, (zeros, zeros), lstm.all_weights, candidate="sigmoid", grad_clip=1e-3)[0]
    assert torch.equal(got, expected)
    assert not torch.allclose(got, functional.lstm(x, (zeros, zeros), lstm.all_weights)[0])
    gru = nn.GRU(F, H, grad_clip=1e-3)
    for layer in (lstm, gru):
        clipped = torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0)[0]
        layer.grad_clip = None
        assert clipped.abs().max() < 0.1 * torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0)[0].abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_repr(kind: str) -> None:
    for options in ({}, {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}):
        assert repr(getattr(nn, kind)(F, H, **options)) == repr(getattr(torch.nn, kind)(F, H, **options))
    assert repr(getattr(nn, kind)(F, H, 2, grad_clip=2.0)) == f"{kind}(4, 6, num_layers=2, grad_clip=2.0)"
    assert repr(nn.LSTM(F, H, proj_size=3, candidate="sigmoid")) == "LSTM(4, 6, proj_size=3, candidate='sigmoid')"
