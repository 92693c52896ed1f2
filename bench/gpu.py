"""``python -m bench.gpu [--only TEXT] [--json FILE]``: the CUDA kernels against their peers and the GPU's own ceilings.

Implementations of a workload take turns, in an order that changes and with pauses, each for some milliseconds between
two events; a ratio is the median over the turns. Nothing is a peer that fails here: its error is kept in its place.
``--device cpu --small`` runs every workload once, in small, on the CPU, to find what is wrong with this file where
there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import lect11ext
from lect11ext import functional

from . import is_chosen, name_of
from .gpu_autoencoder import autoencoders
from .gpu_common import Call, Machine, Workload, ceilings, environment, within
from .gpu_layers import layers

TURN_SECONDS = 0.02
PAUSE_SECONDS = 0.01  # a large product leaves the GPU at its limit of power, and with a lower clock
HOPPER = "LECT11EXT_ATTENTION_HOPPER"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
torch_attention = torch.nn.functional.scaled_dot_product_attention


# --- what is measured ---------------------------------------------------------------------------------------------


def attention(m: Machine, dtype: torch.dtype, columns: int, length: int, causal: bool, train: bool) -> Workload:
    batch, heads, length = max(1, 16384 // length), 16, m.size(length, 20)

    def make() -> dict[str, Call]:
        args = [m.randn(batch, heads, length, columns, dtype=dtype, grad=train) for _ in range(3)]
        grad = m.randn(batch, heads, length, columns, dtype=dtype)

        def call(f: Callable[..., Any], **options: Any) -> Call:
            if train:
                return lambda: torch.autograd.grad(f(*args, **options), args, grad)
            return lambda: f(*args, **options)

        ours = call(functional.scaled_dot_product_attention, is_causal=causal)
        calls = {"lect11ext": ours}
        if dtype.itemsize == 2:  # without the kernels of sm_90a
            calls["lect11ext general"] = within(lambda: environment(**{HOPPER: "0"}), ours)
        for name, backend in BACKENDS.items():
            context = lambda backend=backend: sdpa_kernel([backend])  # noqa: E731
            calls[name] = within(context, call(torch_attention, is_causal=causal))
        if not causal:
            calls["flex"] = call(torch.compile(flex_attention))
        return calls

    pairs = length * (length + 1) / 2 if causal else float(length**2)
    flops = 4.0 * batch * heads * pairs * columns * (3.5 if train else 1)  # five products of the backward
    name = f"attention/{'train' if train else 'forward'}/{name_of(dtype)}/d{columns}/L{length}"
    return Workload(name + ("/causal" if causal else ""), make, {f"product/{name_of(dtype)}": flops})


def with_option(m: Machine, option: str, train: bool) -> Workload:
    """Of what the kernels for the plain case do not take: masks of the keys and of documents, ALiBi, dropout."""
    batch, heads, columns, length = 4, 16, 128, m.size(4096, 20)

    def make() -> dict[str, Call]:
        dtype = torch.bfloat16
        args = [m.randn(batch, heads, length, columns, dtype=dtype, grad=train) for _ in range(3)]
        grad = m.randn(batch, heads, length, columns, dtype=dtype)
        seen = torch.arange(length, device=grad.device) < length * 3 // 4
        slopes = torch.exp2(-8 * torch.arange(1, heads + 1, device=grad.device) / heads)
        positions = torch.arange(length, device=grad.device)
        bias = (-slopes.view(-1, 1, 1) * (positions.view(-1, 1) - positions).abs()).to(dtype)

        def call(f: Callable[..., Any], **options: Any) -> Call:
            if train:
                return lambda: torch.autograd.grad(f(*args, **options), args, grad)
            return lambda: f(*args, **options)

        def slope(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score - slopes[h] * (q - k).abs()

        document = positions * 4 // length
        same = document.view(-1, 1) == document

        def blocks(seen: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], dict[str, Any]]:
            kind = grad.device.type
            return lambda: {"block_mask": create_block_mask(seen, None, None, length, length, device=kind)}

        own, theirs, flex = {
            "padding": ({"attn_mask": seen.view(1, 1, 1, -1)},) * 2 + (blocks(lambda b, h, q, k: seen[k]),),
            "documents": ({"attn_mask": same},) * 2 + (blocks(lambda b, h, q, k: document[q] == document[k]),),
            "alibi": ({"alibi_slopes": slopes}, {"attn_mask": bias}, lambda: {"score_mod": slope}),
            "dropout": ({"dropout_p": 0.1},) * 2 + (None,),
        }[option]
        ours = call(functional.scaled_dot_product_attention, **own)
        calls = {"lect11ext": ours, "lect11ext general": within(lambda: environment(**{HOPPER: "0"}), ours)}
        for name, backend in BACKENDS.items():
            context = lambda backend=backend: sdpa_kernel([backend])  # noqa: E731
            calls[name] = within(context, call(torch_attention, **theirs))
        if flex is not None:
            calls["flex"] = call(torch.compile(flex_attention), **flex())
        return calls

    flops = 4.0 * batch * heads * length**2 * columns * (3.5 if train else 1)
    return Workload(f"attention/{'train' if train else 'forward'}/bfloat16/d{columns}/L{length}/{option}", make,
                    {"product/bfloat16": flops})  # fmt: skip


def decoding(m: Machine) -> Workload:
    batch, heads, kv_heads, keys, columns = 32, 32, 8, m.size(8192, 16), 128

    def make() -> dict[str, Call]:
        query = m.randn(batch, heads, 1, columns, dtype=torch.bfloat16)
        key, value = (m.randn(batch, kv_heads, keys, columns, dtype=torch.bfloat16) for _ in range(2))
        calls = {"lect11ext": lambda: functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)}
        for name, backend in BACKENDS.items():
            context = lambda backend=backend: sdpa_kernel([backend])  # noqa: E731
            calls[name] = within(context, lambda: torch_attention(query, key, value, enable_gqa=True))
        return calls

    return Workload("attention/decode/bfloat16", make, {"copy": 2.0 * 2 * batch * kv_heads * keys * columns})


def _additive(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    scores = (query[:, :, None] + key[:, None]).tanh() @ weight
    return scores.softmax(-1) @ value


def additive(m: Machine, train: bool) -> Workload:
    batch, length, hidden = 8, m.size(512, 8), m.size(256, 8)

    def make() -> dict[str, Call]:
        args = [m.randn(batch, length, hidden, grad=train) for _ in range(3)] + [m.randn(hidden, grad=train)]
        grad = m.randn(batch, length, hidden)

        def call(f: Callable[..., Any]) -> Call:
            if train:
                return lambda: torch.autograd.grad(f(*args), args, grad)
            return lambda: f(*args)

        return {
            "lect11ext": call(functional.additive_attention),
            "eager": call(_additive),
            "compile": call(torch.compile(_additive)),
        }

    return Workload(f"additive_attention/{'train' if train else 'forward'}", make, {})


def workloads(m: Machine) -> list[Workload]:
    bf16, f32 = torch.bfloat16, torch.float32
    both = (False, True)
    return [
        *autoencoders(m),
        *(attention(m, bf16, d, n, c, t) for d in (64, 128) for n in (2048, 8192, 16384) for c in both for t in both),
        *(attention(m, f32, d, 2048, False, t) for d in (64, 128) for t in both),
        *(with_option(m, option, t) for option in ("padding", "documents", "alibi", "dropout") for t in both),
        decoding(m),
        *layers(m),
        *(additive(m, train) for train in both),
    ]


# --- the run ------------------------------------------------------------------------------------------------------


def measure(
    m: Machine, work: Workload, peaks: dict[str, tuple[Call, float]], options: argparse.Namespace
) -> dict[str, Any]:
    torch.manual_seed(0)
    random.seed(0)
    calls, errors, counts = {}, {}, {}
    try:
        given = {name: call for name, call in work.make().items() if name not in options.without.split(",")}
    except Exception as error:
        given, errors["lect11ext, before any call"] = {}, _summary(error)
    for name, call in {**given, **{peak: peaks[peak][0] for peak in work.work}}.items():
        try:
            for _ in range(2):
                call()
            m.synchronize()
            seconds = m.seconds(call, 1)
        except Exception as error:  # a peer that has no kernel for this
            errors[name] = _summary(error)
            continue
        calls[name], counts[name] = call, max(1, min(100, round(TURN_SECONDS / seconds)))
    names, turns = list(calls), []
    for _ in range(options.turns if calls else 0):
        random.shuffle(names)  # whoever always came behind a product would be the slower for it
        turns.append({})
        for name in names:
            time.sleep(PAUSE_SECONDS if m.device == "cuda" else 0)
            turns[-1][name] = m.seconds(calls[name], counts[name])
    result: dict[str, Any] = {"errors": errors, "seconds": {n: median(t[n] for t in turns) for n in calls}}
    ours = [name for name in calls if name.startswith("lect11ext")]
    peers = [name for name in calls if name in given and name not in ours]
    result["ratios"] = {o: {p: median(t[p] / t[o] for t in turns) for p in peers} for o in ours}
    result["per_cent"] = {
        o: {k: 100 * median(t[k] / t[o] for t in turns) * w / peaks[k][1] for k, w in work.work.items() if k in calls}
        for o in ours
    }
    return result


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def line(name: str, result: dict[str, Any]) -> str:
    parts = [f"{name:44}"]
    for ours, ratios in result["ratios"].items():
        best = min(ratios, key=lambda p: ratios[p], default=None)
        peer = f"{ratios[best]:.2f} × {best}" if best else "no peer"
        share = ", ".join(f"{v:.0f} % of {k}" for k, v in result["per_cent"][ours].items())
        parts.append(f"{ours} {result['seconds'][ours] * 1e6:.0f} us, {peer}, {share}")
    return "; ".join(parts + [f"{name} failed: {error}" for name, error in result["errors"].items()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="only workloads whose name contains this text, or one of these")
    parser.add_argument(
        "--json", default="out/gpu-bench.json", help="where the results are written, after each workload"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after these no workload is begun")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--turns", type=int, default=5, help="how often the implementations take turns")
    parser.add_argument(
        "--without",
        default="",
        help="peers to leave out; 'compile,flex,flashrnn,compiled cell' are those that take long to build",
    )
    options = parser.parse_args()
    begin, m = time.perf_counter(), Machine(options.device, options.small)
    out = Path(options.json)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "lect11ext": lect11ext.__version__,
    }
    peaks, results, left_out = ceilings(m), {}, []
    for work in workloads(m):
        if not is_chosen(work.name, options.only):
            continue
        if time.perf_counter() - begin > options.seconds:
            left_out.append(work.name)
            continue
        torch._dynamo.reset()
        results[work.name] = measure(m, work, peaks, options)
        print(line(work.name, results[work.name]), flush=True)
        out.write_text(json.dumps({**facts, "results": results, "left_out": left_out}, indent=1))
    for name, (call, amount) in peaks.items():
        call()
        facts[name] = amount / median(m.seconds(call, 3) for _ in range(options.turns))
        print(f"{name}: {facts[name] / 1e9:.1f} G/s")
    out.write_text(json.dumps({**facts, "results": results, "left_out": left_out}, indent=1))
    failed = [name for name, r in results.items() if any(e.startswith("lect11ext") for e in r["errors"])]
    if left_out or failed:
        print(f"left out: {left_out}; failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
