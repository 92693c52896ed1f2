"""LSTM and GRU layers against torch.nn's, and their variants against plain torch ops, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lect11ext import nn, reference

from .common import Call, Workload, parametrize, run_turn

GATES = {"LSTM": 4, "GRU": 3}
STEPS = 64
SIZES = [(1, 64), (1, 256), (1, 512), (32, 256), (32, 512)]


def _work(gates: int, steps: int, batch: int, hidden: int, dtype: torch.dtype, train: bool) -> dict[str, float]:
    weights = 2.0 * gates * hidden * hidden
    return {
        f"product/{str(dtype)[6:]}": 2 * weights * steps * batch * (3 if train else 1),
        "copy": weights * dtype.itemsize * (3 if train else 1),
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
        f"{kind}/{'train' if train else 'forward'}/{str(dtype)[6:]}/T{STEPS}/B{batch}/H{hidden}",
        make,
        ("lect11ext", "eager", "compile"),
        work=_work(GATES[kind], STEPS, batch, hidden, dtype, train),
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
                scale = named["weight_norm_ih"]
                sums = torch.nn.functional.layer_norm(x @ named["weight_ih"].t(), scale.shape, scale)
                weights[0] = None
            return reference.lstm_layer(
                sums, (h, h), *weights, weight_peephole=named.get("weight_peephole"), lengths=lengths,
                weight_norm=named.get("weight_norm_hh"), zoneout_rate_h=layer.zoneout, zoneout_rate_c=layer.zoneout,
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
        work=_work(GATES[kind], VARIANT_STEPS, batch, hidden, torch.float32, True),
    )


WORKLOADS = (
    [_layer(kind, b, h, torch.float32, train) for kind in GATES for train in (False, True) for b, h in SIZES]
    + [_layer("LSTM", b, h, torch.bfloat16, train) for train in (False, True) for b, h in SIZES[1:]]
    + [_variant(name, b, h) for name in VARIANTS for b, h in [(1, 64), (32, 256)]]
)


@parametrize(WORKLOADS)
def test_layer(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
