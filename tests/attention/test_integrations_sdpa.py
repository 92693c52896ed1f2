"""Our attention under torch.nn.functional.scaled_dot_product_attention, and as torch's flash attention."""

from __future__ import annotations

import doctest
import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

import lect11ext.integrations
from lect11ext.integrations import _flash
from lect11ext.integrations._sdpa import _TORCHS
from tests.helpers import Tagged, check

sdpa = lect11ext.integrations.sdpa


def ours_in(function: Callable[[], Any]) -> int:
    """How often our op ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key == "lect11ext::attention")


def inputs(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    return [torch.randn(*shape).to(dtype).requires_grad_(grad) for _ in range(3)]


def within(*args: Any, **kwargs: Any) -> Any:
    with sdpa():
        return F.scaled_dot_product_attention(*args, **kwargs)


CALLS: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {
    "plain": (lambda: inputs(2, 3, 5, 8), {}),
    "causal": (lambda: inputs(2, 3, 5, 8), {"is_causal": True}),
    "scaled": (lambda: inputs(2, 3, 5, 8), {"scale": 0.3}),
    "3-D": (lambda: inputs(3, 5, 8), {"is_causal": True}),
    "5-D": (lambda: inputs(2, 2, 3, 5, 8), {}),
    "bool mask": (lambda: [*inputs(2, 3, 5, 8), torch.rand(2, 1, 5, 5) < 0.7], {}),
    "additive mask with gradient": (lambda: [*inputs(2, 3, 5, 8), torch.randn(1, 3, 5, 5, requires_grad=True)], {}),
    "another value dimension": (lambda: [*inputs(2, 3, 5, 8)[:2], torch.randn(2, 3, 5, 4, requires_grad=True)], {}),
    "grouped": (lambda: [torch.randn(2, 4, 5, 8, requires_grad=True), *inputs(2, 2, 7, 8)[1:]], {"enable_gqa": True}),
    "a wide head": (lambda: inputs(1, 2, 5, 264), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_ours_and_has_torchs_values(name: str) -> None:
    make, options = CALLS[name]
    args = make()
    assert ours_in(lambda: within(*args, **options)) == 1
    check(lambda *a: within(*a, **options), lambda *a: F.scaled_dot_product_attention(*a, **options), args, slack=8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype) -> None:
    args = inputs(2, 3, 9, 16, dtype=dtype)
    check(lambda *a: within(*a, is_causal=True), lambda *a: _TORCHS(*a, is_causal=True), args, slack=4)


@pytest.mark.parametrize("make", [causal_lower_right, causal_upper_left])
def test_torchs_causal_biases(make: Callable[[int, int], Tensor]) -> None:
    query, key, value = torch.randn(2, 3, 4, 8), *inputs(2, 3, 7, 8, grad=False)[1:]
    bias = make(4, 7)
    expected = F.scaled_dot_product_attention(query, key, value, bias)
    assert ours_in(lambda: within(query, key, value, bias)) == 1
    torch.testing.assert_close(within(query, key, value, bias), expected)


def test_what_torchs_fused_kernels_have_not() -> None:
    args = inputs(1, 2, 4, 3, dtype=torch.float64)
    with sdpa():
        torch.autograd.gradcheck(F.scaled_dot_product_attention, args, check_forward_ad=True)
        torch.autograd.gradgradcheck(F.scaled_dot_product_attention, args)
        torch.func.hessian(lambda q: F.scaled_dot_product_attention(q, *args[1:]).square().sum())(args[0])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ([torch.randn(1, 2, 3, 4, dtype=torch.complex64)] * 3, {}),
        ([torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)]).transpose(1, 2)] * 3, {}),
    ],
    ids=["complex", "strided nested"],
)
def test_the_rest_goes_to_torch(args: list[Tensor], kwargs: dict[str, Any]) -> None:
    def call() -> Any:
        try:
            return F.scaled_dot_product_attention(*args, **kwargs)
        except Exception as error:
            return str(error)

    expected = call()
    with sdpa():
        assert ours_in(call) == 0
        got = call()
    assert str(got) == str(expected)


def test_mixed_types_are_torchs_error_but_autocasts_business() -> None:
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4).bfloat16(), torch.randn(1, 2, 3, 4)
    with sdpa():
        with pytest.raises(RuntimeError, match="same dtype"):
            F.scaled_dot_product_attention(query, key, value)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            assert F.scaled_dot_product_attention(query, key, value).dtype == torch.bfloat16


def test_jagged() -> None:
    parts = [torch.randn(3, 2, 4), torch.randn(5, 2, 4)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    with sdpa():
        out = F.scaled_dot_product_attention(x, x, x)
    for part, got in zip(parts, out.transpose(1, 2).unbind(), strict=True):
        one = part.transpose(0, 1)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(one, one, one).transpose(0, 1))


class Own(Tensor):
    """A subclass with something to say about the function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return "own" if func is _TORCHS else super().__torch_function__(func, types, args, kwargs)


def test_subclasses() -> None:
    with sdpa():
        own = [torch.randn(1, 2, 3, 4).as_subclass(Own)] * 3
        assert F.scaled_dot_product_attention(*own) == "own"
        tagged = [torch.randn(1, 2, 3, 4).as_subclass(Tagged)] * 3
        assert ours_in(lambda: F.scaled_dot_product_attention(*tagged)) == 1
        assert type(F.scaled_dot_product_attention(*tagged)) is Tagged


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_encoder_layer(training: bool, padded: bool) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).train(training)
    x, padding = torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    mask = padding if padded else None
    with torch.set_grad_enabled(training):
        expected = layer(x, src_key_padding_mask=mask)
        with sdpa():
            assert ours_in(lambda: layer(x, src_key_padding_mask=mask)) == 1
            out = layer(x, src_key_padding_mask=mask)
    keep = ~padding if padded else torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(out[keep], expected[keep])
    assert torch.backends.mha.get_fastpath_enabled()


def test_decoder_and_encoder_train_alike() -> None:
    model = torch.nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 6, 16), torch.randn(2, 4, 16)
    mask = model.generate_square_subsequent_mask(4)

    def gradients() -> list[Tensor]:
        out = model(source, target, tgt_mask=mask, tgt_is_causal=True)
        return list(torch.autograd.grad(out.square().sum(), list(model.parameters())))

    expected = gradients()
    with sdpa():
        assert ours_in(lambda: model(source, target, tgt_mask=mask)) == 3
        for got, exact in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-4)


def test_dropout_is_seeded_by_torch() -> None:
    args = inputs(2, 3, 16, 8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(within(*args, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_blocks_nest_and_leave_nothing() -> None:
    early = ModuleType("imported_it_before")
    early.scaled_dot_product_attention = F.scaled_dot_product_attention  # type: ignore[attr-defined]
    sys.modules[early.__name__] = early
    try:
        with sdpa():
            with sdpa():
                pass
            assert F.scaled_dot_product_attention is not _TORCHS
            assert early.scaled_dot_product_attention is F.scaled_dot_product_attention
        with pytest.raises(KeyError), sdpa():
            raise KeyError
        assert F.scaled_dot_product_attention is early.scaled_dot_product_attention is _TORCHS
    finally:
        del sys.modules[early.__name__]


def test_what_was_imported_in_a_block_is_torchs_again() -> None:
    late = ModuleType("imported_it_within")
    with sdpa():
        kept = late.scaled_dot_product_attention = F.scaled_dot_product_attention  # type: ignore[attr-defined]
        sys.modules[late.__name__] = late
    del sys.modules[late.__name__]
    assert late.scaled_dot_product_attention is _TORCHS and kept is not _TORCHS
    args = inputs(1, 2, 3, 4)
    assert ours_in(lambda: kept(*args)) == 0
    assert torch.equal(kept(*args), _TORCHS(*args))


def test_meta_tensors() -> None:
    args = [torch.empty(1, 2, 3, 4, device="meta") for _ in range(3)]
    assert within(*args).shape == (1, 2, 3, 4) and within(*args).is_meta


def test_what_another_put_there_stays() -> None:
    def another() -> None: ...

    with sdpa():
        F.scaled_dot_product_attention = another
    try:
        assert F.scaled_dot_product_attention is another
    finally:
        F.scaled_dot_product_attention = _TORCHS


def test_decorator_threads_and_checkpoints() -> None:
    args = inputs(1, 2, 3, 4)

    @sdpa()
    def call() -> Any:
        return F.scaled_dot_product_attention(*args)

    assert ours_in(call) == 1
    seen: list[bool] = []
    with sdpa():
        thread = threading.Thread(target=lambda: seen.append(F.scaled_dot_product_attention is not _TORCHS))
        thread.start()
        thread.join()
        out = checkpoint(F.scaled_dot_product_attention, *args, use_reentrant=False)
        assert ours_in(lambda: out.sum().backward()) > 0
    assert seen == [True]


def test_importing_activates_nothing() -> None:
    assert F.scaled_dot_product_attention is _TORCHS


def test_compile_in_and_out_of_a_block() -> None:
    def attend(*args: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*args, is_causal=True)

    args = inputs(2, 3, 5, 8)
    expected = attend(*args)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for block in (False, True, False, True):
        if block:
            with sdpa():
                torch.testing.assert_close(compiled(*args), expected)
                assert ours_in(lambda: compiled(*args)) == 1
        else:
            compiled(*args)
            assert ours_in(lambda: compiled(*args)) == 0


def test_compile_a_layer_with_gradients() -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = torch.randn(3, 5, 16)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch._dynamo.reset()
    with sdpa():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters()))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-4, rtol=1e-4)


# --- as torch's flash attention: the kernels' side of the registry works on the CPU as well -------------------------

needs_registry = pytest.mark.skipif(_flash._registry is None, reason="torch has no registry before 2.13")


def flash(*args: Any, **kwargs: Any) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention(*args, **kwargs)[0]


@needs_registry
def test_registered_but_not_active() -> None:
    from torch.nn import attention

    name = lect11ext.integrations.flash()
    assert name in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() != name


@pytest.mark.cpu
@pytest.mark.parametrize("queries", [7, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_flash_op(causal: bool, queries: int) -> None:
    args = [torch.randn(2, 4, queries, 8, requires_grad=True), *inputs(2, 2, 7, 8)[1:]]
    mask = torch.ones(queries, 7, dtype=torch.bool).tril(7 - queries) if causal else None  # from the lower right

    def torchs(*a: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*a, attn_mask=mask, scale=0.5, enable_gqa=True)

    handle = _flash._Handle("CPU")
    try:
        check(lambda *a: flash(*a, 0.0, causal, scale=0.5), torchs, args, slack=8)
        lse = torch.ops.aten._scaled_dot_product_flash_attention(*args)[1]
        assert lse.shape == (2, 4, queries) and lse.dtype == torch.float32
    finally:
        handle.remove()
    with pytest.raises(NotImplementedError):
        flash(*args)


@pytest.mark.cpu
def test_flash_op_with_dropout() -> None:
    args = inputs(1, 2, 6, 4, dtype=torch.float64)
    handle = _flash._Handle("CPU")
    try:

        def seeded(*a: Tensor) -> Any:
            torch.manual_seed(3)
            return flash(*a, 0.4)

        assert torch.autograd.gradcheck(seeded, args)
        ours = torch.manual_seed(3) and within(*args, dropout_p=0.4)
        assert torch.equal(seeded(*args), ours)
    finally:
        handle.remove()


def test_flash_debug_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="return_debug_mask must be False, but got True"):
        _flash._forward(*inputs(1, 1, 2, 4, grad=False), return_debug_mask=True)


def test_flash_without_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_flash, "_registry", None)
    with pytest.raises(RuntimeError, match=r"register_flash_attention_impl \(2.13 or newer\)"):
        lect11ext.integrations.flash()


@needs_registry
def test_a_block_activates_flash_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the GPU pretended, and what was active before put back."""
    from torch.nn import attention

    log: list[str] = []

    class Handle:
        def __init__(self, name: str) -> None:
            self.name = name
            log.append(f"+{name}")

        def remove(self) -> None:
            log.append(f"-{self.name}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_flash._C, "build_info", lambda: {"cuda": True})
    monkeypatch.setattr(_flash, "_Handle", lambda key: Handle("ours"))
    attention.register_flash_attention_impl("other", register_fn=lambda: Handle("other"))
    attention.activate_flash_attention_impl("other")
    try:
        with sdpa():
            assert attention.current_flash_attention_impl() == "lect11ext"
        assert attention.current_flash_attention_impl() == "other"
    finally:
        attention.restore_flash_attention_impl()
        _flash._registry._FLASH_ATTENTION_IMPLS.pop("other")
    assert log == ["+other", "-other", "+ours", "-ours", "+other", "-other"]


@pytest.mark.parametrize("name", ["_sdpa", pytest.param("_flash", marks=needs_registry)])
def test_examples_of_the_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"lect11ext.integrations.{name}"))
    assert result.attempted > 0 and result.failed == 0
