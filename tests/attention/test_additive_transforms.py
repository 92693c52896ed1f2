"""additive_attention under transforms and compilers, under autocast; its memory and its errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from lect11ext import functional, reference
from tests.attention.test_additive import operands
from tests.helpers import Tagged

attend = functional.additive_attention
MASK = torch.tensor([[True, False, True, True], [False, True, True, False], [False] * 4])


def small(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [a.detach() for a in operands((2,), 3, 4, 5, 2, dtype)]


@pytest.mark.parametrize("position", range(5))
def test_second_derivatives(position: int) -> None:
    args = [*small(), torch.randn(3, 4, dtype=torch.float64)]

    def loss(module: Any) -> Any:
        return lambda x: module.additive_attention(*args[:position], x, *args[position + 1 :]).pow(3).sum()

    expected = hessian(loss(reference))(args[position])
    for composed in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(composed(loss(functional))(args[position]), expected)


def test_forward_mode() -> None:
    args, tangents = small(), small()
    for mask in (None, MASK, torch.randn(3, 4, dtype=torch.float64)):
        results = [
            jvp(lambda *a, m=module, mask=mask: m.additive_attention(*a, mask), tuple(args), tuple(tangents))
            for module in (functional, reference)
        ]
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)


IN_DIMS = [
    (0, 0, 0, None, None), (0, None, None, None, None), (None, 1, None, None, None), (None, None, 2, None, None),
    (1, 0, 0, 0, None), (None, None, None, 1, None), (None, None, None, None, 0), (0, None, 0, None, 1),
]  # fmt: skip


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_is_a_loop(in_dims: Any) -> None:
    sizes = [(2, 3, 5), (4, 5), (2, 4, 6), (5,), (3, 4)]
    args = []
    for size, dim in zip(sizes, in_dims, strict=True):
        shape = list(size)
        if dim is not None:
            shape.insert(dim, 7)
        args.append(torch.randn(shape, dtype=torch.float64))

    def sample(i: int) -> list[Tensor]:
        return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]

    each = torch.stack([attend(*sample(i)) for i in range(7)])
    torch.testing.assert_close(vmap(attend, in_dims)(*args), each)
    for argnums in (tuple(range(5)), (0, 4), (2,), (1, 3)):
        gradient = grad(lambda *a: attend(*a).pow(2).sum(), argnums)
        got = vmap(gradient, in_dims)(*args)
        loop = [gradient(*sample(i)) for i in range(7)]
        for g, parts in zip(got, zip(*loop, strict=True), strict=True):
            torch.testing.assert_close(g, torch.stack(parts))


def test_vmap_of_nothing() -> None:
    query, key, value, weight = small()
    assert vmap(attend, (0, None, None, None))(query.new_zeros(0, 3, 5), key, value, weight).shape == (0, 2, 3, 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for L, S in ((3, 4), (5, 9), (8, 6)):
        args = operands((2,), L, S, 8, 3, torch.float32)
        mask = torch.randn(L, S, requires_grad=True)
        results = []
        for function in (compiled, attend):
            out = function(*args, mask)
            results.append([out, *torch.autograd.grad(out.pow(2).sum(), [*args, mask])])
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_opcheck() -> None:
    ops = torch.ops.lect11ext
    args = operands((2,), 3, 4, 5, 2, torch.float32)
    for mask in (None, MASK, torch.randn(3, 4, requires_grad=True)):
        torch.library.opcheck(ops.additive_attention.default, (*args, mask, True))
        torch.library.opcheck(ops.additive_attention.default, (*[a.detach() for a in args], mask, False))
        _, weights = ops.additive_attention(*args, mask, True)
        for inputs in (args, [a.detach() for a in args]):
            grad_output = torch.randn(2, 3, 2, requires_grad=True)
            torch.library.opcheck(
                ops.additive_attention_backward.default, (grad_output, *inputs, mask, weights, [True] * 5)
            )


def test_export() -> None:
    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
            return attend(query, key, value, weight)

    length = torch.export.Dim("length", min=2)
    args = tuple(a.detach() for a in operands((2,), 3, 4, 5, 2, torch.float32))
    exported = torch.export.export(Attend(), args, dynamic_shapes=(None, {1: length}, {1: length}, None))
    args = tuple(a.detach() for a in operands((2,), 3, 9, 5, 2, torch.float32))
    torch.testing.assert_close(exported.module()(*args), attend(*args))


def test_autocast() -> None:
    args = operands((2,), 3, 4, 5, 2, torch.float32)
    mask = torch.randn(3, 4)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = attend(*args, mask)
        assert out.dtype == torch.bfloat16
        assert attend(args[0].bfloat16(), *args[1:]).dtype == torch.bfloat16
    expected = attend(*[a.bfloat16() for a in args], mask)
    assert torch.equal(out, expected)
    assert torch.autograd.grad(out.sum(), args)[3].dtype == torch.float32


def test_subclasses_come_out_where_they_went_in() -> None:
    query, *others = (a.detach() for a in operands((2,), 3, 4, 5, 2, torch.float32))
    assert isinstance(attend(query.as_subclass(Tagged), *others), Tagged)
    mask = torch.zeros(3, 4).as_subclass(Tagged)
    assert isinstance(attend(query, *others, mask), Tagged)


def peak_bytes() -> int:
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


@pytest.mark.cpu  # measures the process
def test_memory_stays_small() -> None:
    """Forward and backward of 2000 · 2000 · 64 pairs and units, a gigabyte in float32."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("this system does not tell a process's peak")
    args = operands((), 2000, 2000, 64, 16, torch.float32)
    attend(*operands((), 16, 16, 64, 16, torch.float32)).sum().backward()
    before = peak_bytes()
    torch.autograd.grad(attend(*args).sum(), args)
    assert peak_bytes() - before <= 2000 * 2000 * 64 * 4 / 20


def test_padding_changes_no_bit() -> None:
    """Blocks of keys that no query may attend to are skipped."""
    args = [a.detach() for a in operands((), 16, 256, 32, 4, torch.float32)]
    mask = torch.arange(256) < 64
    assert torch.equal(attend(*args, mask), attend(args[0], args[1][:64], args[2][:64], args[3]))


Q, K, V, W = torch.zeros(2, 3, 8), torch.zeros(2, 5, 8), torch.zeros(2, 5, 4), torch.zeros(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q.long(), K, V, W), TypeError, "query must be float32, float64, bfloat16 or float16, but got Long"),
        ((Q, K.double(), V, W), TypeError, "key must have the type of query, Float, but got Double"),
        ((Q, K, V.half(), W), TypeError, "value must have the type of query, Float, but got Half"),
        ((Q, K, V, W.double()), TypeError, "score_weight must have the type of query, Float, but got Double"),
        ((Q[0, 0], K, V, W), ValueError, "query must be at least 2-D, but got 1-D"),
        ((Q, K, V[0, 0], W), ValueError, "value must be at least 2-D, but got 1-D"),
        ((Q, K[..., :7], V, W), ValueError, r"key must have as many columns as query, 8, but got \[2, 5, 7\]"),
        ((Q, K, V[:, :4], W), ValueError, r"value must have as many rows as key, 5, but got \[2, 4, 4\]"),
        ((Q, K, V, W[:7]), ValueError, r"score_weight must have shape \[8\] \(the columns of query\), but got \[7\]"),
        ((Q, K, V, W[None]), ValueError, r"score_weight must have shape \[8\]"),
        ((Q, K.expand(3, 2, 5, 8)[:, :1].expand(3, 4, 5, 8), V, W), ValueError, "must broadcast to"),
        ((Q, K, V, W, torch.zeros(3, 4)), ValueError, r"attn_mask must broadcast to \[2, 3, 5\], but got \[3, 4\]"),
        ((Q, K, V, W, torch.zeros(1, 2, 3, 5)), ValueError, "attn_mask must broadcast to"),
        (
            (Q, K, V, W, torch.zeros(3, 5).int()),
            TypeError,
            "attn_mask must be bool, Float or of the type of query, Float, but got Int",
        ),
        ((Q, K, V, W, torch.zeros(3, 5).double()), TypeError, "attn_mask must be bool"),
        ((Q, K.to("meta"), V, W), RuntimeError, "Expected all tensors to be on the same device, but key is on meta"),
        ((Q, K, V, W, torch.zeros(3, 5, device="meta")), RuntimeError, "but attn_mask is on meta"),
        ((Q, K, V, None), TypeError, "score_weight must be a Tensor, but got NoneType"),
        ((Q, K, [1.0], W), TypeError, "value must be a Tensor, but got list"),
        ((Q, K, V, W, "causal"), TypeError, "attn_mask must be a Tensor or None, but got str"),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attend(*arguments)


def test_a_backward_checks_what_it_is_given() -> None:
    op = torch.ops.lect11ext.additive_attention_backward
    weights, wanted = torch.zeros(2, 3, 5), [True] * 5
    with pytest.raises(ValueError, match=r"grad_output must have shape \[2, 3, 4\]"):
        op(torch.zeros(2, 3, 5), Q, K, V, W, None, weights, wanted)
    with pytest.raises(ValueError, match=r"weights must have shape \[2, 3, 5\] \(queries and keys\)"):
        op(torch.zeros(2, 3, 4), Q, K, V, W, None, weights[:1], wanted)
    with pytest.raises(TypeError, match="weights must be Float, but got Double"):
        op(torch.zeros(2, 3, 4), Q, K, V, W, None, weights.double(), wanted)
