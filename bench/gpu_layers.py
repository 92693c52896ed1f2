"""Layers on a GPU: ours by both paths (csrc/recurrent/layer_cuda.h), cuDNN, FlashRNN, and the cell, compiled or not,
in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lect11ext import nn

from . import name_of
from .gpu_common import Call, Machine, Workload, environment, within

# Beside the path that the library chooses.
PATHS = {"lect11ext counter": {"LECT11EXT_LAYER_DATAFLOW": "0"}}


def _graphed(m: Machine, call: Call) -> Call:
    """Captured in the first call; a plain call where there is no GPU."""
    if m.device != "cuda":
        return call
    graph: torch.cuda.CUDAGraph | None = None

    def run() -> None:
        nonlocal graph
        if graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        graph.replay()

    return run


def _steps(module: torch.nn.RNNBase, kind: str, m: Machine, compiled: bool = False) -> Call:
    """torch.nn's cell in a loop, with a layer's weights."""
    cell = getattr(torch.nn, f"{kind}Cell")(module.input_size, module.hidden_size).to(
        m.device, module.weight_ih_l0.dtype
    )
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in module.state_dict().items()})
    if compiled:
        cell.compile()

    def run(x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in x:
            state = cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)

    return run


def _flashrnn(module: torch.nn.RNNBase, kind: str) -> Call | None:
    """The same in FlashRNN (LSTM, in bfloat16), where that is installed: ``make gpu-peers``."""
    try:
        from flashrnn import flashrnn
    except ImportError:
        return None
    hidden, gates = module.hidden_size, 4
    if kind != "LSTM" or module.weight_ih_l0.dtype != torch.bfloat16:
        return None

    def run(x: Tensor) -> Tensor:
        sums = torch.nn.functional.linear(x.transpose(0, 1), module.weight_ih_l0)
        recurrent, bias = module.weight_hh_l0.view(gates, 1, hidden, hidden), module.bias_hh_l0.view(gates, 1, hidden)
        return flashrnn(sums.view(*sums.shape[:2], gates, 1, hidden), recurrent, bias, function="lstm")[0][0]

    return run


def layer(
    m: Machine, kind: str, dtype: torch.dtype, hidden: int, batch: int, train: bool, layers: int = 1, both: bool = False
) -> Workload:
    steps, batch, hidden = m.size(512, 3), m.size(batch, 2), m.size(hidden, 8)
    gates = 4 if kind == "LSTM" else 3
    directions = 2 if both else 1

    def make() -> dict[str, Call]:
        options = dict(num_layers=layers, bidirectional=both)
        torchs = getattr(torch.nn, kind)(hidden, hidden, **options).to(m.device, dtype)
        torchs.flatten_parameters()  # else cuDNN gathers them at every call
        ours = getattr(nn, kind)(hidden, hidden, **options).to(m.device, dtype)
        ours.load_state_dict(torchs.state_dict())
        x, grad = m.randn(steps, batch, hidden, dtype=dtype), m.randn(steps, batch, directions * hidden, dtype=dtype)

        def call(run: Any, module: torch.nn.Module) -> Call:
            def forward() -> Tensor:
                out = run(x)
                return out[0] if isinstance(out, tuple) else out

            def inference() -> Tensor:
                with torch.no_grad():
                    return forward()

            return (lambda: torch.autograd.grad(forward(), list(module.parameters()), grad)) if train else inference

        calls = {"lect11ext": call(ours, ours), "cudnn": call(torchs, torchs)}
        for name, variables in PATHS.items():
            calls[name] = within(lambda variables=variables: environment(**variables), calls["lect11ext"])
        if both:
            alone = {"LECT11EXT_LAYER_OVERLAP": "0"}
            calls["lect11ext, one by one"] = within(lambda: environment(**alone), calls["lect11ext"])
        elif layers == 1:
            flash = _flashrnn(torchs, kind)
            if flash is not None and not train:  # its gradients come in shapes of their own
                calls["flashrnn"] = call(flash, torchs)
            if not train:
                calls["cell in a graph"] = _graphed(m, call(_steps(torchs, kind, m), torchs))
                compiled = call(_steps(torchs, kind, m, compiled=True), torchs)
                calls["compiled cell"] = compiled
                calls["compiled cell in a graph"] = _graphed(m, compiled)
        return calls

    inputs = hidden + (layers - 1) * hidden * directions
    products = 2.0 * gates * hidden * (inputs + layers * hidden) * directions * steps * batch * (3 if train else 1)
    extent = "".join((f"/layers{layers}" if layers > 1 else "", "/bidirectional" if both else ""))
    name = f"{kind}/{'train' if train else 'forward'}/{name_of(dtype)}/T{steps}/B{batch}/H{hidden}{extent}"
    return Workload(name, make, {f"product/{name_of(dtype)}": products})


def layers(m: Machine) -> list[Workload]:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    kinds, ways = ("LSTM", "GRU"), (False, True)
    return [
        *(
            layer(m, kind, bf16, hidden, 16, t)
            for kind in kinds
            for hidden in (128, 256, 512, 1024, 2048)
            for t in ways
        ),
        *(layer(m, kind, bf16, hidden, 64, t) for kind in kinds for hidden in (256, 1024) for t in ways),
        *(layer(m, "LSTM", f16, 768, 16, t) for t in ways),  # where PyTorch takes cuDNN's persistent kernel
        *(layer(m, "LSTM", f32, hidden, 16, t) for hidden in (256, 1024) for t in ways),
        *(layer(m, "LSTM", bf16, 512, 16, t, layers=3) for t in ways),
        *(layer(m, "LSTM", bf16, 512, 16, t, both=True) for t in ways),
    ]
