"""Options of nn.LSTM and nn.GRU that torch.nn's lack, through modules and functions."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import convert, functional, nn, reference, revert
from tests.helpers import default_generator, seeded

T, B, F, H = 6, 3, 4, 5
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"layer_norm": True}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"layer_norm": True, "peephole": True, "zoneout": (0.2, 0.1), "recurrent_dropout": 0.3, "truncate": 2}),
    ("LSTM", {"zoneout": 0.25, "recompute": 2}),
    ("GRU", {"layer_norm": True}),
    ("GRU", {"reset_after": False, "zoneout": 0.2, "recurrent_dropout": 0.3}),
    ("GRU", {"truncate": 2, "recompute": 3}),
]


def by_reference(layer: Any, x: Tensor) -> list[Tensor]:
    """A single layer in eval mode, both directions, from the reference's plain steps."""
    outputs, states = [], []
    for ending in layer._endings():
        named = {n[: -len(ending)]: p for n, p in layer.named_parameters() if n.endswith(ending)}
        sums, zoneout = x, layer.zoneout
        if layer.layer_norm:
            scale = named["layer_norm_ih"]
            sums = torch.nn.functional.layer_norm(x @ named["weight_ih"].t(), scale.shape, scale)
        options = {
            "layer_norm": named.get("layer_norm_hh"), "truncate": layer.truncate, "reverse": "reverse" in ending
        }  # fmt: skip
        weights = [None if layer.layer_norm else named["weight_ih"], named["weight_hh"], named["bias_ih"],
                   named["bias_hh"]]  # fmt: skip
        h = x.new_zeros(x.size(1), layer.hidden_size)
        if isinstance(layer, nn.LSTM):
            rate_h, rate_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
            output, state = reference.lstm_layer(
                sums, (h, h), *weights, weight_peephole=named.get("weight_peephole"), zoneout_rate_h=rate_h,
                zoneout_rate_c=rate_c, **options,
            )  # fmt: skip
        else:
            output, last = reference.gru_layer(
                sums, h, *weights, reset_after=layer.reset_after, zoneout_rate_h=zoneout, **options
            )
            state = (last,)
        outputs.append(output)
        states.append(state)
    return [torch.cat(outputs, -1), *(torch.stack(s) for s in zip(*states, strict=True))]


def flat(result: Any) -> list[Tensor]:
    output, state = result
    return [output, *state] if isinstance(state, tuple) else [output, state]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_against_the_reference(name: str, options: dict[str, Any]) -> None:
    layer = getattr(nn, name)(F, H, bidirectional=True, dtype=torch.float64, **options).eval()
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, -1, 1)
    x = torch.randn(T, B, F, dtype=torch.float64, requires_grad=True)
    got, expected = flat(layer(x)), by_reference(layer, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    wanted = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(sum(o.square().sum() for o in outs), wanted) for outs in (got, expected)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_checkpoints_copies_and_layers(name: str, options: dict[str, Any]) -> None:
    layer = getattr(nn, name)(F, H, num_layers=2, **options)
    other = getattr(nn, name)(F, H, num_layers=2, **options)
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(T, B, F)
    results = []
    for module in (layer, other, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        torch.manual_seed(3)
        results.append(flat(module(x)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for option, value in options.items():
        assert f"{option}={value}" in repr(layer)
    _, report = revert(torch.nn.Sequential(layer))
    assert list(report.left) == ["0"] and not report.replaced


def test_masks_are_drawn_in_training_alone_and_repeat_with_the_seed() -> None:
    x = torch.randn(T, B, F)
    for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}):
        for name in ("LSTM", "GRU"):
            layer = getattr(nn, name)(F, H, **options)
            torch.manual_seed(1)
            first, second = layer(x)[0], layer(x)[0]
            torch.manual_seed(1)
            assert torch.equal(layer(x)[0], first) and not torch.equal(first, second)
            layer.eval()
            assert torch.equal(layer(x)[0], layer(x)[0])


def test_frequencies_of_the_masks() -> None:
    units = 64
    weights = [[torch.zeros(3 * units, 2), torch.zeros(3 * units, units)]]
    x, h = torch.zeros(50, 40, 2), torch.ones(1, 40, units)
    # With zero weights a step halves h, where it does not keep it.
    output, _ = functional.gru(x, h, weights, zoneout=0.3, training=True)
    steps = torch.cat([h, output])
    kept = (steps[1:] == steps[:-1]).double()
    assert abs(kept.mean() - 0.3) < 0.01  # five deviations of 128 000 draws
    assert kept.mean(0).std() < 0.1 and kept.mean((1, 2)).std() < 0.05


def test_rates_of_zero_and_one() -> None:
    layer, x = nn.GRU(F, H, zoneout=1.0), torch.randn(T, B, F)
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x)[0], torch.zeros(T, B, H))
    dropped = nn.GRU(F, H, recurrent_dropout=1.0)
    assert dropped(x)[0].isfinite().all()


def test_transforms_with_masks() -> None:
    layer, x = nn.GRU(F, H, zoneout=0.5, recurrent_dropout=0.2), torch.randn(4, T, B, F)
    same = torch.vmap(lambda x: layer(x)[0], randomness="same")(x[:1].expand(3, T, B, F))
    assert torch.equal(same[0], same[1])
    different = torch.vmap(lambda x: layer(x)[0], randomness="different")(x[:1].expand(3, T, B, F))
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: layer(x)[0])(x)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer.eval(), parameters, (x,))[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(4):
        for name, grad in torch.func.grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(each[name][i], grad)


def test_compile_with_options() -> None:
    for name, options in (OPTIONS[2], OPTIONS[5]):
        layer, x = getattr(nn, name)(F, H, **options).eval(), torch.randn(T, B, F, requires_grad=True)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(flat(compiled(x)), flat(layer(x)))
        torch.autograd.grad(compiled(x)[0].sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masks", [{"zoneout": 0.3}, {"recurrent_dropout": 0.4}], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compile_in_training(name: str, masks: dict[str, float], dynamic: bool) -> None:
    torch._dynamo.reset()
    layer, x = getattr(nn, name)(F, H, **masks), torch.randn(T, B, F)
    zeros = torch.zeros(1, B, H)

    def function(x: Tensor) -> Any:
        options: dict[str, Any] = dict(masks)
        if name == "GRU":
            return functional.gru(x, zeros, layer.all_weights, training=True, **options)
        if "zoneout" in options:
            options["zoneout"] = (options["zoneout"], options["zoneout"])
        return functional.lstm(x, (zeros, zeros), layer.all_weights, training=True, **options)

    for call in (layer, function):
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        results = []
        for run in (compiled, call, compiled):
            torch.manual_seed(4)
            outs = flat(run(x))
            results.append([*outs, *torch.autograd.grad(outs[0].square().sum(), list(layer.parameters()))])
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
        assert not torch.equal(compiled(x)[0], results[0][0])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_a_generator_draws_every_mask(name: str) -> None:
    layer, x, zeros = getattr(torch.nn, name.upper())(F, H, 3), torch.randn(T, B, F), torch.zeros(3, B, H)
    state, rates = ((zeros, zeros), (0.2, 0.2)) if name == "lstm" else (zeros, 0.2)
    for options in ({"dropout": 0.5}, {"dropout": 0.5, "zoneout": rates, "recurrent_dropout": 0.3}):

        def run(generator: torch.Generator | None, options: dict[str, Any] = options) -> Tensor:
            function = getattr(functional, name)
            return function(x, state, layer.all_weights, training=True, generator=generator, **options)[0]

        before = default_generator().get_state()
        first, again = (run(seeded(1)) for _ in range(2))
        assert torch.equal(first, again) and not torch.equal(run(seeded(2)), first)
        assert torch.equal(default_generator().get_state(), before)  # torch's own is not touched
        run(None)
        assert not torch.equal(default_generator().get_state(), before)


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_frequencies_of_dropout_from_a_generator(rate: float) -> None:
    """One step without recurrent weights: the second layer's unit i sees unit i of the first alone, or zero."""
    units, rows = 50, 30
    first = [torch.randn(3 * units, 2), torch.zeros(3 * units, units)]
    x, h = torch.randn(1, rows, 2), torch.zeros(2, rows, units)

    def run(scale: float, **options: Any) -> Tensor:
        second = [torch.eye(units).repeat(3, 1) * scale, torch.zeros(3 * units, units)]
        return functional.gru(x, h, [first, second], **options)[0]

    got = run(1.0, dropout=rate, training=True, generator=seeded(1))
    dropped = got == 0
    assert abs(dropped.double().mean() - rate) < 0.06  # five deviations of 1500 draws
    if rate < 1:
        torch.testing.assert_close(got, run(1 / (1 - rate)).masked_fill(dropped, 0))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("LSTM", {"zoneout": 1.5}, ValueError, "zoneout of h must be a probability"),
        ("LSTM", {"zoneout": (0.1, -1)}, ValueError, "zoneout of c must be a probability"),
        ("LSTM", {"recurrent_dropout": "x"}, TypeError, "recurrent_dropout must be a float or an int, but got str"),
        ("LSTM", {"truncate": -1}, ValueError, "truncate must be a number of steps"),
        ("GRU", {"recompute": 1.5}, TypeError, "recompute must be an int, but got float"),
        ("GRU", {"layer_norm": True, "reset_after": False}, ValueError, "layer_norm needs reset_after=True"),
    ],
)
def test_errors(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(nn, name)(F, H, **options)


def test_errors_of_the_functions() -> None:
    x, h, weights = torch.zeros(T, B, F), torch.zeros(1, B, H), nn.LSTM(F, H).all_weights
    with pytest.raises(ValueError, match="peepholes must have as many items as weights, 1, but got 2"):
        functional.lstm(x, (h, h), weights, peepholes=[h, h])
    with pytest.raises(TypeError, match="zoneout must be two probabilities"):
        functional.lstm(x, (h, h), weights, zoneout=0.1)  # type: ignore[arg-type]


def test_convert_leaves_nothing_of_the_options_behind() -> None:
    model = torch.nn.Sequential(torch.nn.GRU(F, H))
    convert(model)
    x = torch.randn(T, B, F)
    expected = model[0](x)[0]
    revert(model)
    torch.testing.assert_close(model[0](x)[0], expected)
