"""additive_attention against the plain formula, eager and compiled: time, and the memory that a call adds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lect11ext.functional import additive_attention

from . import name_of
from .common import Call, Workload, call_of, parametrize, run_turn

# (batch, queries, keys, hidden units, columns of the values)
SIZES = [(1, 512, 512, 256, 256), (32, 1, 128, 256, 256), (16, 32, 32, 128, 128)]


def plain(query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor) -> Tensor:
    """What everybody writes."""
    scores = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ score_weight
    return scores.softmax(-1) @ value


def _operands(batch: int, L: int, S: int, H: int, D: int, dtype: torch.dtype, train: bool) -> list[Tensor]:
    args = [torch.randn(batch, L, H), torch.randn(batch, S, H), torch.randn(batch, S, D), torch.randn(H) / H**0.5]
    return [a.to(dtype).requires_grad_(train) for a in args]


def _call(function: Any, args: list[Tensor], train: bool) -> Call:
    query, _, value, _ = args
    shape = (*query.shape[:-1], value.size(-1))
    return call_of(function, args, args, torch.ones(shape, dtype=query.dtype) if train else None)


def _attention(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, train: bool) -> Workload:
    def make() -> dict[str, Call]:
        args = _operands(*sizes, dtype, train)
        functions = {"lect11ext": additive_attention, "eager": plain, "compile": torch.compile(plain)}
        return {name: _call(function, args, train) for name, function in functions.items()}

    batch, L, S, H, D = sizes
    kind = name_of(dtype)
    # What bounds it is tanh, which has no ceiling here; the products by values stand beside those of the machine.
    return Workload(
        f"additive_attention/{'train' if train else 'forward'}/{kind}/B{batch}/L{L}/S{S}/H{H}",
        make,
        ("lect11ext", "eager", "compile"),
        work={f"product/{kind}": 2.0 * batch * L * S * D * (4 if train else 1)},
        tolerance=1e-3 if dtype == torch.float32 else 0.1,
    )


WORKLOADS = [_attention(sizes, torch.float32, train) for train in (False, True) for sizes in SIZES]
WORKLOADS += [_attention(SIZES[0], torch.bfloat16, train) for train in (False, True)]


@parametrize(WORKLOADS)
def test_additive_attention(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)


# --- memory: `python -m bench.additive` -----------------------------------------------------------------------------


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))  # type: ignore[union-attr]


def added_bytes(name: str, train: bool) -> int:
    """By how much one call at the first size raises this process's peak; a small one has loaded what it takes."""
    function = {"lect11ext": additive_attention, "eager": plain, "compile": torch.compile(plain)}[name]
    args = _operands(*SIZES[0], torch.float32, train)
    small = [args[0][:, :8], args[1][:, :8], args[2][:, :8], args[3]]
    small = [a.detach().requires_grad_(train) for a in small]
    # Compiled code is made for one size, and making it takes memory too: then the second call counts.
    _call(function, args if name == "compile" else small, train)()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_bytes()
    _call(function, args, train)()
    return _peak_bytes() - before


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(added_bytes(sys.argv[1], sys.argv[2] == "train")))
        return
    for kind in ("forward", "train"):
        for name in ("lect11ext", "eager", "compile"):
            command = [sys.executable, "-m", "bench.additive", name, kind]
            added = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{kind:8} {name:10} {added / 2**20:9.1f} MiB")


if __name__ == "__main__":
    main()
