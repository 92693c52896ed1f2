"""Cells under torch.func, torch.compile, torch.export, opcheck and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from lect11ext import functional, nn, reference
from tests.helpers import flat
from tests.recurrent.test_cells import VARIANTS, cell, operands

STATES = {name: 2 if name.startswith("lstm") else 1 for name in VARIANTS}


def same(a: Any, b: Any) -> None:
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap_over_rows(variant: str) -> None:
    args = [a.detach() for a in operands(variant, 3, 4, 5, torch.float32)]
    x = torch.randn(6, 3, 4)
    in_dims = (0, *[None] * (len(args) - 1))
    same(*(vmap(cell(m, variant), in_dims)(x, *args[1:]) for m in (functional, reference)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_vmap_over_an_ensemble_of_weights(variant: str) -> None:
    args = [a.detach() for a in operands(variant, 3, 4, 5, torch.float32)]
    first = 1 + STATES[variant]
    stacked = [torch.stack([w, 2 * w], 1) for w in args[first:]]
    in_dims = (None,) * first + (1,) * len(stacked)
    same(*(vmap(cell(m, variant), in_dims)(*args[:first], *stacked) for m in (functional, reference)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_per_sample_gradients(variant: str) -> None:
    args = [a.detach() for a in operands(variant, 1, 4, 5, torch.float32)]
    x = torch.randn(6, 1, 4)

    def loss(module: Any) -> Any:
        return lambda x, w: sum(o.square().sum() for o in flat(cell(module, variant)(x, *args[1:-4], w, *args[-3:])))

    same(*(vmap(grad(loss(m), argnums=(0, 1)), (0, None))(x, args[-4]) for m in (functional, reference)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives(variant: str) -> None:
    args = [a.detach() for a in operands(variant, 2, 3, 4, torch.float64)]

    def loss(module: Any) -> Any:
        return lambda x: sum(o.pow(3).sum() for o in flat(cell(module, variant)(x, *args[1:])))

    expected = hessian(loss(reference))(args[0])
    for composed in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
        same(composed(loss(functional))(args[0]), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_jvp(variant: str) -> None:
    args = tuple(a.detach() for a in operands(variant, 2, 3, 4, torch.float32))
    tangents = tuple(torch.randn_like(a) for a in args)
    same(*(jvp(cell(m, variant), args, tangents) for m in (functional, reference)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_without_a_break(variant: str, backend: str) -> None:
    torch._dynamo.reset()
    step = cell(functional, variant)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 5, 6):
        args = operands(variant, batch, 4, 7, torch.float32)
        results = []
        for function in (step, compiled):
            outs = flat(function(*args))
            results.append([*outs, *torch.autograd.grad(outs, args, [torch.ones_like(o) for o in outs])])
        same(*results)


@pytest.mark.parametrize("module", [nn.LSTMCell, nn.GRUCell])
def test_export_with_a_dynamic_batch(module: Any) -> None:
    cell = module(3, 4)
    exported = torch.export.export(
        cell, (torch.randn(5, 3),), dynamic_shapes={"input": {0: torch.export.Dim("batch", min=2)}}
    )
    x = torch.randn(9, 3)
    same(exported.module()(x), cell(x))
    assert any("lect11ext" in str(node.target) for node in exported.graph.nodes)


def test_opcheck_of_the_lstm() -> None:
    args = operands("lstm", 3, 4, 5, torch.float32)
    ops = torch.ops.lect11ext
    torch.library.opcheck(ops.lstm_cell.default, (*args, "tanh", 0.5))
    plain = [a.detach() for a in args]
    _, c_out, gates = ops.lstm_cell(*plain, "tanh", 0.5, True)
    grads = (torch.randn(3, 5, requires_grad=True), None)
    for inputs in (args, plain):
        torch.library.opcheck(ops.lstm_cell_backward.default, (*grads, *inputs, "tanh", 0.5, gates, c_out, [True] * 7))
    mask = [True, False, False, True, False, False, True]
    torch.library.opcheck(ops.lstm_cell_backward.default, (*grads, *plain, "sigmoid", None, gates, c_out, mask))


@pytest.mark.parametrize("reset_after", [True, False])
def test_opcheck_of_the_gru(reset_after: bool) -> None:
    args = operands("gru", 3, 4, 5, torch.float32)
    ops = torch.ops.lect11ext
    torch.library.opcheck(ops.gru_cell.default, (*args, reset_after, None))
    plain = [a.detach() for a in args]
    _, gates = ops.gru_cell(*plain, reset_after, None, True)
    for inputs in (args, plain):
        torch.library.opcheck(
            ops.gru_cell_backward.default, (torch.randn(3, 5), *inputs, reset_after, None, gates, [True] * 6)
        )


@pytest.mark.parametrize("module", [nn.LSTMCell, nn.GRUCell])
def test_autocast(module: Any) -> None:
    cell, x = module(3, 4), torch.randn(5, 3, requires_grad=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        outs = flat(cell(x))
    assert all(o.dtype == torch.bfloat16 for o in outs)
    outs[0].float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32 and cell.weight_ih.grad.dtype == torch.float32


def test_checkpointing() -> None:
    cell, x = nn.LSTMCell(3, 4), torch.randn(5, 3, requires_grad=True)
    expected = torch.autograd.grad(cell(x)[0].sum(), x)
    out, _ = torch.utils.checkpoint.checkpoint(cell, x, use_reentrant=False)
    same(torch.autograd.grad(out.sum(), x), expected)


def test_compiled_autograd_is_refused_with_a_sentence() -> None:
    cell = nn.LSTMCell(3, 4)
    with (
        pytest.raises(NotImplementedError, match=r"lect11ext's ops have no compiled autograd \(LstmCellBackward\)"),
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
    ):
        cell(torch.randn(2, 3))[0].sum().backward()


def test_vmap_over_an_input_without_columns() -> None:
    out = vmap(lambda x: functional.gru_cell(x, torch.zeros(3, 4), torch.zeros(12, 0), torch.zeros(12, 4)))(
        torch.zeros(2, 3, 0)
    )
    assert out.shape == (2, 3, 4)


def test_vmap_over_no_samples() -> None:
    weights = [torch.zeros(0, 12, 5), torch.zeros(0, 12, 4)]
    out = vmap(lambda x, w, u: functional.gru_cell(x, torch.zeros(3, 4), w, u))(torch.zeros(0, 3, 5), *weights)
    assert out.shape == (0, 3, 4)
    shared = (torch.zeros(3, 4), torch.zeros(12, 5), torch.zeros(12, 4))
    for transform in (vmap, lambda f: vmap(grad(lambda x: f(x).sum()))):
        assert transform(lambda x: functional.gru_cell(x, *shared))(torch.zeros(0, 3, 5)).shape[:2] == (0, 3)
