"""Tangents of layers: the op that carries them from step to step, and what is built on it.

Where nothing requires a gradient the op runs its kernel; where something does, its definition in differentiable ATen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jacfwd, jvp, vmap

from lect11ext import functional
from tests.helpers import Ops, assert_within_rule, chain, double, gradcheck, same_for_any_threads

from .test_layer_variants import CASES, SHAPES, Case, rows

OPTIONS = ["plain", "rows", "reverse rows", "mask", "masks", "rates", "cut", "reverse rows mask masks cut"]
KINDS = ["lstm", "gru"]


def arguments(kind: str, options: str, steps: int, batch: int, hidden: int, dtype: torch.dtype) -> list[Any]:
    """Of layer_tangents, in its order."""
    gates, factors, lstm = (4, 6, True) if kind == "lstm" else (3, 5, False)

    def values(*size: int) -> Tensor:
        return (torch.randn(size) * 0.4).to(dtype)

    masks = "masks" in options
    return [
        values(steps, batch, gates * hidden),
        values(steps, batch, factors * hidden),
        values(batch, hidden),
        values(batch, hidden) if lstm else None,
        values(gates * hidden, hidden),
        values(batch, hidden) if "mask" in options.split() else None,
        torch.randint(0, steps + 1, (batch,)) if "rows" in options else None,
        torch.rand(steps, batch) < 0.3 if "rows" in options else None,
        torch.rand(steps, batch, hidden) < 0.4 if masks else None,
        torch.rand(steps, batch, hidden) < 0.4 if masks and lstm else None,
        0.2 if "rates" in options else 0.0,
        0.3 if "rates" in options else 0.0,
        2 if "cut" in options else 0,
        "reverse" in options,
    ]


def kernel(*args: Any) -> list[Tensor]:
    return [t for t in torch.ops.lect11ext.layer_tangents(*args) if t is not None]


def definition(*args: Any) -> list[Tensor]:
    """The equations of csrc/recurrent/layer.h, row by row."""
    x, factors, h, c, weight, mask, lengths, reset, zoneout_h, zoneout_c, rate_h, rate_c, truncate, reverse = args
    steps, batch, lstm = x.size(0), x.size(1), c is not None
    out, sums, cells = torch.zeros(steps, *h.shape).to(h), torch.zeros_like(x), torch.zeros(steps, *h.shape).to(h)
    last_h, last_c = h.clone(), c.clone() if lstm else None
    for b in range(batch):
        d, e = h[b], c[b] if lstm else None
        for s in range(steps):
            t = steps - 1 - s if reverse else s
            if lengths is not None and t >= lengths[b]:
                continue
            if (truncate and s and s % truncate == 0) or (reset is not None and reset[t, b]):
                d, e = torch.zeros_like(d), torch.zeros_like(d)
            sums[t, b] = x[t, b] + weight @ (d if mask is None else d * mask[b])
            f, p = factors[t, b].unflatten(0, (-1, d.numel())), sums[t, b].unflatten(0, (-1, d.numel()))
            if e is not None and lstm:
                new_e = f[0] * p[0] + f[1] * p[1] + f[2] * p[2] + f[4] * e
                new_d = f[3] * p[3] + f[5] * new_e
                kept = rate_c if zoneout_c is None else zoneout_c[t, b].to(d)
                cells[t, b] = e = kept * e + (1 - kept) * new_e
            else:
                new_d = f[0] * p[0] + f[1] * p[1] + f[2] * p[2] + f[3] + f[4] * d
            kept = rate_h if zoneout_h is None else zoneout_h[t, b].to(d)
            out[t, b] = d = kept * d + (1 - kept) * new_d
        last_h[b] = d
        if last_c is not None:
            last_c[b] = e
    return [out, last_h, last_c, sums, cells] if last_c is not None else [out, last_h, sums]


def differentiable(*args: Any) -> list[Tensor]:
    """What the op does where a gradient is asked for."""
    return [t.detach() for t in kernel(args[0].clone().requires_grad_(), *args[1:])]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_are_the_definition(kind: str, options: str) -> None:
    for size in ((1, 1, 1), (5, 3, 7), (4, 9, 40)):
        args = arguments(kind, options, *size, torch.float64)
        for way in (kernel, differentiable):
            for a, b in zip(way(*args), definition(*args), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_by_the_rule(kind: str, options: str, dtype: torch.dtype, capability: str) -> None:
    for size in ((1, 1, 1), (5, 3, 17), (3, 2, 130), (6, 29, 70)):
        args = arguments(kind, options, *size, dtype)
        wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        for triple in zip(kernel(*args), differentiable(*args), differentiable(*wide), strict=True):
            assert_within_rule(*triple, chain(size[0], dtype))


@pytest.mark.parametrize("batch", [2, 29, 101])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind: str, batch: int, dtype: torch.dtype) -> None:
    args = arguments(kind, OPTIONS[-1], 6, batch, 200, dtype)
    same_for_any_threads(lambda: kernel(*args), (1, 2, 3))


@pytest.mark.parametrize("size", [(0, 3, 4), (3, 0, 4), (0, 0, 4)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_do(kind: str, size: tuple[int, int, int]) -> None:
    args = arguments(kind, "rows", *size, torch.float32)
    for way in (kernel, differentiable):
        for a, b in zip(way(*args), definition(*args), strict=True):
            assert a.shape == b.shape
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: str) -> None:
    args = arguments(kind, "rows masks", 5, 3, 9, torch.float64)
    expected = kernel(*args)
    for i, t in enumerate(args):
        if isinstance(t, Tensor) and t.dim() > 1:
            strided = list(args)
            strided[i] = torch.stack([t, t], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
            assert all(torch.equal(a, b) for a, b in zip(kernel(*strided), expected, strict=True))
            strided[i] = torch.cat([t, t], -1)[..., : t.size(-1)]
            assert all(torch.equal(a, b) for a, b in zip(kernel(*strided), expected, strict=True))
    expanded = [args[0][:1, :1].expand_as(args[0]), *args[1:]]
    copied = [expanded[0].contiguous(), *args[1:]]
    assert all(torch.equal(a, b) for a, b in zip(kernel(*expanded), kernel(*copied), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_and_derivatives(kind: str, options: str) -> None:
    args = arguments(kind, options, 3, 2, 3, torch.float64)
    op = torch.ops.lect11ext.layer_tangents.default
    torch.library.opcheck(op, tuple(args))
    wanted = [i for i in range(6) if args[i] is not None]
    leaves = [args[i].requires_grad_() for i in wanted]
    torch.library.opcheck(op, tuple(args))

    def call(*given: Tensor) -> list[Tensor]:
        changed = list(args)
        for i, t in zip(wanted, given, strict=True):
            changed[i] = t
        return kernel(*changed)

    assert gradcheck(lambda *given: tuple(call(*given)), leaves, check_forward_ad=True)


def tangents_of(function: Any, args: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    return list(jvp(function, tuple(args), tuple(directions))[1])


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_tangents_of_layers(kind: str, variant: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = Case(kind, variant, shape, dtype)
    args = [a.detach() for a in case.args]
    directions = [(torch.randn(a.shape) * 0.4).to(dtype) for a in args]
    # Beside the recurrence's roundings, the factors': products of up to four rounded gates.
    slack = 2 * chain(shape[0], dtype) * (4 if "norm" in variant or "first" in variant else 1)
    for options in rows(*shape[:2]):
        ours, plain = case.with_options(case.ours, **options), case.with_options(case.plain, **options)
        ways = (ours, args, directions), (plain, args, directions), (plain, double(args), double(directions))
        for got, rival, exact in zip(*(tangents_of(*way) for way in ways), strict=True):
            if "norm" in variant and dtype == torch.float16:  # torch's layer_norm has tangents of NaN there
                rival = torch.where(rival.isnan(), exact.to(rival), rival)
            assert_within_rule(got, rival, exact, slack)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jvp_is_one_call_for_all_steps(kind: str) -> None:
    counts = []
    for steps in (3, 50):
        case = Case(kind, "mask zoneout masks", (steps, 2, 3, 4), torch.float32)
        args = [a.detach() for a in case.args]
        with Ops() as ops:
            tangents_of(case.ours, args, args)
        assert sum(str(func) == "lect11ext.layer_tangents.default" for func, _ in ops.calls) == 1
        counts.append(len(ops.calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind: str) -> None:
    case = Case(kind, "mask zoneout masks", (3, 2, 2, 3), torch.float64)
    args = [a.detach() for a in case.args]

    def first(module: Any) -> Any:
        return lambda *given: module(*given)[0]

    for i in range(len(args)):  # of the weights too: their tangents are batched there, and they are not
        got, expected = (jacfwd(first(m), argnums=i)(*args) for m in (case.ours, case.plain))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)

    def along(module: Any) -> Any:
        def tangent(*given: Tensor) -> Tensor:
            return jvp(first(module), given, tuple(args))[1].square().sum()

        return tangent

    every = tuple(range(len(args)))
    for got, expected in zip(*(grad(along(m), argnums=every)(*args) for m in (case.ours, case.plain)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    batch = [torch.stack([a, a * 2]) for a in args]  # of weights as well
    got, expected = (vmap(along(m))(*batch) for m in (case.ours, case.plain))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ["", "truncate zoneout", "reset lengths"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_compiled_graph_serves_all_sizes(kind: str, variant: str) -> None:
    torch._dynamo.reset()
    gates = 4 if kind == "lstm" else 3
    weights = [[torch.randn(gates * 5, n) for n in (6, 5)] for _ in range(2)]
    options: dict[str, Any] = {"truncate": 3} if "truncate" in variant else {}
    if "zoneout" in variant:
        options["zoneout"] = (0.3, 0.1) if kind == "lstm" else 0.3

    def tangent(x: Tensor, d: Tensor, h: Tensor, given: dict[str, Tensor]) -> Tensor:
        state = (h, h) if kind == "lstm" else h
        return jvp(
            lambda x: getattr(functional, kind)(x, state, weights, bidirectional=True, **options, **given)[0],
            (x,),
            (d,),
        )[1]

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tangent, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    # No two sizes of the first are the same, or they would be one; two steps are one less one, a case of its own.
    for steps, batch in ((8, 3), (9, 4), (3, 7)):
        x, d, h = torch.randn(steps, batch, 6), torch.randn(steps, batch, 6), torch.randn(2, batch, 5)
        given = {}
        if "reset" in variant:
            given = {"lengths": torch.randint(0, steps + 1, (batch,)), "reset": torch.rand(steps, batch) < 0.3}
        torch.testing.assert_close(compiled(x, d, h, given), tangent(x, d, h, given))
        counts.add(counter.frame_count)
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({1: torch.zeros(3, 2, 25)}, ValueError, r"factors must have shape \[3, 2, 30\]"),
        ({1: torch.zeros(3, 2, 30).double()}, TypeError, "factors must have the type of input"),
        ({0: torch.zeros(3, 2, 15)}, ValueError, "input must have"),
        ({0: torch.zeros(3, 2)}, ValueError, "input must be 3-D"),
        ({3: torch.zeros(2, 4)}, ValueError, r"c must have shape"),
        ({6: torch.zeros(2)}, TypeError, "lengths must be int64"),
        ({12: -1}, ValueError, "truncate must be"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes: dict[int, Any], error: type[Exception], message: str) -> None:
    args = arguments("lstm", "plain", 3, 2, 5, torch.float32)
    for i, value in changes.items():
        args[i] = value
    for device in ("cpu", "meta"):
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
        with pytest.raises(error, match=message):
            kernel(*moved)
