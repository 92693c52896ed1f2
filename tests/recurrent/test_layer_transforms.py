"""Layers under torch.func, torch.compile, torch.export, autocast, checkpointing and without data."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from lect11ext import functional, nn
from tests.conftest import DTYPES
from tests.helpers import Tagged, Watch
from tests.recurrent.test_layer_modules import KINDS, B, F, H, T, flat, make, pack_states

KEYS = [("LSTM", {}), ("GRU", {}), ("LSTM", {"proj_size": 3})]
LAYERS = pytest.mark.parametrize(("kind", "options"), KEYS, ids=["LSTM", "GRU", "projected"])


def same(a: Any, b: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """By default float32 sums in another order, over all steps and rows."""
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def build(kind: str, options: dict[str, Any], **more: Any) -> Any:
    return getattr(nn, kind)(F, H, 2, bidirectional=True, **options, **more)


def masks(samples: int) -> dict[str, Tensor]:
    return {"lengths": torch.randint(0, T + 1, (samples, B)), "reset": torch.rand(samples, T, B) < 0.3}


def by_hand(function: Callable[..., Any], *batched: Tensor) -> list[Tensor]:
    return [
        torch.stack(results)
        for results in zip(*(function(*sample) for sample in zip(*batched, strict=True)), strict=True)
    ]


@pytest.mark.parametrize("grads", [False, True])
@LAYERS
def test_vmap_over_inputs(kind: str, options: dict[str, Any], grads: bool) -> None:
    layer = build(kind, options).requires_grad_(grads)
    x = torch.randn(4, T, B, F, requires_grad=grads)
    got, expected = vmap(lambda x: flat(layer(x)))(x), by_hand(lambda x: flat(layer(x)), x)
    same(got, expected)
    same(vmap(lambda x: flat(layer(x)), 2)(x.movedim(0, 2)), expected)
    if grads:
        wanted = [x, *layer.parameters()]
        same(*(torch.autograd.grad(sum(o.square().sum() for o in outs), wanted) for outs in (got, expected)))


@pytest.mark.parametrize("batch_first", [False, True])
@LAYERS
def test_vmap_over_masks_and_states(kind: str, options: dict[str, Any], batch_first: bool) -> None:
    layer = build(kind, options, batch_first=batch_first)
    given = masks(3)
    x = torch.randn(3, T, B, F)
    h, c = torch.randn(3, 4, B, layer.proj_size or H), torch.randn(3, 4, B, H)

    def call(x: Tensor, lengths: Tensor, reset: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        if batch_first:
            x, reset = x.transpose(0, 1), reset.t()
        return flat(layer(x, pack_states((h, c) if kind == "LSTM" else (h,)), lengths=lengths, reset=reset))

    every = [x, given["lengths"], given["reset"], h, c]
    for batched in itertools.product([False, True], repeat=3):  # input, lengths, reset
        chosen = (*batched, False, True)
        args = [a if b else a[0] for a, b in zip(every, chosen, strict=True)]
        same(
            vmap(call, tuple(0 if b else None for b in chosen))(*args),
            by_hand(call, *(a if b else a.expand(3, *a.shape) for a, b in zip(args, chosen, strict=True))),
        )


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_vmap_over_every_parameter_alone(kind: str) -> None:
    layer, x = build(kind, {"layer_norm": True}), torch.randn(T, B, F)
    for name, p in layer.named_parameters():

        def call(w: Tensor, name: str = name) -> list[Tensor]:
            return flat(functional_call(layer, {name: w}, (x,)))

        many = torch.stack([p.detach() + 0.1 * i for i in range(3)])
        same(vmap(call)(many), by_hand(call, many))


@LAYERS
def test_vmap_over_an_ensemble(kind: str, options: dict[str, Any]) -> None:
    layers = [build(kind, options) for _ in range(3)]
    weights, buffers = stack_module_state(layers)
    base, x = copy.deepcopy(layers[0]).to("meta"), torch.randn(T, B, F)
    got = vmap(lambda w, b: flat(functional_call(base, (w, b), (x,))))(weights, buffers)
    expected = [torch.stack(outs) for outs in zip(*(flat(layer(x)) for layer in layers), strict=True)]
    same(got, expected)
    same(
        torch.autograd.grad(got[0].square().sum(), list(weights.values())),
        [
            torch.stack(g)
            for g in zip(
                *(torch.autograd.grad(m(x)[0].square().sum(), list(m.parameters())) for m in layers), strict=True
            )
        ],
    )


@LAYERS
def test_vmap_over_nothing(kind: str, options: dict[str, Any]) -> None:
    layer, width = build(kind, options), 2 * (options.get("proj_size") or H)
    for samples, steps, batch in ((0, T, B), (2, 0, B), (2, T, 0)):
        x = torch.randn(samples, steps, batch, F)
        assert vmap(lambda x: layer(x)[0])(x).shape == (samples, steps, batch, width)
        assert vmap(grad(lambda x: layer(x)[0].sum()))(x).shape == x.shape


@LAYERS
def test_nested_vmap(kind: str, options: dict[str, Any]) -> None:
    layer, x = build(kind, options), torch.randn(2, 3, T, B, F)
    got = vmap(vmap(lambda x: layer(x)[0], out_dims=1), in_dims=1, out_dims=2)(x)  # [T inside, 2, 3, …]
    assert got.shape[:3] == (T, 2, 3)
    same(got.movedim(0, 2), torch.stack([by_hand(lambda x: flat(layer(x)), row)[0] for row in x]))


@LAYERS
def test_per_sample_gradients(kind: str, options: dict[str, Any]) -> None:
    layer = build(kind, options)
    x, lengths = torch.randn(4, T, F), torch.tensor([5, 0, 2, 3])
    weights = {name: w.detach() for name, w in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        outs = flat(functional_call(layer, weights, (x[:, None],), {"lengths": lengths[None]}))
        return sum(o.pow(3).sum() for o in outs)

    got = vmap(grad(loss, argnums=(0, 1)), (None, 0, 0))(weights, x, lengths)
    for i in range(4):
        expected = grad(loss, argnums=(0, 1))(weights, x[i], lengths[i])
        same(torch.utils._pytree.tree_map(lambda g, i=i: g[i], got), expected)


@pytest.mark.cpu  # neither has cuDNN's any, nor a second derivative
@LAYERS
def test_jvp(kind: str, options: dict[str, Any]) -> None:
    ours, torchs = make(kind, F, H, 2, bidirectional=True, dtype=torch.float64, **options)  # oneDNN's has no jvp
    names = [name for name, _ in ours.named_parameters()]
    primals = (torch.randn(T, B, F).double(), *(w.detach() for w in ours.parameters()))
    tangents = tuple(torch.randn_like(p) for p in primals)

    def call(layer: Any) -> Callable[..., Any]:
        return lambda x, *w: flat(functional_call(layer, dict(zip(names, w, strict=True)), (x,)))

    same(*(jvp(call(layer), primals, tangents) for layer in (ours, torchs)), rtol=1e-9, atol=1e-12)


@pytest.mark.cpu
@LAYERS
def test_second_derivatives(kind: str, options: dict[str, Any]) -> None:
    options = {"proj_size": 2} if options else {}
    ours, torchs = make(kind, 2, 3, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(3, 2, 2, dtype=torch.float64)

    def loss(layer: Any) -> Callable[..., Any]:
        return lambda x: sum(o.pow(3).sum() for o in flat(layer(x)))

    expected = jacrev(jacrev(loss(torchs)))(x)
    for composed in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacfwd(f))):
        same(composed(loss(ours))(x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_make_fx(kind: str) -> None:
    layer = build(kind, {})
    with torch.no_grad():
        traced = make_fx(lambda x: flat(layer(x)), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            torch.randn(T, B, F)
        )
        x = torch.randn(T + 2, B + 3, F)
        same(traced(x), flat(layer(x)))
    assert sum(f"{kind.lower()}_layer" in str(node.target) for node in traced.graph.nodes) == 4


def trained(layer: Any, call: Callable[..., Any], x: Tensor, hx: Any, given: dict[str, Tensor]) -> list[Tensor]:
    outs = flat(call(x, hx, **given))
    states = list(hx) if isinstance(hx, tuple) else [hx]
    return [*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), [x, *states, *layer.parameters()])]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_without_a_break(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    layer = getattr(nn, kind)(F, H, 2, bidirectional=True, grad_clip=1.0)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for steps, batch in ((5, 3), (9, 4), (2, 7)):
        x = torch.randn(steps, batch, F, requires_grad=True)
        hx = pack_states(tuple(torch.randn(4, batch, H, requires_grad=True) for _ in range(2 if kind == "LSTM" else 1)))
        given = {"lengths": torch.randint(0, steps + 1, (batch,)), "reset": torch.rand(steps, batch) < 0.3}
        same(*(trained(layer, call, x, hx, given) for call in (compiled, layer)))
        counts.add(counter.frame_count)
    assert len(counts) == 1  # the first graph serves all sizes


def test_compile_of_projections() -> None:
    torch._dynamo.reset()
    layer = nn.LSTM(F, H, proj_size=3, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, 3, F, requires_grad=True)
    hx = (torch.randn(1, B, 3, requires_grad=True), torch.randn(1, B, H, requires_grad=True))
    same(*(trained(layer, call, x, hx, {}) for call in (compiled, layer)))


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_export_with_dynamic_sizes(kind: str, with_masks: bool) -> None:
    layer = build(kind, {})
    steps, batch = Dim("steps", min=2), Dim("batch", min=2)
    shapes: dict[str, Any] = {"input": {0: steps, 1: batch}}
    if with_masks:
        shapes |= {"lengths": {0: batch}, "reset": {0: steps, 1: batch}}

    def given(steps: int, batch: int) -> dict[str, Tensor]:
        lengths, reset = torch.randint(0, steps + 1, (batch,)), torch.rand(steps, batch) < 0.3
        return {"lengths": lengths, "reset": reset} if with_masks else {}

    exported = torch.export.export(layer, (torch.randn(T, B, F),), given(T, B), dynamic_shapes=shapes)
    for sizes in ((9, 2), (2, 6)):
        x, more = torch.randn(*sizes, F), given(*sizes)
        same(exported.module()(x, **more), layer(x, **more))
    assert sum(f"{kind.lower()}_layer" in str(node.target) for node in exported.graph.nodes) == 4


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True, "zoneout": 0.1, "peephole": True}], ids=str)
def test_export_of_projections_fixes_the_steps_alone(options: dict[str, Any], with_masks: bool) -> None:
    layer = build("LSTM", {"proj_size": 3}, **options).eval()
    rows, batch = 0 if options else 1, Dim("batch", min=2)

    def given(batch: int) -> dict[str, Tensor]:
        reset = torch.rand(T, batch) < 0.3
        masks = {"lengths": torch.randint(0, T + 1, (batch,)), "reset": reset.t() if options else reset}
        x = torch.randn(T, batch, F)
        return {"input": x.transpose(0, 1) if options else x, **(masks if with_masks else {})}

    shapes = {name: {0 if name == "lengths" else rows: batch} for name in given(B)}
    exported = torch.export.export(layer, (), given(B), dynamic_shapes=shapes)
    for size in (2, 7):
        args = given(size)
        same(exported.module()(**args), layer(**args))
    with pytest.raises(Exception, match="steps"):  # the loop over them is unrolled
        torch.export.export(layer, (torch.randn(T, T, F),), dynamic_shapes={"input": {1 - rows: Dim("steps", min=2)}})


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_of_tangents_serve_every_batch(kind: str) -> None:
    layer = build(kind, {})

    def tangents(x: Tensor, d: Tensor) -> list[Tensor]:
        return jvp(lambda x: flat(layer(x)), (x,), (d,))[1]

    pairs = [(torch.randn(T, batch, F), torch.randn(T, batch, F)) for batch in (B, 2, 7)]
    traced = make_fx(tangents, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*pairs[0])
    for pair in pairs:
        same(traced(*pair), tangents(*pair))


@LAYERS
def test_export_of_inference(kind: str, options: dict[str, Any]) -> None:
    layer = build(kind, options).requires_grad_(False)
    exported = torch.export.export(
        layer, (torch.randn(T, B, F),), dynamic_shapes={"input": {0: Dim("steps", min=2), 1: Dim("batch", min=2)}}
    )
    x = torch.randn(9, 7, F)
    same(exported.module()(x), layer(x))


@LAYERS
def test_autocast(kind: str, options: dict[str, Any]) -> None:
    layer, x = build(kind, options), torch.randn(T, B, F, requires_grad=True)
    wide = flat(layer(x))
    for given in (x, x.bfloat16()):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            outs = flat(layer(given))
        assert all(o.dtype == torch.bfloat16 for o in outs)
        same([o.float() for o in outs], wide, rtol=0, atol=0.03)  # some roundings to 8 bits of numbers below 1
    grads = torch.autograd.grad(sum(o.float().square().sum() for o in outs), [x, *layer.parameters()])
    expected = torch.autograd.grad(sum(o.square().sum() for o in wide), [x, *layer.parameters()])
    for g, e in zip(grads, expected, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < 0.05 * e.norm()


@LAYERS
def test_checkpointing(kind: str, options: dict[str, Any]) -> None:
    layer, x = build(kind, options, dropout=0.4), torch.randn(T, B, F, requires_grad=True)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)  # the dropout is drawn again as it was
        grads.append(torch.autograd.grad(call(x)[0].square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@LAYERS
def test_two_runs_agree_bit_for_bit(kind: str, options: dict[str, Any]) -> None:
    layer, x = build(kind, options), torch.randn(T, B, F, requires_grad=True)
    runs = []
    for _ in range(2):
        outs = flat(layer(x))
        runs.append([*outs, *torch.autograd.grad(outs[0].sum(), [x, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@LAYERS
def test_shapes_without_data(kind: str, options: dict[str, Any]) -> None:
    real = build(kind, options)

    def facts(layer: Any, device: str | None = None) -> list[Any]:
        x = torch.randn(T, B, F, device=device, requires_grad=True)
        outs = flat(layer(x, lengths=torch.ones(B, dtype=torch.int64, device=device)))
        grads = torch.autograd.grad(sum(o.sum() for o in outs), [x, *layer.parameters()])
        return [(t.shape, t.stride(), t.dtype) for t in (*outs, *grads)]

    expected = facts(real)
    assert facts(real.to("meta"), "meta") == expected
    with FakeTensorMode():
        assert facts(build(kind, options)) == expected


@LAYERS
def test_subclasses_and_function_modes_see_the_call(kind: str, options: dict[str, Any]) -> None:
    layer, x = build(kind, options), torch.randn(T, B, F)
    assert all(type(o) is Tagged for o in flat(layer(x.as_subclass(Tagged))))
    h = torch.zeros(4, B, layer.proj_size or H).as_subclass(Tagged)
    assert type(layer(x, (h, torch.zeros(4, B, H)) if kind == "LSTM" else h)[0]) is Tagged
    with Watch() as watch:
        layer(x)
    assert sum(f"{kind.lower()}_layer" in name for name in watch.seen) == 4


def test_transforms_of_the_functions() -> None:
    weights = nn.GRU(F, H, 2).all_weights
    x, h = torch.randn(3, T, F), torch.randn(3, 2, H)
    got = vmap(lambda x, h: functional.gru(x, h, weights))(x, h)  # unbatched, over samples: a batch
    output, last = functional.gru(x, h.transpose(0, 1), weights, batch_first=True)
    same(got, (output, last.transpose(0, 1)))


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_beyond_the_lengths_reaches_no_derivative(kind: str, options: dict[str, Any]) -> None:
    layer, lengths = build(kind, options, dtype=torch.float64), torch.tensor([2, 0, 5])
    beyond = (torch.arange(T)[:, None] >= lengths)[..., None]
    clean = torch.randn(T, B, F).double().masked_fill(beyond, 0)
    weights = {name: w.detach() for name, w in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, weights, (x,), {"lengths": lengths})[0].pow(3).sum()

    def derivatives(x: Tensor) -> list[Any]:
        ones = torch.utils._pytree.tree_map(torch.ones_like, (weights, x))
        return [jvp(loss, (weights, x), ones), jvp(grad(loss, argnums=(0, 1)), (weights, x), ones)]

    same(derivatives(clean.masked_fill(beyond, torch.nan)), derivatives(clean), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [{}, {"lengths": torch.tensor([2, 0, 5])}], ids=["all", "lengths"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_tangents_under_a_norm(kind: str, rows: dict[str, Tensor]) -> None:
    """torch's own layer_norm gives wrong ones."""
    layer = build(kind, {"layer_norm": True}, dtype=torch.float64).requires_grad_(False)
    x, v = torch.randn(2, T, B, F).double()

    def loss(x: Tensor) -> Tensor:
        return sum(o.pow(3).sum() for o in flat(layer(x, **rows)))

    def tangent(x: Tensor) -> Tensor:
        return jvp(loss, (x,), (v,))[1]

    assert torch.autograd.gradcheck(tangent, x.clone().requires_grad_())
    expected = jvp(grad(loss), (x,), (v,))[1]
    same(grad(tangent)(x), expected, rtol=1e-9, atol=1e-11)
    with torch.autograd.forward_ad.dual_level():  # not through torch.func
        leaf = x.clone().requires_grad_()
        dual = loss(torch.autograd.forward_ad.make_dual(leaf, v))
        (got,) = torch.autograd.grad(torch.autograd.forward_ad.unpack_dual(dual).tangent, leaf)
    same(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_under_jvp_is_the_same_norm(kind: str, dtype: torch.dtype) -> None:
    layer, x = build(kind, {"layer_norm": True}, dtype=dtype), torch.randn(T, B, F).to(dtype)
    tolerance = 8 * torch.finfo(dtype).eps  # a few roundings of numbers below 1
    outs, tangents = jvp(lambda x: flat(layer(x)), (x,), (x,))
    assert all(t.dtype == dtype for t in (*outs, *tangents))
    same(outs, flat(layer(x)), rtol=tolerance, atol=tolerance)
