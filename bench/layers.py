"""LSTM and GRU layers against torch.nn's, and variants and further derivatives against plain torch ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp

from lect11ext import functional, nn, reference

from . import name_of
from .common import Call, Workload, parametrize, run_turn

GATES = {"LSTM": 4, "GRU": 3}
STEPS = 64
SIZES = [(1, 64), (1, 256), (1, 512), (32, 256), (32, 512)]


def _work(gates: int, steps: int, batch: int, hidden: int, dtype: torch.dtype, passes: int) -> dict[str, float]:
    """``passes``: how often each weight is multiplied; a backward does so twice as often as what it goes back over."""
    weights = 2.0 * gates * hidden * hidden
    return {
        f"product/{name_of(dtype)}": 2 * weights * steps * batch * passes,
        "copy": weights * dtype.itemsize * passes,
    }


def _as_call(function: Callable[[], Any], wanted: list[Tensor], train: bool) -> Call:
    def forward() -> list[Tensor]:
        output, state = function()
        return [output, *(state if isinstance(state, tuple) else (state,))]

    def training() -> Any:
        output = forward()[0]
        return torch.autograd.grad(output, wanted, torch.ones_like(output))

    def inference() -> Any:
        with torch.no_grad():
            return forward()

    return training if train else inference


def _layer(kind: str, batch: int, hidden: int, dtype: torch.dtype, train: bool) -> Workload:
    def make() -> dict[str, Call]:
        ours = getattr(nn, kind)(hidden, hidden, dtype=dtype)
        torchs = getattr(torch.nn, kind)(hidden, hidden, dtype=dtype)
        torchs.load_state_dict(ours.state_dict())
        x = torch.randn(STEPS, batch, hidden, dtype=dtype, requires_grad=train)
        calls = {"lect11ext": (ours, ours), "eager": (torchs, torchs), "compile": (torch.compile(torchs), torchs)}
        return {
            name: _as_call(lambda run=run: run(x), [x, *module.parameters()], train)  # type: ignore[misc]
            for name, (run, module) in calls.items()
        }

    return Workload(
        f"{kind}/{'train' if train else 'forward'}/{name_of(dtype)}/T{STEPS}/B{batch}/H{hidden}",
        make,
        ("lect11ext", "eager", "compile"),
        work=_work(GATES[kind], STEPS, batch, hidden, dtype, 3 if train else 1),
        tolerance=1e-3 if dtype == torch.float32 else 0.1,
    )


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer_norm": ("LSTM", {"layer_norm": True}),
    "peephole": ("LSTM", {"peephole": True}),
    "zoneout": ("LSTM", {"zoneout": 0.1}),
    "lengths": ("LSTM", {}),
    "reset_before": ("GRU", {"reset_after": False}),
}
VARIANT_STEPS = 16  # the compiled loop is unrolled: 64 steps take minutes to compile


def _variant(name: str, batch: int, hidden: int) -> Workload:
    """In eval mode, where zoneout is its expectation: both compute the same numbers."""
    kind, options = VARIANTS[name]

    def make() -> dict[str, Call]:
        layer = getattr(nn, kind)(hidden, hidden, **options).eval()
        x = torch.randn(VARIANT_STEPS, batch, hidden, requires_grad=True)
        h = torch.zeros(batch, hidden)
        lengths = torch.linspace(1, VARIANT_STEPS, batch).long() if name == "lengths" else None

        def plain() -> Any:
            named = {n.removesuffix("_l0"): p for n, p in layer.named_parameters()}
            weights = [named["weight_ih"], named["weight_hh"], named["bias_ih"], named["bias_hh"]]
            if kind == "GRU":
                return reference.gru_layer(x, h, *weights, reset_after=False)
            sums = x
            if layer.layer_norm:
                scale = named["layer_norm_ih"]
                sums = torch.nn.functional.layer_norm(x @ named["weight_ih"].t(), scale.shape, scale)
                weights[0] = None
            return reference.lstm_layer(
                sums, (h, h), *weights, weight_peephole=named.get("weight_peephole"), lengths=lengths,
                layer_norm=named.get("layer_norm_hh"), zoneout_rate_h=layer.zoneout, zoneout_rate_c=layer.zoneout,
            )  # fmt: skip

        wanted = [x, *layer.parameters()]
        return {
            "lect11ext": _as_call(lambda: layer(x, lengths=lengths), wanted, True),
            "eager": _as_call(plain, wanted, True),
            "compile": _as_call(torch.compile(plain), wanted, True),
        }

    return Workload(
        f"{kind}-{name}/train/float32/T{VARIANT_STEPS}/B{batch}/H{hidden}",
        make,
        ("lect11ext", "eager", "compile"),
        work=_work(GATES[kind], VARIANT_STEPS, batch, hidden, torch.float32, 3),
    )


DERIVATIVES = {"jvp": 3, "double_backward": 9}  # with how many passes
DERIVATIVE_STEPS = 32
COMPILED = {"jvp"}  # of the double backward four steps take a minute to compile, and 32 far more


def _derivative(name: str, batch: int, hidden: int) -> Workload:
    """Tangents of the output in a direction of all arguments; the gradient of a penalty on the squared gradients."""

    def make() -> dict[str, Call]:
        module = nn.LSTM(hidden, hidden)
        h = torch.zeros(1, batch, hidden)
        args = (torch.randn(DERIVATIVE_STEPS, batch, hidden), *(w.detach() for w in module.parameters()))
        directions = tuple(torch.randn_like(a) for a in args)
        every = tuple(range(len(args)))

        def fused(x: Tensor, *weights: Tensor) -> Tensor:
            return functional.lstm(x, (h, h), [weights])[0]

        def plain(x: Tensor, *weights: Tensor) -> Tensor:
            return reference.lstm_layer(x, (h[0], h[0]), *weights)[0]

        def tangents(function: Callable[..., Tensor]) -> Call:
            return lambda: jvp(function, args, directions)

        def double_backward(function: Callable[..., Tensor]) -> Call:
            def penalty(*args: Tensor) -> Tensor:
                grads = grad(lambda *args: function(*args).square().mean(), every)(*args)
                return sum(g.square().sum() for g in grads)  # type: ignore[return-value]

            return lambda: grad(penalty, every)(*args)

        derive = tangents if name == "jvp" else double_backward
        calls = {"lect11ext": derive(fused), "eager": derive(plain)}
        return calls | {"compile": torch.compile(derive(plain))} if name in COMPILED else calls

    return Workload(
        f"LSTM-{name}/float32/T{DERIVATIVE_STEPS}/B{batch}/H{hidden}",
        make,
        ("lect11ext", "eager", "compile") if name in COMPILED else ("lect11ext", "eager"),
        work=_work(GATES["LSTM"], DERIVATIVE_STEPS, batch, hidden, torch.float32, DERIVATIVES[name]),
    )


WORKLOADS = (
    [_layer(kind, b, h, torch.float32, train) for kind in GATES for train in (False, True) for b, h in SIZES]
    + [_layer("LSTM", b, h, torch.bfloat16, train) for train in (False, True) for b, h in SIZES[1:]]
    + [_variant(name, b, h) for name in VARIANTS for b, h in [(1, 64), (32, 256)]]
    + [_derivative(name, b, h) for name in DERIVATIVES for b, h in [(1, 64), (32, 256)]]
)


@parametrize(WORKLOADS)
def test_layer(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
