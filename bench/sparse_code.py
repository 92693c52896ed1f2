"""Sparse codes against torch.topk, embedding_bag and the dense product, and a k-sparse autoencoder's training step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lect11ext import functional, nn

from . import name_of
from .common import Call, Workload, call_of, parametrize, run_turn

ROWS, ATOMS, COLUMNS, K = 1024, 16384, 512, 32


def _topk(dtype: torch.dtype) -> Workload:
    def make() -> dict[str, Call]:
        x = torch.randn(ROWS, ATOMS).to(dtype)

        def plain(x: Tensor) -> list[Tensor]:
            return [torch.relu(torch.topk(x, K).values)]

        return {
            "lect11ext": call_of(lambda x: functional.topk_code(x, K)[:1], [x]),
            "eager": call_of(plain, [x]),
            "compile": call_of(torch.compile(plain), [x]),
        }

    return Workload(
        f"topk_code/forward/{name_of(dtype)}/{ROWS}x{ATOMS}/K{K}",
        make,
        ("lect11ext", "eager", "compile"),
        work={"copy": float(ROWS * ATOMS * dtype.itemsize)},
    )


def _bag(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def _dense(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return values.new_zeros(values.size(0), weight.size(0)).scatter(1, indices, values) @ weight


def _decode(train: bool) -> Workload:
    def make() -> dict[str, Call]:
        values = torch.randn(ROWS, K, requires_grad=train)
        indices = torch.rand(ROWS, ATOMS).topk(K).indices
        weight = torch.randn(ATOMS, COLUMNS, requires_grad=train)
        grad = torch.randn(ROWS, COLUMNS) if train else None

        def call(function: Any) -> Call:
            return call_of(function, [values, indices, weight], [values, weight], grad)

        return {"lect11ext": call(functional.sparse_decode), "eager": call(_bag), "dense": call(_dense)}

    rows = 4.0 * ROWS * K * COLUMNS  # bytes of the rows that one of the three forms reads
    return Workload(
        f"sparse_decode/{'train' if train else 'forward'}/float32/{ROWS}x{ATOMS}x{COLUMNS}/K{K}",
        make,
        ("lect11ext", "eager", "dense"),
        work={"copy": 3 * rows + 4.0 * ATOMS * COLUMNS if train else rows},
    )


class _Plain(torch.nn.Module):
    """The same autoencoder in torch: what its authors' own code does without kernels of its own."""

    def __init__(self, like: nn.TopKAutoencoder) -> None:
        super().__init__()
        self.encoder, self.dictionary, self.pre_bias = like.encoder, like.dictionary, like.pre_bias

    def forward(self, input: Tensor) -> Tensor:
        values, indices = torch.topk(self.encoder(input - self.pre_bias), K)
        return _bag(torch.relu(values), indices, self.dictionary) + self.pre_bias


def _step() -> Workload:
    def make() -> dict[str, Call]:
        model = nn.TopKAutoencoder(COLUMNS, ATOMS, K)
        plain = _Plain(model)
        x = torch.randn(ROWS, COLUMNS)

        def call(module: Any) -> Call:
            def step() -> Any:
                out = module(x)
                out = out[0] if isinstance(out, tuple) else out
                return torch.autograd.grad(F.mse_loss(out, x), list(model.parameters()))

            return step

        return {"lect11ext": call(model), "eager": call(plain), "compile": call(torch.compile(plain))}

    return Workload(
        f"TopKAutoencoder/train/float32/{ROWS}x{ATOMS}x{COLUMNS}/K{K}",
        make,
        ("lect11ext", "eager", "compile"),
        work={"product/float32": 2.0 * ROWS * ATOMS * COLUMNS},
    )


WORKLOADS = [_topk(torch.float32), _topk(torch.bfloat16), _decode(False), _decode(True), _step()]


@parametrize(WORKLOADS)
def test_sparse_code(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
