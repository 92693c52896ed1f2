"""Whole models from torch.nn's modules to lect11ext's, and back."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

from lect11ext import convert, nn, revert
from lect11ext.convert import Report
from tests.helpers import assert_within_rule, flat

PAIRS = [
    (torch.nn.LSTM, nn.LSTM),
    (torch.nn.GRU, nn.GRU),
    (torch.nn.LSTMCell, nn.LSTMCell),
    (torch.nn.GRUCell, nn.GRUCell),
]
BOTH_WAYS = pytest.mark.parametrize("exchange", [convert, revert])
EVERY_PAIR = pytest.mark.parametrize(("torchs", "ours"), PAIRS, ids=lambda c: c.__name__)


class Tagger(torch.nn.Module):
    """Recurrent modules at several depths, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 5)
        self.encoder = torch.nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3)
        self.stack = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.ModuleDict())
        self.stack[2]["gru"] = torch.nn.GRU(6, 6)
        self.cells = torch.nn.ModuleList([torch.nn.LSTMCell(6, 6), torch.nn.Identity(), torch.nn.GRUCell(6, 6)])
        self.again = self.cells[2]
        self.outside = [self.encoder]  # not registered: only a reference

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.outside[0](self.embedding(tokens))
        x, _ = self.stack[2]["gru"](self.stack[1](self.stack[0](x)))
        h, _ = self.cells[0](x[-1])
        return self.again(self.cells[2](h), h)


REPLACED = {"encoder": "LSTM", "stack.2.gru": "GRU", "cells.0": "LSTMCell", "cells.2": "GRUCell"}
TOKENS = torch.arange(44).view(11, 4) % 11


def flat_all(out: Any) -> list[Tensor]:
    return [t for o in flat(out) for t in flat(o)]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(flat_all(a), flat_all(b))


def gradients(model: torch.nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def input_of(module: Any) -> Tensor:
    return torch.randn(*(() if "Cell" in type(module).__name__ else (7,)), 3, module.input_size)


def test_a_model_is_converted_and_reverted() -> None:
    model = Tagger()
    plain = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = plain(TOKENS)
    expected.sum().backward()
    for exchange, package in ((convert, "lect11ext.nn"), (revert, "torch.nn")):
        same, report = exchange(model)
        assert same is model
        assert report == Report({name: f"{package}.{cls}" for name, cls in REPLACED.items()}, {})
        assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in plain.modules()]
        assert model.cells[2] is model.again and model.outside[0] is model.encoder
        assert list(model.stack[2]) == ["gru"] and len(model.stack) == 3 and len(model.cells) == 3
        assert dict(model.named_parameters()).keys() == tensors.keys()
        assert all(p is tensors[name] for name, p in model.named_parameters())
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert repr(model) == repr(plain)
        model.zero_grad()
        out = model(TOKENS)
        close(out, expected)
        out.sum().backward()
        for got, want in zip(gradients(model), gradients(plain), strict=True):
            torch.testing.assert_close(got, want)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(hasattr(m, "grad_clip") for m in model.modules())


@EVERY_PAIR
def test_a_module_becomes_what_the_constructor_makes(torchs: Any, ours: Any) -> None:
    """Whatever a constructor sets is there, and nothing else: new options cannot be forgotten."""

    def state(module: torch.nn.Module) -> set[str]:
        return {n for n, value in vars(module).items() if getattr(type(module), n, module) is not value}

    module, made, plain = torchs(5, 4), ours(5, 4), torchs(5, 4)
    assert state(convert(module)[0]) == state(made)
    for name in inspect.signature(ours).parameters.keys() & vars(made).keys():
        assert getattr(module, name) == getattr(made, name), name
    assert vars(revert(module)[0]).keys() == vars(revert(made)[0]).keys() == vars(plain).keys()


@EVERY_PAIR
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_model_may_be_such_a_module(torchs: Any, ours: Any, bias: bool, dtype: torch.dtype) -> None:
    module = torchs(5, 4, bias=bias, dtype=dtype).eval().requires_grad_(False)
    x = input_of(module).to(dtype)
    before, exact = module(x), copy.deepcopy(module).double()(x.double())
    converted, report = convert(module)
    assert converted is module and type(converted) is ours and isinstance(converted, ours)
    assert report == Report({"": f"lect11ext.nn.{ours.__name__}"}, {})
    assert not converted.training and not any(p.requires_grad for p in converted.parameters())
    for triple in zip(flat_all(converted(x)), flat_all(before), flat_all(exact), strict=True):
        assert_within_rule(*triple)
    reverted, report = revert(converted)
    assert type(reverted) is torchs and report == Report({"": f"torch.nn.{torchs.__name__}"}, {})
    assert not reverted.training
    assert all(torch.equal(a, b) for a, b in zip(flat_all(module(x)), flat_all(before), strict=True))


def test_every_option_of_a_layer_is_kept() -> None:
    options = {"num_layers": 3, "bias": False, "batch_first": True, "dropout": 0.5, "bidirectional": True}
    for module in (torch.nn.LSTM(5, 4, proj_size=2, **options), torch.nn.GRU(5, 4, **options)):
        written = repr(module)
        x = torch.randn(3, 7, 5)
        before = module.eval()(x)
        convert(module)
        close(module(x), before)
        assert repr(module) == written
        assert revert(module)[0].train().dropout == 0.5 and repr(module) == written


@BOTH_WAYS
def test_what_is_there_already_is_not_mentioned(exchange: Callable[..., Any]) -> None:
    model = exchange(Tagger())[0]
    assert exchange(model)[1] == Report()
    assert exchange(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv1d(2, 2, 1), torch.nn.LazyLinear(2)))[
        1
    ] == (Report())


def test_hooks_stay_and_their_handles_work() -> None:
    model = torch.nn.Sequential(torch.nn.LSTMCell(5, 4))
    cell: Any = model[0]
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: called.append(f"{name} {type(args[0]).__module__.partition('.')[0]}")

    handles = [
        cell.register_forward_pre_hook(note("forward pre")),
        cell.register_forward_hook(note("forward"), with_kwargs=True, always_call=True),
        cell.register_full_backward_pre_hook(note("backward pre")),
        cell.register_full_backward_hook(note("backward")),
        cell.register_state_dict_pre_hook(note("state_dict pre")),
        cell.register_state_dict_post_hook(note("state_dict post")),
        cell.register_load_state_dict_pre_hook(note("load pre")),
        cell.register_load_state_dict_post_hook(note("load post")),
    ]
    for exchange, package in ((convert, "lect11ext"), (revert, "torch")):
        exchange(model)
        called.clear()
        sum(model(torch.randn(3, 5, requires_grad=True))).sum().backward()
        model.load_state_dict(model.state_dict())
        names = ["forward pre", "forward", "backward pre", "backward"]
        names += ["state_dict pre", "state_dict post", "load pre", "load post"]
        assert called == [f"{name} {package}" for name in names]
    convert(model)
    for handle in handles:
        handle.remove()
    called.clear()
    model.load_state_dict(model.state_dict())
    sum(model(torch.randn(3, 5, requires_grad=True))).sum().backward()
    assert not called


def test_optimizers_keep_stepping() -> None:
    """Half of the steps before the exchange, half after it: the same path as without."""
    models = [Tagger(), Tagger()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in models]
    losses: list[list[float]] = [[], []]
    for exchange in (lambda m: None, convert, revert):
        exchange(models[1])
        for _ in range(3):
            for model, optimizer, record in zip(models, optimizers, losses, strict=True):
                loss = (model(TOKENS) - 0.5).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                record.append(loss.item())
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(losses[1], losses[0])


def test_copies_and_files() -> None:
    model = convert(Tagger())[0]
    expected = model(TOKENS)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert type(other.encoder) is nn.LSTM and other.cells[2] is other.again
        assert torch.equal(other(TOKENS), expected)
        assert len(revert(other)[1].replaced) == len(REPLACED) and type(model.encoder) is nn.LSTM
        close(pickle.loads(pickle.dumps(other))(TOKENS), expected)
    plain = Tagger()
    plain.load_state_dict(model.state_dict())
    close(plain(TOKENS), expected)


def test_buffers_and_attributes_stay() -> None:
    module = torch.nn.GRU(5, 4)
    module.register_buffer("seen", torch.arange(3))
    module.register_buffer("passing", torch.arange(2), persistent=False)
    module.note = "mine"
    seen, keys = module.seen, list(module.state_dict())
    for exchange in (convert, revert):
        exchange(module)
        assert module.seen is seen and module.note == "mine" and list(module.state_dict()) == keys


def test_moves_after_the_exchange() -> None:
    model = convert(Tagger())[0].double()
    expected = model(TOKENS)
    assert expected.dtype == torch.float64
    close(revert(model)[0](TOKENS), expected)
    assert convert(torch.nn.LSTM(5, 4, device="meta"))[0](torch.empty(7, 3, 5, device="meta"))[0].shape == (7, 3, 4)


@EVERY_PAIR
def test_parametrizations_go_along(torchs: Any, ours: Any) -> None:
    module = torchs(5, 4)
    name = next(iter(dict(module.named_parameters())))
    parametrizations.weight_norm(module, name)
    others = torchs(5, 4)  # has a class of its own
    parametrizations.weight_norm(others, name)
    x = input_of(torchs(5, 4))
    expected, keys = module(x), list(module.state_dict())
    for exchange, cls in ((convert, ours), (revert, torchs)):
        assert list(exchange(module)[1].replaced) == [""]
        assert isinstance(module, cls) and parametrize.is_parametrized(module, name)
        assert list(module.state_dict()) == keys
        out = module(x)
        close(out, expected)
        module.zero_grad()
        flat_all(out)[0].sum().backward()
        assert module.parametrizations[name].original0.grad.abs().sum() > 0
    for exchange, cls in ((convert, ours), (revert, torchs)):
        bare = parametrize.remove_parametrizations(exchange(module)[0], name)
        assert type(bare) is cls and set(bare.state_dict()) == set(torchs(5, 4).state_dict())
        close(bare(x), expected)
        parametrizations.weight_norm(module, name)
    assert type(others) is not type(module) and isinstance(others, torchs)


@EVERY_PAIR
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "reshape", [torch.nn.utils.weight_norm, lambda m, n: torch.nn.utils.prune.l1_unstructured(m, n, 0.4)]
)
def test_weights_that_a_hook_computes_go_along(torchs: Any, ours: Any, reshape: Callable[..., Any]) -> None:
    module = torchs(5, 4)
    reshape(module, next(iter(dict(module.named_parameters()))))
    x = input_of(torchs(5, 4))
    expected, keys = module(x), list(module.state_dict())
    for exchange, cls in ((convert, ours), (revert, torchs)):
        assert list(exchange(module)[1].replaced) == [""]
        assert type(module) is cls and list(module.state_dict()) == keys
        close(module(x), expected)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)
        expected = module(x)  # computed again, from the new values


def test_prepacked_weights_are_dropped() -> None:
    cell = nn.LSTMCell(5, 4).prepack()
    x = torch.randn(1, 5)
    with torch.no_grad():
        expected = cell(x)
    assert "_packed" not in vars(revert(cell)[0])
    close(cell(x), expected)
    assert convert(cell)[0]._packed is None


def test_compiled_models_see_the_exchange() -> None:
    """A model that was compiled in place, and one whose compiled form is at hand: both compile again."""
    model = torch.nn.Sequential(torch.nn.GRUCell(5, 4))
    compiled = torch.compile(model, backend="eager")
    inner = torch.nn.Sequential(torch.compile(copy.deepcopy(model), backend="eager"))
    x = torch.randn(3, 5)
    expected = compiled(x)
    close(inner(x), expected)
    calls: list[str] = []
    convert(model)[0][0].register_forward_hook(lambda m, args, out: calls.append(type(m).__module__))
    close(compiled(x), expected)
    assert calls == ["lect11ext.nn.recurrent.cells"]
    assert convert(inner)[1].replaced == {"0._orig_mod.0": "lect11ext.nn.GRUCell"}
    close(inner(x), expected)
    whole = torch.compile(convert(Tagger())[0], backend="eager", fullgraph=True)
    close(whole(TOKENS), convert(whole._orig_mod)[0](TOKENS))
