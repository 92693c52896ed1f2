"""What convert and revert leave as it was, and why; what they refuse, and their report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.utils import parametrizations

import lect11ext
from lect11ext import convert, nn, revert
from lect11ext.convert import Report
from tests.common.test_convert import BOTH_WAYS, EVERY_PAIR, Tagger, input_of


def reason(model: torch.nn.Module, exchange: Callable[..., Any] = convert, name: str = "") -> str:
    """Why the one module that is left was."""
    before = type(model.get_submodule(name))
    same, report = exchange(model)
    assert same is model and type(model.get_submodule(name)) is before
    assert list(report.left) == [name] and name not in report.replaced
    return report.left[name]


class OwnLSTM(torch.nn.LSTM):
    pass


class OwnCell(nn.GRUCell):
    pass


class LSTM(torch.nn.Module):
    """Nothing but the name."""


@pytest.mark.parametrize("module", [torch.nn.RNN(3, 4), torch.nn.RNNCell(3, 4)], ids=lambda m: type(m).__name__)
def test_plain_recurrent_modules_are_left(module: torch.nn.Module) -> None:
    _, report = convert(torch.nn.Sequential(module))
    assert not report.replaced and "nothing like torch.nn." in report.left["0"]


def test_subclasses_are_left() -> None:
    expected = "tests.common.test_convert_left.OwnLSTM derives from torch.nn.LSTM, and what it adds would be lost"
    assert reason(OwnLSTM(5, 4)) == expected
    assert reason(torch.nn.Sequential(torch.nn.Linear(2, 2), OwnLSTM(5, 4)), name="1") == expected
    assert "OwnLSTM derives from" in reason(parametrizations.weight_norm(OwnLSTM(5, 4), "weight_ih_l0"))
    assert "OwnCell derives from lect11ext.nn.GRUCell, and" in reason(OwnCell(5, 4), revert)
    assert convert(LSTM())[1] == revert(LSTM())[1] == Report()
    assert convert(OwnCell(5, 4))[1] == revert(OwnLSTM(5, 4))[1] == Report()


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:torch.quantize_per", "ignore:.*deprecated")
def test_quantized_and_scripted_modules_are_left() -> None:
    dynamic = torch.ao.nn.quantized.dynamic
    assert reason(dynamic.GRUCell(5, 4)) == (
        "lect11ext has nothing like torch.ao.nn.quantized.dynamic.modules.rnn.GRUCell"
    )
    assert "nothing like torch.ao.nn.quantized" in reason(torch.nn.ModuleList([dynamic.LSTM(5, 4)]), name="0")
    scripted = torch.nn.Sequential(torch.jit.script(torch.nn.GRU(5, 4)), torch.jit.script(torch.nn.Linear(5, 4)))
    assert reason(scripted, name="0") == "a scripted GRU keeps its code"


@EVERY_PAIR
def test_replaced_methods_are_left(torchs: Any, ours: Any) -> None:
    for cls, exchange in ((torchs, convert), (ours, revert)):
        module = cls(5, 4)
        module.forward = lambda *args: "mine"
        assert reason(module, exchange) == "forward was set on this module itself, from outside its class"
        assert module(input_of(module)) == "mine"
    module = torchs(5, 4)
    module.grad_clip = 3
    assert reason(module) == "grad_clip was set on this module itself, from outside its class"


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_types_without_a_kernel_are_left() -> None:
    assert reason(torch.nn.LSTM(5, 4).to(torch.complex64)) == "lect11ext.nn.LSTM does not take torch.complex64"


@EVERY_PAIR
def test_parameters_of_several_types_are_left(torchs: Any, ours: Any) -> None:
    module = torchs(5, 4)
    next(module.parameters()).data = next(module.parameters()).data.double()
    expected = f"lect11ext.nn.{ours.__name__} takes parameters of one type, not of torch.float32 and torch.float64"
    assert reason(module) == expected


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (nn.LSTMCell(5, 4, candidate="sigmoid"), "candidate='sigmoid'"),
        (nn.LSTM(5, 4, candidate="sigmoid", grad_clip=1.0), "candidate='sigmoid', grad_clip=1.0"),
        (nn.GRUCell(5, 4, reset_after=False), "reset_after=False"),
        (nn.GRU(5, 4, grad_clip=0), "grad_clip=0"),
    ],
)
def test_what_torch_lacks_is_left(module: torch.nn.Module, options: str) -> None:
    model = torch.nn.Sequential(module, nn.GRU(5, 4))
    _, report = revert(model)
    assert report.left == {"0": f"torch.nn.{type(module).__name__} has no {options}"}
    assert report.replaced == {"1": "torch.nn.GRU"} and type(model[1]) is torch.nn.GRU
    assert reason(nn.GaussianLatent(5, 4), revert) == "torch.nn has nothing like lect11ext.nn.GaussianLatent"


def test_a_pair_of_defaults_is_no_option() -> None:
    layer = nn.LSTM(5, 4, zoneout=(0.0, 0.0))
    assert revert(layer)[1].replaced == {"": "torch.nn.LSTM"} and type(layer) is torch.nn.LSTM
    assert reason(nn.LSTM(5, 4, zoneout=(0.0, 0.1)), revert) == "torch.nn.LSTM has no zoneout=(0.0, 0.1)"


@BOTH_WAYS
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_is_no_model_is_refused(exchange: Callable[..., Any]) -> None:
    cases = [
        (None, "model must be a torch.nn.Module, but got NoneType"),
        (torch.nn.LSTM(5, 4).state_dict(), "model must be a torch.nn.Module, but got OrderedDict"),
        (torch.nn.LSTM, "model must be a torch.nn.Module, but got the class LSTM"),
        (torch.compile(Tagger()), "model must be as it was before torch.compile, but got a compiled one: compile it"),
        (
            torch.jit.script(torch.nn.GRUCell(5, 4)),
            "model must be as it was before torch.jit, but got a RecursiveScript",
        ),
    ]
    for value, message in cases:
        with pytest.raises(TypeError, match=message):
            exchange(value)


def test_the_report_reads_well() -> None:
    assert str(convert(torch.nn.Linear(2, 2))[1]) == "replaced: 0\nleft: 0"
    assert str(convert(OwnLSTM(5, 4))[1]).startswith("replaced: 0\nleft: 1\n  (the model itself): tests.common.")
    lines = str(convert(Tagger())[1]).splitlines()
    assert lines[:2] == ["replaced: 4", "  encoder: lect11ext.nn.LSTM"] and lines[-1] == "left: 0"
    assert lect11ext.convert is convert and lect11ext.revert is revert
