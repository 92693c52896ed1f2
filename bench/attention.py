"""Dot-product attention against torch's fused op, torch.compile and, forward only, FlexAttention; the module against
torch.nn's; what is skipped against our own dense time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lect11ext import nn
from lect11ext.functional import scaled_dot_product_attention

from . import name_of
from .common import Call, Workload, call_of, parametrize, run_turn

torch_attention = torch.nn.functional.scaled_dot_product_attention
BOTH = [torch.float32, torch.bfloat16]
HEADS = {128: (2, 8), 512: (2, 8), 1024: (1, 8), 2048: (1, 8), 8192: (1, 2)}  # batch and heads, by length
BACKWARD = 3.5  # times the forward's two products, with them: five more


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype == torch.float32 else 0.1


def _product(dtype: torch.dtype, batch: int, heads: int, pairs: float, columns: int, passes: float) -> dict[str, float]:
    """``pairs`` of queries and keys, ``columns`` of keys and values together."""
    return {f"product/{name_of(dtype)}": 2.0 * batch * heads * pairs * columns * passes}


def _inference(function: Callable[..., Any], *args: Any, **options: Any) -> Call:
    return call_of(partial(function, **options), args)


def _training(function: Callable[..., Any], wanted: list[Tensor], grad: Tensor, *args: Any, **options: Any) -> Call:
    return call_of(partial(function, **options), args, wanted, grad)


def _flex(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Call:
    """Compiled, as it is meant to be; with the blocks that it may skip."""
    mask = None
    if causal:
        length = query.size(2)
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
    return _inference(torch.compile(flex_attention), query, key, value, block_mask=mask)


def _forward(dtype: torch.dtype, columns: int, length: int, causal: bool) -> Workload:
    batch, heads = HEADS[length]

    def make() -> dict[str, Call]:
        args = [torch.randn(batch, heads, length, columns, dtype=dtype) for _ in range(3)]
        return {
            "lect11ext": _inference(scaled_dot_product_attention, *args, is_causal=causal),
            "eager": _inference(torch_attention, *args, is_causal=causal),
            "compile": _inference(torch.compile(torch_attention), *args, is_causal=causal),
            "flex": _flex(*args, causal),
        }

    pairs = length * (length + 1) / 2 if causal else length**2
    return Workload(
        f"attention/forward/{name_of(dtype)}/d{columns}/L{length}{'/causal' if causal else ''}",
        make,
        ("lect11ext", "eager", "compile", "flex"),
        work=_product(dtype, batch, heads, pairs, 2 * columns, 1),
        tolerance=_tolerance(dtype),
    )


def _against_torch(call: Callable[[Callable[..., Any]], Call]) -> dict[str, Call]:
    return {
        "lect11ext": call(scaled_dot_product_attention),
        "eager": call(torch_attention),
        "compile": call(torch.compile(torch_attention)),
    }


def _train(dtype: torch.dtype, columns: int, length: int, causal: bool) -> Workload:
    batch, heads = HEADS[length]

    def make() -> dict[str, Call]:
        args = [torch.randn(batch, heads, length, columns, dtype=dtype, requires_grad=True) for _ in range(3)]
        grad = torch.randn_like(args[0])

        def call(function: Callable[..., Any]) -> Call:
            return _training(function, args, grad, *args, is_causal=causal)

        return _against_torch(call)

    pairs = length * (length + 1) / 2 if causal else length**2
    return Workload(
        f"attention/train/{name_of(dtype)}/d{columns}/L{length}{'/causal' if causal else ''}",
        make,
        ("lect11ext", "eager", "compile"),
        work=_product(dtype, batch, heads, pairs, 2 * columns, BACKWARD),
        tolerance=_tolerance(dtype),
    )


def _short(batch: int, heads: int, length: int, columns: int, train: bool) -> Workload:
    """Many short sequences, as small models have them: what each of them costs beside the products."""

    def make() -> dict[str, Call]:
        args = [torch.randn(batch, heads, length, columns, requires_grad=train) for _ in range(3)]
        grad = torch.randn(batch, heads, length, columns)

        def call(function: Callable[..., Any]) -> Call:
            return _training(function, args, grad, *args) if train else _inference(function, *args)

        return _against_torch(call)

    return Workload(
        f"attention/{'train' if train else 'forward'}/float32/{batch}x{heads}/L{length}/d{columns}",
        make,
        ("lect11ext", "eager", "compile"),
        work=_product(torch.float32, batch, heads, float(length**2), 2 * columns, BACKWARD if train else 1),
    )


def _decode(dtype: torch.dtype, keys: int) -> Workload:
    """One query of 256 heads and samples: keys and values are read once, and that is all."""
    batch, heads, columns = 8, 32, 64

    def make() -> dict[str, Call]:
        query = torch.randn(batch, heads, 1, columns, dtype=dtype)
        key, value = (torch.randn(batch, heads, keys, columns, dtype=dtype) for _ in range(2))
        return {
            "lect11ext": _inference(scaled_dot_product_attention, query, key, value),
            "eager": _inference(torch_attention, query, key, value),
            "compile": _inference(torch.compile(torch_attention), query, key, value),
            "flex": _flex(query, key, value, causal=False),
        }

    return Workload(
        f"attention/decode/{name_of(dtype)}/keys{keys}",
        make,
        ("lect11ext", "eager", "compile", "flex"),
        work={"copy": 2.0 * batch * heads * keys * columns * dtype.itemsize},
        tolerance=_tolerance(dtype),
    )


def _few_queries(dtype: torch.dtype, queries: int, keys: int) -> Workload:
    """A pooling's training: keys and values are read, and as much is written as their gradients."""
    batch, heads, columns = 8, 8, 64

    def make() -> dict[str, Call]:
        args = [torch.randn(batch, heads, n, columns, dtype=dtype, requires_grad=True) for n in (queries, keys, keys)]
        grad = torch.randn_like(args[0])
        return _against_torch(lambda function: _training(function, args, grad, *args))

    return Workload(
        f"attention/few_queries/{name_of(dtype)}/L{queries}/keys{keys}",
        make,
        ("lect11ext", "eager", "compile"),
        # Read twice, and written once: a copy counts each way.
        work={"copy": 6.0 * batch * heads * keys * columns * dtype.itemsize},
        tolerance=_tolerance(dtype),
    )


def _skipping(kind: str, dtype: torch.dtype) -> Workload:
    """What a window or a mask of blocks leaves out, against all pairs: "dense" is our own time for those."""
    batch, heads, length, columns, block = 1, 2, 8192, 64, 256

    def make() -> dict[str, Call]:
        args = [torch.randn(batch, heads, length, columns, dtype=dtype) for _ in range(3)]
        options: dict[str, Any] = {"window": (256, 256)}
        if kind == "half_mask":  # every other block, like a chessboard
            blocks = torch.arange(length) // block
            options = {"attn_mask": (blocks[:, None] + blocks) % 2 == 0}
        return {
            "lect11ext": _inference(scaled_dot_product_attention, *args, **options),
            "dense": _inference(scaled_dot_product_attention, *args),
        }

    pairs = length * 513.0 if kind == "window256" else length**2 / 2
    return Workload(
        f"attention/{kind}/{name_of(dtype)}/L{length}",
        make,
        ("lect11ext", "dense"),
        work=_product(dtype, batch, heads, pairs, 2 * columns, 1),
        check=False,
    )


def _option(kind: str, length: int) -> Workload:
    """What takes torch off its fused path, forward and backward."""
    batch, heads, columns = 2, 8, 64
    value_columns = 128 if kind == "wide_values" else columns

    def make() -> dict[str, Call]:
        lead = (batch * heads,) if kind == "3d" else (batch, heads)
        args = [torch.randn(*lead, length, n, requires_grad=True) for n in (columns, columns, value_columns)]
        if kind == "mask_gradient":
            args.append(torch.randn(heads, length, length, requires_grad=True))
        grad = torch.randn(*lead, length, value_columns)
        options = {"dropout_p": 0.1} if kind == "dropout" else {}

        def call(function: Callable[..., Any]) -> Call:
            return _training(function, args, grad, *args, **options)

        return _against_torch(call)

    return Workload(
        f"attention-{kind}/train/float32/L{length}",
        make,
        ("lect11ext", "eager", "compile"),
        work=_product(torch.float32, batch, heads, length**2, columns + value_columns, BACKWARD),
        check=kind != "dropout",
    )


def _tangent(length: int, causal: bool) -> Workload:
    """A jvp along all three inputs; torch has a rule only for its math path."""
    batch, heads, columns = 1, 4, 64

    def make() -> dict[str, Call]:
        args = tuple(torch.randn(batch, heads, length, columns) for _ in range(3))
        directions = tuple(torch.randn_like(a) for a in args)

        def ours() -> Any:
            return jvp(lambda *a: scaled_dot_product_attention(*a, is_causal=causal), args, directions)

        def torchs() -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return jvp(lambda *a: torch_attention(*a, is_causal=causal), args, directions)

        return {"lect11ext": ours, "eager": torchs}

    pairs = length * (length + 1) / 2 if causal else length**2
    return Workload(
        f"attention-jvp/float32/L{length}{'/causal' if causal else ''}",
        make,
        ("lect11ext", "eager"),
        work=_product(torch.float32, batch, heads, pairs, 2 * columns, 4),  # the forward, and three times as much
    )


def _module(length: int, train: bool, need_weights: bool) -> Workload:
    width, heads, batch = 512, 8, 2

    def make() -> dict[str, Call]:
        ours = nn.MultiheadAttention(width, heads, batch_first=True).train(train)
        torchs = torch.nn.MultiheadAttention(width, heads, batch_first=True).train(train)
        torchs.load_state_dict(ours.state_dict())
        x = torch.randn(batch, length, width, requires_grad=train)
        grad = torch.randn_like(x)

        def call(run: Callable[..., Any], module: torch.nn.Module) -> Call:
            def forward() -> tuple[Tensor, ...]:
                out = tuple(t for t in run(x, x, x, need_weights=need_weights) if t is not None)
                return out[:1] if train else out

            return call_of(forward, [], [x, *module.parameters()], [grad] if train else None)

        return {
            "lect11ext": call(ours, ours),
            "eager": call(torchs, torchs),
            "compile": call(torch.compile(torchs), torchs),
        }

    products = 8.0 * batch * length * width**2 * (3 if train else 1)
    products += 4.0 * batch * length**2 * width * (BACKWARD if train else 1)
    return Workload(
        f"MultiheadAttention/{'train' if train else 'forward'}/float32/L{length}{'/weights' if need_weights else ''}",
        make,
        ("lect11ext", "eager", "compile"),
        work={"product/float32": products},
    )


WORKLOADS = (
    [
        _forward(dtype, columns, length, causal)
        for dtype in BOTH
        for columns in (64, 128)
        for length in (128, 512, 2048, 8192)
        for causal in (False, True)
    ]
    + [
        _train(dtype, columns, length, causal)
        for dtype in BOTH
        for columns, length, causal in [(64, 128, False), (64, 1024, False), (64, 2048, True), (128, 1024, False)]
    ]
    + [
        _short(*sizes, train)
        for sizes in ((64, 4, 20, 16), (64, 8, 20, 64), (32, 8, 64, 64))
        for train in (False, True)
    ]
    + [_decode(dtype, keys) for dtype in BOTH for keys in (1024, 8192)]
    + [_few_queries(dtype, queries, 1024) for dtype in BOTH for queries in (1, 8)]
    + [_skipping(kind, dtype) for kind in ("window256", "half_mask") for dtype in BOTH]
    + [_option(kind, 1024) for kind in ("dropout", "mask_gradient", "3d", "wide_values")]
    + [_tangent(2048, causal) for causal in (False, True)]
    + [
        _module(length, train, need_weights)
        for train in (False, True)
        for need_weights in (False, True)
        for length in (128, 512, 2048)
    ]
)


@parametrize(WORKLOADS)
def test_attention(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
