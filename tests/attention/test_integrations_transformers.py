"""attn_implementation="lect11ext" against "eager", on small models of Hugging Face transformers with random weights."""

from __future__ import annotations

import copy
import doctest
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lect11ext.integrations
from lect11ext.integrations._transformers import _attention

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network
hf = pytest.importorskip("transformers")

pytestmark = pytest.mark.cpu
NAME = lect11ext.integrations.transformers()
TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS: dict[str, Any] = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Nothing here is large enough for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**TINY, **NO_DROPOUT, intermediate_size=64, vocab_size=60))


def gpt2() -> Any:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **dropout, **TOKENS))


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, **TOKENS, intermediate_size=64, num_key_value_heads=2))


def mistral() -> Any:
    """With a sliding window that is shorter than the text."""
    config = hf.MistralConfig(**TINY, **TOKENS, intermediate_size=64, num_key_value_heads=1, sliding_window=4)
    return hf.MistralForCausalLM(config)


def gemma2() -> Any:
    """With soft-capping, and a window in every other layer."""
    config = hf.Gemma2Config(
        **TINY, **TOKENS, intermediate_size=64, num_key_value_heads=2, head_dim=8, sliding_window=4,
        attn_logit_softcapping=1.5, query_pre_attn_scalar=4,
    )  # fmt: skip
    return hf.Gemma2ForCausalLM(config)


def t5() -> Any:
    config = hf.T5Config(
        vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def vit() -> Any:
    return hf.ViTForImageClassification(
        hf.ViTConfig(**TINY, **NO_DROPOUT, intermediate_size=64, image_size=8, patch_size=2, num_labels=3)
    )


def text() -> dict[str, Tensor]:
    """Two lines of text, the second padded on the right."""
    ids, mask = torch.randint(3, 60, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def text_pairs() -> dict[str, Tensor]:
    return {**text(), "labels": torch.randint(3, 60, (2, 5))}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]]]] = {
    "bert": (bert, text),
    "gpt2": (gpt2, text),
    "llama": (llama, text),
    "mistral": (mistral, text),
    "gemma2": (gemma2, text),
    "t5": (t5, text_pairs),
    "vit": (vit, images),
}


def both(make: Callable[[], Any]) -> tuple[Any, Any]:
    """The same model with transformers' attention and with ours; weights large enough for attention to matter."""
    torch.manual_seed(0)
    eager = make()
    with torch.no_grad():
        for p in eager.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation(NAME)
    return eager, ours


def ours_in(function: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key == "lect11ext::attention")


def kept(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """What padding has no part in: for a padded query eager and we mean different things."""
    mask = batch.get("attention_mask")
    return logits if mask is None or mask.shape != logits.shape[:2] else logits[mask.bool()]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name: str, padded: bool) -> None:
    make, inputs = MODELS[name]
    eager, ours = both(make)
    batch = inputs()
    if not padded:
        batch.pop("attention_mask", None)
    expected, got = eager(**batch), ours(**batch)
    if not padded:
        assert ours_in(lambda: ours(**batch)) >= 2
    torch.testing.assert_close(kept(got.logits, batch), kept(expected.logits, batch), atol=2e-5, rtol=1e-4)
    expected.loss.backward()
    got.loss.backward()
    for (parameter, e), g in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert (e.grad is None) == (g.grad is None), parameter
        if e.grad is not None:
            room = 2e-5 * float(e.grad.abs().max()) + 1e-7
            torch.testing.assert_close(g.grad, e.grad, atol=room, rtol=1e-3, msg=lambda m, p=parameter: f"{p}: {m}")


def test_t5_learns_its_relative_bias() -> None:
    _, ours = both(t5)
    ours(**text_pairs()).loss.backward()
    for stack in (ours.encoder, ours.decoder):
        gradient = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad
        assert gradient is not None and gradient.abs().max() > 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "t5"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(name: str, cache: str) -> None:
    make, _ = MODELS[name]
    eager, ours = both(make)
    ids, mask = torch.randint(3, 60, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0  # padded on the left, as for generation
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True}
    if cache == "static":
        options.update(cache_implementation="static", disable_compile=True)
    expected, got = (
        model.eval().generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
        for model in (eager, ours)
    )  # fmt: skip
    assert torch.equal(got.sequences, expected.sequences)
    for g, e in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(g, e, atol=1e-4, rtol=1e-4)


def test_compiled() -> None:
    eager, ours = both(llama)
    ids = torch.randint(3, 60, (2, 9))
    torch._dynamo.reset()
    compiled = torch.compile(ours.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(ids).last_hidden_state, eager.model(ids).last_hidden_state, atol=2e-5, rtol=1e-4
    )


def test_weights_on_request() -> None:
    eager, ours = both(bert)
    batch = {"input_ids": torch.randint(3, 60, (2, 9)), "output_attentions": True}
    for g, e in zip(ours(**batch).attentions, eager(**batch).attentions, strict=True):
        torch.testing.assert_close(g, e)


def operands(**module: Any) -> tuple[Any, list[Tensor]]:
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    module = {"is_causal": False, "training": True, **module}
    return SimpleNamespace(**module), [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def eager_like(query: Tensor, key: Tensor, value: Tensor, add: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    scores = query @ key.mT / 8**0.5 + add
    sink = sinks.view(1, -1, 1, 1).expand(2, 4, 5, 1)
    weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return (weights @ value).transpose(1, 2), weights


def test_sinks_with_gradient() -> None:
    """A learned score for a key without value, as GPT-OSS has it."""
    module, args = operands()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 5, 7) < 0.8
    got = _attention(module, *args, mask, position_bias=bias, s_aux=sinks, output_attentions=True)
    expected = eager_like(*args, torch.where(mask, bias, -torch.inf), sinks)
    wanted = [*args, bias, sinks]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
        cotangent = torch.randn_like(e)
        gradients = [
            torch.autograd.grad(x, wanted, cotangent, retain_graph=True, materialize_grads=True) for x in (g, e)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("said", [None, True, False])
def test_who_is_causal(said: bool | None) -> None:
    """The call's word counts before the module's; no word, and no mask, means causal, but for a single query."""
    module, (query, key, value) = operands(is_causal=True)
    expected = key.new_ones(5, 7, dtype=torch.bool).tril() if said is not False else None
    out, weights = _attention(module, query, key, value, None, is_causal=said)
    torch.testing.assert_close(
        out.transpose(1, 2),
        torch.nn.functional.scaled_dot_product_attention(query, key, value, expected, enable_gqa=True),
    )
    assert weights is None
    one, _ = _attention(module, query[:, :, :1], key, value, None, is_causal=said)
    torch.testing.assert_close(
        one.transpose(1, 2),
        torch.nn.functional.scaled_dot_product_attention(query[:, :, :1], key, value, enable_gqa=True),
    )


@pytest.mark.parametrize("biased", [True, False])
def test_weights_of_an_empty_cache_behind_the_queries(biased: bool) -> None:
    """Without a mask keys behind the queries are not used; the weights have their columns nevertheless."""
    module, (query, key, value) = operands(is_causal=True)
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64) if biased else None
    out, weights = _attention(module, query, key, value, None, position_bias=bias, output_attentions=True)
    assert weights is not None and weights.shape == (2, 4, 5, 7)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5 + (0 if bias is None else bias)
    expected = scores.masked_fill(scores.new_ones(5, 7).triu(1) > 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out.transpose(1, 2), weights @ value.repeat_interleave(2, 1))


def test_dropout_goes_into_output_and_weights_alike() -> None:
    module, (query, key, value) = operands()
    out, weights = _attention(module, query, key, value, None, dropout=0.5, output_attentions=True)
    assert weights is not None and (weights == 0).any()
    torch.testing.assert_close(out.transpose(1, 2), weights @ value.repeat_interleave(2, 1))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", None)
    with pytest.raises(
        ImportError, match=r"transformers must be installed, 5.24 or newer.*pip install 'transformers>=5.24'"
    ):
        lect11ext.integrations.transformers()


def test_examples_of_the_docstrings() -> None:
    result = doctest.testmod(importlib.import_module("lect11ext.integrations._transformers"))
    assert result.attempted > 0 and result.failed == 0
