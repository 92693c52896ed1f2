"""Dot-product attention under torch.func, the compiler, export, checkpointing, autocast; and its ops' schemas."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from lect11ext import functional, reference

from .cases import KEY, Sizes, float_mask, op_arguments, operands, plain_sdpa, sdpa

ops = torch.ops.lect11ext
SIZES = Sizes(2, 4, 2, 5, 7, 8, 6)


def tensors(dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    return operands(SIZES, dtype, grad=grad)


def argument_sets() -> dict[str, tuple[Any, ...]]:
    q, k, v = tensors()
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 6, 7])
    return {
        "plain": op_arguments(q, k, v),
        "bool": op_arguments(q, k, v, torch.rand(1, 4, 1, 7) < 0.7, window=(None, 0), scale=0.3),
        "float": op_arguments(q, k, v, float_mask(2, 1, 5, 7).requires_grad_(), softcap=2.0, bottom_right=True),
        "alibi and dropout": op_arguments(q, k, v, slopes=torch.rand(4), dropout_p=0.4, window=(3, 2)),
        "slopes of the batch": op_arguments(q, k, v, slopes=torch.rand(2, 4)),
        "float32 mask": op_arguments(*tensors(torch.bfloat16), float_mask(1, 1, 1, 7)),
        "starts": op_arguments(*(x.detach()[:1].requires_grad_() for x in (q, k, v)), starts=starts, bottom_right=True),
        "transposed": op_arguments(*(torch.randn(2, n, 4, 8).transpose(1, 2).requires_grad_() for n in (5, 7, 7))),
        "columns apart": op_arguments(*(torch.randn(2, 4, 8, n).transpose(2, 3).requires_grad_() for n in (5, 7, 7))),
    }


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")  # without AOT dispatch, which takes a second


@pytest.mark.parametrize("name", argument_sets())
def test_opcheck(name: str) -> None:
    arguments = argument_sets()[name]
    torch.library.opcheck(ops.attention.default, arguments)
    whole = name in ("float", "starts")
    for leaf in (False, True) if whole else (True,):  # an op that is given constants has no node
        constants = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        inputs = arguments if leaf else constants
        output, lse = ops.attention(*constants)
        g, gl = torch.randn_like(output).requires_grad_(leaf), torch.randn_like(lse)
        has_mask = isinstance(arguments[3], Tensor) and arguments[3].is_floating_point()
        tangents = [torch.randn_like(a, requires_grad=leaf) for a in inputs[:3]]
        tangents += [torch.randn_like(inputs[3]) if has_mask else None]
        wanted = [True, True, True, has_mask]
        output_t, lse_t = (x.detach() for x in ops.attention_tangent(*inputs, output, lse, *tangents))
        state = (*inputs, output, lse)
        pairs: list[tuple[Any, tuple[Any, ...]]] = [
            (ops.attention_backward, (g, gl, *state, wanted)),
            (ops.attention_tangent, (*state, *tangents)),
            (ops.attention_backward_tangent, (g, gl, *state, g * 2, gl * 2, *tangents, output_t, lse_t, wanted)),
            (
                ops.attention_backward_tangent,
                (g, None, *state, None, None, None, tangents[1], None, None, output_t, lse_t, [False, True] * 2),
            ),
        ]
        for op, given in pairs[: 2 if leaf else 4]:  # with leaves the last op is composites: no kernel is traced
            if whole:
                torch.library.opcheck(op.default, given)
            else:
                torch.library.opcheck(op.default, given, test_utils=QUICK)


def test_opcheck_of_dropouts_mask() -> None:
    torch.library.opcheck(ops.attention_dropout_mask.default, (KEY, [2, 3, 5, 7], 0.5))


def test_shapes_strides_and_types_of_meta_results() -> None:
    for name, arguments in argument_sets().items():
        fake = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in arguments]
        for real, meta in zip(ops.attention(*arguments), ops.attention(*fake), strict=True):
            assert (real.shape, real.stride(), real.dtype) == (meta.shape, meta.stride(), meta.dtype), name


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_vmap(mask: str) -> None:
    q, k, v = (torch.randn(3, *x.shape) for x in tensors(grad=False))
    extra: list[Tensor] = []
    if mask != "none":
        extra = [torch.rand(3, 5, 7) < 0.7 if mask == "bool" else float_mask(3, 1, 5, 7)]

    def call(*args: Tensor) -> Any:
        return sdpa(*args, enable_gqa=True, is_causal=True, return_lse=True)

    for dims in ([0, 0, 0, 0], [0, None, None, 0], [None, 0, 0, None], [None, None, None, 0], [1, 2, 3, 1]):
        if mask == "none" and dims[:3] == [None] * 3:
            continue
        given, each = [], []
        for x, d in zip([q, k, v, *extra], dims, strict=False):
            given.append(x[0] if d is None else x.movedim(0, d))
            each.append([x[0]] * 3 if d is None else list(x))
        got = vmap(call, in_dims=tuple(dims[: len(given)]))(*given)
        singles = [call(*args) for args in zip(*each, strict=True)]
        expected = [torch.stack(parts) for parts in zip(*singles, strict=True)]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_vmap_of_slopes_keys_and_no_samples() -> None:
    q, k, v = tensors(grad=False)
    slopes, keys = torch.rand(3, 4), torch.stack([KEY + i for i in range(3)])
    options: dict[str, Any] = {"enable_gqa": True, "dropout_p": 0.5}
    got = vmap(lambda s, d: sdpa(q, k, v, alibi_slopes=s, dropout_key=d, **options))(slopes, keys)
    for i in range(3):
        torch.testing.assert_close(got[i], sdpa(q, k, v, alibi_slopes=slopes[i], dropout_key=keys[i], **options))
    assert vmap(lambda x: sdpa(x, k, v, enable_gqa=True))(q.expand(0, *q.shape)).shape == (0, 2, 4, 5, 6)


def test_vmap_randomness() -> None:
    q, k, v = (x.detach() for x in tensors())
    batched = q.expand(3, *q.shape)

    def drop(x: Tensor) -> Tensor:
        return sdpa(x, k, v, enable_gqa=True, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(drop)(batched)
    same, different = (vmap(drop, randomness=r)(batched) for r in ("same", "different"))
    assert torch.equal(same[0], same[1]) and not torch.equal(different[0], different[1])


def test_vmapped_derivatives() -> None:
    """Per-sample gradients, nested vmap, vmap of tangents and of second derivatives."""
    q, k, v = (torch.randn(3, *x.shape, dtype=torch.float64) for x in tensors(grad=False))
    mask = float_mask(5, 7, dtype=torch.float64, barred=0.0)

    def loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *a: function(*a, enable_gqa=True).pow(2).sum()

    def everything(function: Callable[..., Any]) -> list[Tensor]:
        f = loss(function)
        per_sample = vmap(grad(f, (0, 1, 2, 3)), (0, 0, 0, None))(q, k, v, mask)
        nested = vmap(vmap(grad(f), (0, 0, 0, None)), (0, 0, 0, None))(
            *(x.unflatten(1, (2, 1)) for x in (q, k, v)), mask
        )
        tangents = vmap(lambda q, k, v, t: jvp(lambda x: f(x, k, v), (q,), (t,))[1])(q, k, v, q)
        second = vmap(lambda q, k, v: jvp(grad(lambda x: f(x, k, v)), (q,), (q,))[1])(q, k, v)
        reverse = vmap(grad(lambda q, k, v: grad(f)(q, k, v).pow(2).sum(), (0, 1, 2)))(q, k, v)
        return [*per_sample, nested, tangents, second, *reverse]

    for a, b in zip(everything(sdpa), everything(plain_sdpa), strict=True):
        torch.testing.assert_close(a, b)


def test_jacobians() -> None:
    q, k, v = (x.double() for x in operands(Sizes(1, 2, 1, 2, 3, 2, 2), grad=False))

    def f(function: Callable[..., Any]) -> Callable[[Tensor], Any]:
        return lambda x: function(x, k, v, enable_gqa=True, is_causal=True, return_lse=True)

    expected = torch.func.jacrev(f(plain_sdpa))(q)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        for a, b in zip(jacobian(f(sdpa))(q), expected, strict=True):
            torch.testing.assert_close(a, b)


def trained(function: Callable[..., Any], args: list[Tensor], *more: Any) -> list[Tensor]:
    out, lse = function(*args, *more)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.clamp_min(-9).sum(), args)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(backend: str) -> None:
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key: Tensor) -> Any:
        return sdpa(
            q * 2, k, v, mask, enable_gqa=True, dropout_p=0.3, dropout_key=key, window=(9, 1), softcap=3.0,
            return_lse=True, causal_alignment="bottom_right",
        )  # fmt: skip

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for queries, keys in ((5, 7), (9, 30), (40, 13)):
        args = [*operands(Sizes(2, 4, 2, queries, keys, 8, 6)), float_mask(1, 1, queries, keys).requires_grad_()]
        for a, b in zip(trained(compiled, args, KEY), trained(call, args, KEY), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_of_derivatives() -> None:
    torch._dynamo.reset()
    q, k, v = (x.detach() for x in tensors())

    def derivatives(q: Tensor, k: Tensor, v: Tensor) -> Any:
        def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, enable_gqa=True, is_causal=True)

        first = grad(lambda *a: f(*a).pow(2).sum(), (0, 1, 2))(q, k, v)
        return *first, jvp(f, (q, k, v), (q, k, v))[1]

    compiled = torch.compile(derivatives, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k, v), derivatives(q, k, v), strict=True):
        torch.testing.assert_close(a, b)


def test_compile_recompiles_for_nothing_but_ranks() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q: sdpa(q, q, q, is_causal=True), dynamic=True, backend=counter, fullgraph=True)
    for length in (5, 17, 64, 65, 300):
        compiled(torch.randn(2, 3, length, 8))
    assert counter.frame_count == 1


def test_compiled_dropout_draws_as_the_eager_one() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 5, 8)

    def drop(x: Tensor) -> Tensor:
        return sdpa(x, x, x, dropout_p=0.5)

    compiled = torch.compile(drop, fullgraph=True, backend="aot_eager")
    compiled(q)
    torch.manual_seed(1)
    first = compiled(q)
    torch.manual_seed(1)
    assert torch.equal(first, drop(q)) and not torch.equal(first, compiled(q))


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, mask, enable_gqa=True, is_causal=True, causal_alignment="bottom_right")


def test_export_with_any_length() -> None:
    queries, keys = torch.export.Dim("queries", min=2), torch.export.Dim("keys", min=2)
    exported = torch.export.export(
        Attend(), (*tensors(grad=False), torch.rand(5, 7) < 0.7),
        dynamic_shapes={"q": {2: queries}, "k": {2: keys}, "v": {2: keys}, "mask": {0: queries, 1: keys}},
    )  # fmt: skip
    assert any("lect11ext.attention" in str(node.target) for node in exported.graph.nodes)
    for n, m in ((5, 7), (70, 3), (4, 300)):
        args = (*operands(Sizes(2, 4, 2, n, m, 8, 6), grad=False), torch.rand(n, m) < 0.7)
        torch.testing.assert_close(exported.module()(*args), Attend()(*args))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("with_key", [False, True])
def test_activation_checkpointing_with_dropout(reentrant: bool, with_key: bool) -> None:
    """What is computed again drops the same."""
    args = tensors()
    key = KEY if with_key else None

    def call(*args: Tensor) -> Tensor:
        return sdpa(*args, enable_gqa=True, dropout_p=0.5, dropout_key=key) + functional.philox_normal((1,), KEY) * 0

    torch.manual_seed(7)
    expected = torch.autograd.grad(call(*args).square().sum(), args)
    torch.manual_seed(7)
    out = checkpoint(call, *args, use_reentrant=reentrant)
    torch.manual_seed(8)
    out.square().sum().backward()
    for a, b in zip(args, expected, strict=True):
        torch.testing.assert_close(a.grad, b)


def test_autocast(device: str) -> None:
    args = [*operands(SIZES, device=device), float_mask(5, 7, device=device).requires_grad_()]
    low = [a.detach().bfloat16().requires_grad_() for a in args]
    with torch.autocast(device, torch.bfloat16):
        out, lse = sdpa(*args, enable_gqa=True, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, sdpa(*low, enable_gqa=True))
    grads = torch.autograd.grad(out.float().square().sum(), args)
    expected = torch.autograd.grad(sdpa(*low, enable_gqa=True).float().square().sum(), low)
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())
    with torch.autocast(device, torch.bfloat16, enabled=False):
        assert sdpa(*args, enable_gqa=True).dtype == torch.float32
    mixed = [low[0].detach(), args[1], args[2]]
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(sdpa(*mixed, enable_gqa=True), sdpa(*low[:3], enable_gqa=True))
    args = [a.double() for a in tensors(grad=False)]
    with torch.autocast(device, torch.bfloat16):
        assert (
            torch.nn.functional.scaled_dot_product_attention(*args, enable_gqa=True).dtype
            == sdpa(*args, enable_gqa=True).dtype
        )


def test_inference_mode_and_no_grad() -> None:
    args = tensors()
    expected = sdpa(*args, enable_gqa=True)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            out = sdpa(*args, enable_gqa=True)
        assert torch.equal(out, expected) and not out.requires_grad
    assert math.isclose(sdpa(*args, enable_gqa=True).sum().item(), expected.sum().item())


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_second_derivatives_by_a_mask_for_all(batch: int | None) -> None:
    """The mask itself has no samples, its tangent has: they are folded alike."""
    q, k, v = (x.double() for x in tensors(grad=False))
    q, k, v = (x[0, :2] if batch is None else x[:batch] for x in (q, k, v))
    lse = sdpa(q, k, v, enable_gqa=batch is not None, return_lse=True)[1]

    def attend(f: Callable[..., Tensor], mask: Tensor) -> Tensor:
        return f(q, k, v, mask, enable_gqa=batch is not None)

    def weights(mask: Tensor) -> Tensor:
        return functional.attention_weights(q, k, lse, mask, enable_gqa=batch is not None)

    def plain_weights(mask: Tensor) -> Tensor:
        return reference.attention_weights(q, k, lse, mask, enable_gqa=batch is not None)

    def squares(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda mask: f(mask).square().sum()

    mask = torch.randn(5, 7).double()
    for ours, plain in ((partial(attend, sdpa), partial(attend, plain_sdpa)), (weights, plain_weights)):
        expected = jacrev(plain)(mask)
        for transform in (jacfwd, jacrev):
            torch.testing.assert_close(transform(ours)(mask), expected)
        expected = jacrev(jacrev(squares(plain)))(mask)
        for transform in (hessian, lambda f: jacrev(jacrev(f))):
            torch.testing.assert_close(transform(squares(ours))(mask), expected)


def test_second_derivatives_by_slopes() -> None:
    q, k, v = (x.double() for x in tensors(grad=False))
    slopes = torch.rand(4).double()
    got, expected = (
        hessian(lambda s, f=f: f(q, k, v, alibi_slopes=s, enable_gqa=True).square().sum())(slopes)
        for f in (sdpa, plain_sdpa)
    )
    torch.testing.assert_close(got, expected)
