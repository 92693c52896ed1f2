"""MultiheadAttention inside torch.nn's transformers, and exchanged by convert and revert."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lect11ext import convert, nn, revert
from lect11ext._load import _C
from lect11ext.convert import Report
from tests.helpers import ONE_STEP, assert_within_rule

pytestmark = pytest.mark.cpu

E, H, L, N = 16, 2, 5, 3
PADDING = torch.arange(L) >= torch.tensor([[5], [3], [4]])
CAUSAL = torch.nn.Transformer.generate_square_subsequent_mask(L)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our op was given."""
    seen: list[tuple[int, ...]] = []
    op = _C.attention

    def attention(query: Tensor, *args: Any) -> Any:
        seen.append(tuple(query.shape))
        return op(query, *args)

    monkeypatch.setattr(_C, "attention", attention)
    return seen


def exchanged(model: Any) -> Any:
    ours, report = convert(copy.deepcopy(model))
    assert report.replaced and set(report.replaced.values()) == {"lect11ext.nn.MultiheadAttention"}
    return ours


def compare(ours: Any, torchs: Any, *args: Tensor, unseen: Tensor | None = None, **kwargs: Any) -> None:
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in kwargs.items()}
    outs = [
        ours(*args, **kwargs),
        torchs(*args, **kwargs),
        copy.deepcopy(torchs).double()(*(a.double() for a in args), **wide),
    ]
    if unseen is not None:  # torch.nn's fused layer puts zeros there
        outs = [out.masked_fill(unseen[..., None], 0) for out in outs]
    assert_within_rule(*outs, slack=ONE_STEP)


@pytest.mark.parametrize(
    ("training", "norm_first", "batch_first", "bias"),
    [
        (False, False, True, True),  # what torch.nn's fused layer takes
        (False, True, True, True),
        (False, False, False, False),
        (True, False, True, False),
        (True, True, False, True),
    ],
)
def test_encoder_layer(training: bool, norm_first: bool, batch_first: bool, bias: bool, calls: Any) -> None:
    torchs = torch.nn.TransformerEncoderLayer(
        E, H, 24, dropout=0.0, batch_first=batch_first, norm_first=norm_first, bias=bias
    ).train(training)
    ours = exchanged(torchs)
    x = torch.randn(*((N, L) if batch_first else (L, N)), E)
    unseen = PADDING if batch_first else PADDING.T
    with torch.no_grad():
        for kwargs in (
            {},
            {"src_key_padding_mask": PADDING},
            {"src_mask": CAUSAL, "is_causal": True},
            {"src_mask": CAUSAL < 0},
        ):
            calls.clear()
            compare(ours, torchs, x, unseen=unseen if "src_key_padding_mask" in kwargs else None, **kwargs)
            assert calls == [(N, H, L, E // H)]


def test_gradients_of_an_encoder_layer() -> None:
    torchs = torch.nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    models = [exchanged(torchs), torchs, copy.deepcopy(torchs).double()]
    x, cotangent = torch.randn(N, L, E), torch.randn(N, L, E)
    results = []
    for model in models:
        p = next(model.parameters())
        out = model(x.to(p), src_key_padding_mask=PADDING)
        results.append(torch.autograd.grad(out, list(model.parameters()), cotangent.to(p)))
    for triple in zip(*results, strict=True):
        assert_within_rule(*triple, slack=ONE_STEP)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder_layer(training: bool, batch_first: bool, calls: Any) -> None:
    torchs = torch.nn.TransformerDecoderLayer(E, H, 24, dropout=0.0, batch_first=batch_first).train(training)
    ours = exchanged(torchs)
    x, memory = (torch.randn(*((N, n) if batch_first else (n, N)), E) for n in (L, 7))
    padding = (torch.arange(7) > 4).expand(N, 7)
    for kwargs in (
        {},
        {"tgt_mask": CAUSAL, "tgt_is_causal": True},
        {"tgt_mask": CAUSAL < 0, "tgt_key_padding_mask": PADDING, "memory_key_padding_mask": padding},
    ):
        calls.clear()
        compare(ours, torchs, x, memory, **kwargs)
        assert len(calls) == 2
    # Ours needs no mask to be causal.
    torch.testing.assert_close(ours(x, memory, tgt_is_causal=True), torchs(x, memory, tgt_mask=CAUSAL))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_with_padding(training: bool, calls: Any) -> None:
    """In eval() torch.nn's encoder makes a nested tensor of padded input, which our module then is given."""
    layer = torch.nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    torchs = torch.nn.TransformerEncoder(layer, 2).train(training)
    ours = exchanged(torchs)
    with torch.no_grad():
        compare(ours, torchs, torch.randn(N, L, E), src_key_padding_mask=PADDING, unseen=PADDING)
    tokens = int((~PADDING).sum())
    assert calls == [(N, H, L, E // H) if training else (1, H, tokens, E // H)] * 2


def test_encoder_made_with_ours(calls: Any) -> None:
    layer = torch.nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    layer.self_attn = nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.warns(UserWarning, match="self_attn._qkv_same_embed_dim was not True"):
        torch.nn.TransformerEncoder(layer, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    torchs = revert(copy.deepcopy(ours))[0]
    with torch.no_grad():
        compare(ours, torchs, torch.randn(N, L, E), src_key_padding_mask=PADDING, unseen=PADDING)
    assert calls == [(N, H, L, E // H)] * 2


def test_jagged_sequences_through_a_layer() -> None:
    ours = exchanged(torch.nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True))
    parts = [torch.randn(n, E) for n in (3, 1, 5)]
    for layer in (ours, ours.eval()):
        out = layer(torch.nested.nested_tensor(parts, layout=torch.jagged))
        for got, part in zip(out.unbind(), parts, strict=True):
            torch.testing.assert_close(got, layer(part))


def test_a_whole_transformer_is_converted_and_reverted() -> None:
    model = torch.nn.Transformer(E, H, 2, 1, 24, dropout=0.0).eval()
    plain = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    x, y = torch.randn(L, N, E), torch.randn(4, N, E)
    names = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.layers.0.self_attn"]
    names.append("decoder.layers.0.multihead_attn")
    for exchange, package in ((convert, "lect11ext.nn"), (revert, "torch.nn")):
        assert exchange(model)[1] == Report(dict.fromkeys(names, f"{package}.MultiheadAttention"), {})
        assert all(p is tensors[name] for name, p in model.named_parameters())
        assert ("embed_dim" in repr(model)) == (exchange is convert)
        compare(model, plain, x, y)
    assert repr(model) == repr(plain)


@pytest.mark.parametrize("options", [{}, {"kdim": 3, "vdim": 5}, {"bias": False, "add_bias_kv": True}])
def test_a_module_becomes_what_the_constructor_makes(options: dict[str, Any]) -> None:
    module, ours, plain = torch.nn.MultiheadAttention(E, H, **options), nn.MultiheadAttention(E, H, **options), {}
    plain = dict(vars(module))
    packed = module._qkv_same_embed_dim
    x = [torch.randn(L, N, size) for size in (E, module.kdim, module.vdim)]
    expected = module(*x)
    converted = convert(module)[0]
    assert type(converted) is nn.MultiheadAttention and vars(converted).keys() == vars(ours).keys()
    assert not converted._qkv_same_embed_dim
    torch.testing.assert_close(converted(*x), expected)
    reverted = revert(converted)[0]
    assert type(reverted) is torch.nn.MultiheadAttention and vars(reverted).keys() == plain.keys()
    assert reverted._qkv_same_embed_dim == packed
    assert vars(revert(ours)[0]).keys() == plain.keys() and ours._qkv_same_embed_dim == packed
    torch.testing.assert_close(reverted(*x), expected)


def test_what_is_left() -> None:
    class Own(torch.nn.MultiheadAttention):
        pass

    model = torch.nn.ModuleDict({"own": Own(E, H), "integer": torch.nn.MultiheadAttention(E, H)})
    model["integer"].in_proj_bias.data = model["integer"].in_proj_bias.data.double()
    report = convert(model)[1]
    assert not report.replaced and "derives from torch.nn.MultiheadAttention" in report.left["own"]
    assert "lect11ext.nn.MultiheadAttention takes parameters of one type" in report.left["integer"]
    options = {"num_kv_heads": 1, "window": (2, None), "rope": True}
    for name, value in options.items():
        left = revert(nn.MultiheadAttention(E, H, **{name: value}))[1].left
        assert left == {"": f"torch.nn.MultiheadAttention has no {name}={value!r}"}
