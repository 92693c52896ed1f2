"""A small case of every CUDA kernel, against the CPU's: what compute-sanitizer runs.

    python tools/gpu_cases.py [--device cuda] [--only TEXT] [--share 0/3]

Prints the largest difference of each, in units of the largest value, and fails where one is beyond rounding.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lect11ext import functional, nn

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.01}
KEY = torch.tensor([7, 0])
LAYER_PATHS = {
    "counter": {"LECT11EXT_LAYER_DATAFLOW": "0"},
    "dataflow": {"LECT11EXT_LAYER_TILES": "1"},
    "two tiles": {"LECT11EXT_LAYER_TILES": "2"},
}
ALONE = {"LECT11EXT_LAYER_OVERLAP": "0"}
Case = Callable[[torch.device], list[Tensor]]


def drawn(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(device, dtype).requires_grad_()


def with_gradients(outs: Any, leaves: list[Tensor]) -> list[Tensor]:
    outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o is not None]
    total = sum((o.float().clamp(-1e4).square().sum() for o in outs), torch.zeros((), device=outs[0].device))
    return [*outs, *torch.autograd.grad(total, leaves)]


def sampling(device: torch.device) -> list[Tensor]:
    args = [drawn(device, 37, 20) for _ in range(2)]
    return with_gradients(functional.gaussian_rsample_kl(*args, key=KEY.to(device)), args)


def corruption(kind: str, dtype: torch.dtype) -> Case:
    def run(device: torch.device) -> list[Tensor]:
        x = drawn(device, 37, 21, dtype=dtype)
        outs = functional.corrupt(x, kind, 0.4, low=-2.0, high=3.0, return_mask=True, key=KEY.to(device))
        return [*with_gradients(outs[0], [x]), outs[1].to(dtype)]

    return run


def penalty(kind: str, activation: str, dtype: torch.dtype, columns: int) -> Case:
    """The op behind the functions, in all three ways of summing."""

    def run(device: torch.device) -> list[Tensor]:
        x, scale = drawn(device, 37, columns, dtype=dtype), torch.rand(columns).to(device).requires_grad_()
        leaves = [x] if kind == "mean" else [x, scale]
        outs = torch.ops.lect11ext.penalized_activation(x, None if kind == "mean" else scale, activation, kind)
        return with_gradients(outs, leaves)

    return run


def reconstruction(likelihood: str, dtype: torch.dtype, columns: int) -> Case:
    def run(device: torch.device) -> list[Tensor]:
        x, t, weight = (drawn(device, 37, columns, dtype=dtype) for _ in range(3))
        leaves = [x, t, weight]
        logvar = drawn(device, columns, dtype=dtype) if likelihood == "gaussian" else None
        loss = functional.reconstruction_loss(x, t, likelihood, logvar=logvar, weight=weight)
        return with_gradients(loss, leaves if logvar is None else [*leaves, logvar])

    return run


def sparse_code(dtype: torch.dtype, k: int) -> Case:
    """Values far enough apart that both devices select the same."""

    def run(device: torch.device) -> list[Tensor]:
        x = (torch.stack([torch.randperm(90) for _ in range(13)]) - 40).to(device, dtype).requires_grad_()
        weight, bias = drawn(device, 90, 36, dtype=dtype), drawn(device, 36, dtype=dtype)
        values, indices = functional.topk_code(x, k)
        out = functional.sparse_decode(values / 50, indices, weight, bias)
        grads = torch.autograd.grad(out.float().square().sum(), [x, weight, bias], create_graph=True)
        return [values, out, *with_gradients(grads[1], [x, weight])]

    return run


def hashing(size: int) -> Case:
    def run(device: torch.device) -> list[Tensor]:
        x = torch.randn(300, 8 * size).to(device)
        codes = functional.pack_bits(x, 0.0)
        query = codes[:5]
        outs = [
            functional.binarize(x),
            functional.unpack_bits(codes),
            functional.hamming_distance(query, codes),
            *functional.hamming_topk(query, codes, 20),
            *functional.hamming_radius(query, codes, 4 * size),
        ]
        return [codes.float(), *(out.float() for out in outs)]

    return run


def cell(kind: str, dtype: torch.dtype) -> Case:
    def run(device: torch.device) -> list[Tensor]:
        module = getattr(nn, kind)(24, 40).to(device, dtype)
        x = drawn(device, 5, 24, dtype=dtype)
        return with_gradients(module(x), [x, *module.parameters()])

    return run


def layer(
    kind: str, dtype: torch.dtype, hidden: int, path: dict[str, str] | None = None, steps: int = 7, **options: Any
) -> Case:
    """``path``: variables of the environment that choose between kernels (docs/gpu.md)."""

    def run(device: torch.device) -> list[Tensor]:
        module = getattr(nn, kind)(24, hidden, **{"bidirectional": True, **options}).to(device, dtype)
        x = drawn(device, steps, 3, 24, dtype=dtype)
        with patch.dict(os.environ, path or {}):
            return with_gradients(module(x)[0], [x, *module.parameters()])

    return run


def attention(dtype: torch.dtype, columns: int, queries: int, keys: int, mask: bool = False, **options: Any) -> Case:
    def run(device: torch.device) -> list[Tensor]:
        args = [drawn(device, 2, h, n, columns, dtype=dtype) for h, n in ((4, queries), (2, keys), (2, keys))]
        if mask:
            args.append(drawn(device, 1, 4, 1, keys, dtype=dtype))
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        out = functional.scaled_dot_product_attention(*args, enable_gqa=True, **given)
        first = torch.autograd.grad(out.float().square().sum(), args, create_graph=True)
        second = torch.autograd.grad(sum(g.float().square().sum() for g in first), args)
        return [out, *first, *second]

    return run


def varlen(device: torch.device) -> list[Tensor]:
    args = [drawn(device, 70, 2, 32) for _ in range(3)]
    starts = torch.tensor([0, 20, 20, 70], device=device)
    return with_gradients(functional.varlen_attention(*args, starts, starts, is_causal=True), args)


def additive(device: torch.device) -> list[Tensor]:
    args = [drawn(device, 2, n, 40) for n in (9, 33, 33)] + [drawn(device, 40)]
    return with_gradients(functional.additive_attention(*args), args)


def cases() -> dict[str, Case]:
    f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
    out: dict[str, Case] = {"gaussian_rsample_kl": sampling, "varlen_attention": varlen, "additive_attention": additive}
    for dtype in (f32, f64, bf16, f16):
        out[f"sparse code {str(dtype)[6:]}"] = sparse_code(dtype, 7)
    out["sparse code sorted"] = sparse_code(f32, 90)
    for noise in ("gaussian", "masking", "salt_and_pepper"):
        for dtype in (f32, f64, bf16):
            out[f"corrupt {noise} {str(dtype)[6:]}"] = corruption(noise, dtype)
    for dtype, columns in ((f32, 40), (f32, 1031), (f64, 40), (bf16, 64)):
        for kind, activation in (("l1", "tanh"), ("contractive", "sigmoid"), ("mean", "softplus")):
            out[f"penalty {kind} {str(dtype)[6:]} {columns}"] = penalty(kind, activation, dtype, columns)
        for likelihood in ("bernoulli", "continuous_bernoulli", "gaussian", "squared_error"):
            out[f"loss {likelihood} {str(dtype)[6:]} {columns}"] = reconstruction(likelihood, dtype, columns)
    for size in (3, 8, 32):
        out[f"hashing {size}"] = hashing(size)
    for kind in ("LSTM", "GRU"):
        out[f"{kind}Cell"] = cell(f"{kind}Cell", f32)
        out[f"{kind}Cell bf16"] = cell(f"{kind}Cell", bf16)
        for dtype, hidden in ((f32, 40), (bf16, 64), (f64, 20), (f32, 300)):
            out[f"{kind} {str(dtype)[6:]} {hidden}"] = layer(kind, dtype, hidden)
        for name, path in LAYER_PATHS.items():
            out[f"{kind} {name}"] = layer(kind, bf16, 136, path)
        out[f"{kind} one direction after the other"] = layer(kind, f32, 40, ALONE)
    out["LSTM peephole"] = layer("LSTM", f32, 40, peephole=True)
    out["GRU reset before"] = layer("GRU", f32, 40, reset_after=False)
    for dtype in (f32, f64, bf16, f16):
        out[f"attention {str(dtype)[6:]}"] = attention(dtype, 40, 70, 90, is_causal=True)
    out["attention float32, by finite numbers"] = attention(f32, 64, 1600, 1400)  # so many that it asks for them
    for columns in (64, 128):  # those of sm_90a have the same sizes
        out[f"attention bf16 {columns}"] = attention(bf16, columns, 200, 300)
        out[f"attention bf16 {columns} causal"] = attention(bf16, columns, 200, 200, is_causal=True)
    out["attention mask, softcap, window"] = attention(f32, 32, 70, 90, mask=True, softcap=2.0, window=(30, 20))
    out["attention dropout, slopes"] = attention(
        f32, 32, 70, 90, dropout_p=0.3, dropout_key=KEY, alibi_slopes=torch.rand(4)
    )
    for columns in (40, 64, 128):  # 40 by the kernels for all devices
        name = f"attention bf16 {columns}"
        out[f"{name} mask"] = attention(bf16, columns, 70, 150, mask=True)
        out[f"{name} padding"] = attention(bf16, columns, 70, 300, attn_mask=torch.arange(300) % 200 < 70)
        out[f"{name} slopes"] = attention(bf16, columns, 70, 150, alibi_slopes=torch.rand(4))
        out[f"{name} softcap, slopes"] = attention(bf16, columns, 70, 150, softcap=2.0, alibi_slopes=torch.rand(4))
        out[f"{name} dropout"] = attention(bf16, columns, 200, 200, dropout_p=0.3, dropout_key=KEY, window=(101, 0))
    out["attention decoding"] = attention(bf16, 128, 1, 700)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="")
    parser.add_argument("--share", default="0/1", help="of the cases, I/N: every N-th from number I on")
    options = parser.parse_args()
    first, shares = map(int, options.share.split("/"))
    failed = []
    for name, case in [c for c in cases().items() if options.only in c[0]][first::shares]:
        results = []
        for device in ("cpu", options.device):
            torch.manual_seed(0)
            results.append([x.detach().cpu() for x in case(torch.device(device))])
        worst = 0.0
        for expected, got in zip(*results, strict=True):
            error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-6)
            worst = max(worst, float(error) / TOLERANCE[expected.dtype])
        good = worst <= 1  # false for NaN
        print(f"{name}: {worst:.2f} of what is allowed{'' if good else '  FAILED'}", flush=True)
        if not good:
            failed.append(name)
    general = os.environ.get("LECT11EXT_ATTENTION_HOPPER") == "0"
    print(f"{'without attention for sm_90a' if general else 'all kernels'}: {failed or 'all good'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
