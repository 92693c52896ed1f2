"""The autoencoders' workloads on a GPU, against what people write by hand, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lect11ext import functional

from .gpu_common import Call, Machine, Workload
from .penalties import KINDS
from .reconstruction import IDIOMS as LOSSES

ROWS, COLUMNS = 2**16, 1024  # 256 MiB of float32: of 64, PyTorch's host takes longer over a call than its kernels
Function = Callable[..., Any]


def _calls(ours: Function, plain: Function, args: list[Tensor], grads: list[Tensor] | None) -> dict[str, Call]:
    def call(function: Function) -> Call:
        if grads is None:
            return lambda: function(*args)
        leaves = [a for a in args if a.requires_grad]
        return lambda: torch.autograd.grad(function(*args), leaves, grads)

    return {"lect11ext": call(ours), "eager": call(plain), "compile": call(torch.compile(plain))}


def _name(what: str, train: bool) -> str:
    return f"{what}/{'train' if train else 'forward'}"


def _rsample(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    return z, -0.5 * (1 + logvar - mean.pow(2) - logvar.exp()).sum(-1)


def sampling(m: Machine, train: bool) -> Workload:
    rows, latent = m.size(2**20, 4), 64

    def make() -> dict[str, Call]:
        args = [m.randn(rows, latent, grad=train) for _ in range(2)]
        grads = [m.randn(rows, latent), m.randn(rows)] if train else None
        return _calls(functional.gaussian_rsample_kl, _rsample, args, grads)

    # Reads mean and logvar and writes z; then reads both and the gradient of z, and writes two gradients.
    numbers = 3 + (5 if train else 0)
    return Workload(_name("gaussian_rsample_kl", train), make, {"copy": 4.0 * numbers * rows * latent})


def _masked(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > 0.25)


def _noisy(x: Tensor) -> Tensor:
    return x + 0.5 * torch.randn_like(x)


def corruption(m: Machine, kind: str, plain: Function, amount: float) -> Workload:
    rows = m.size(ROWS, 4)

    def make() -> dict[str, Call]:
        return _calls(lambda x: functional.corrupt(x, kind, amount), plain, [m.randn(rows, COLUMNS)], None)

    return Workload(f"corrupt/{kind}/forward", make, {"copy": 8.0 * rows * COLUMNS})


def penalty(m: Machine, kind: str, train: bool) -> Workload:
    rows = m.size(ROWS, 4)

    def make() -> dict[str, Call]:
        ours, plain = KINDS[kind]
        a = m.randn(rows, COLUMNS, grad=train)
        grads = [torch.ones_like(o) for o in plain(a.detach())] if train else None
        return _calls(ours, plain, [a], grads)

    numbers = 2 + (3 if train else 0)
    return Workload(_name(f"sparse_activation/{kind}", train), make, {"copy": 4.0 * numbers * rows * COLUMNS})


def reconstruction(m: Machine, likelihood: str, train: bool) -> Workload:
    rows = m.size(ROWS, 4)

    def make() -> dict[str, Call]:
        args = [m.randn(rows, COLUMNS, grad=train), m.randn(rows, COLUMNS).sigmoid()]
        grads = [m.randn(rows)] if train else None
        ours = lambda x, t: functional.reconstruction_loss(x, t, likelihood)  # noqa: E731
        return _calls(ours, LOSSES[likelihood], args, grads)

    numbers = 2 + (3 if train else 0)
    return Workload(_name(f"reconstruction_loss/{likelihood}", train), make, {"copy": 4.0 * numbers * rows * COLUMNS})


def topk(m: Machine) -> Workload:
    rows, atoms, k = m.size(4096, 4), m.size(32768, 64), 32

    def make() -> dict[str, Call]:
        plain = lambda x: torch.topk(x, k).values.relu()  # noqa: E731
        return _calls(lambda x: functional.topk_code(x, k)[0], plain, [m.randn(rows, atoms)], None)

    return Workload("topk_code/forward", make, {"copy": 4.0 * rows * atoms})


def _bag(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    return F.embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def decode(m: Machine, train: bool) -> Workload:
    rows, atoms, columns, k = m.size(4096, 4), m.size(32768, 64), 1024, 32

    def make() -> dict[str, Call]:
        values, weight = m.randn(rows, k, grad=train), m.randn(atoms, columns, grad=train)
        indices = torch.randint(atoms, (rows, k), device=m.device)
        grads = [m.randn(rows, columns)] if train else None
        return _calls(functional.sparse_decode, _bag, [values, indices, weight], grads)

    read = 4.0 * rows * k * columns
    return Workload(_name("sparse_decode", train), make, {"copy": 3 * read + 4.0 * atoms * columns if train else read})


def hamming(m: Machine, queries: int) -> Workload:
    count, size, k = m.size(2**22, 64), 16, 10

    def make() -> dict[str, Call]:
        codes, query = (torch.randint(256, (n, size), device=m.device, dtype=torch.uint8) for n in (count, queries))
        return {"lect11ext": lambda: functional.hamming_topk(query, codes, k)}

    return Workload(f"hamming_topk/queries{queries}", make, {"copy": float(count * size)})


def autoencoders(m: Machine) -> list[Workload]:
    both = (False, True)
    return [
        *(sampling(m, train) for train in both),
        corruption(m, "masking", _masked, 0.25),
        corruption(m, "gaussian", _noisy, 0.5),
        *(penalty(m, kind, train) for kind in KINDS for train in both),
        *(reconstruction(m, name, train) for name in ("bernoulli", "squared_error") for train in both),
        topk(m),
        *(decode(m, train) for train in both),
        *(hamming(m, queries) for queries in (1, 64)),
    ]
