"""Packing bits against NumPy, look-up by Hamming distance against faiss' IndexBinaryFlat and NumPy's counts of bits.

faiss takes part where it is installed (``pip install lect11ext[bench]``), with as many threads as torch; NumPy's counts
from version 2 on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lect11ext import functional, reference

from .common import Call, Workload, parametrize, run_turn

try:
    import faiss
except ImportError:
    faiss = None

CODES = 1_000_000
K, RADIUS = 10, 4
WORDS = {4: np.uint32, 8: np.uint64}
PEERS = (*(["faiss"] if faiss is not None else []), *(["numpy"] if hasattr(np, "bitwise_count") else []))


def _pack() -> Workload:
    bits = 64

    def make() -> dict[str, Call]:
        x = torch.rand(CODES, bits)

        def listed(function: Any) -> Call:
            return lambda: [function(x)]

        return {
            "lect11ext": listed(functional.pack_bits),
            "eager": listed(reference.pack_bits),
            "compile": listed(torch.compile(reference.pack_bits)),
            "numpy": lambda: [torch.from_numpy(np.packbits(x.numpy() > 0.5, axis=-1))],
        }

    return Workload(
        f"pack_bits/float32/{CODES}x{bits}",
        make,
        ("lect11ext", "eager", "compile", "numpy"),
        work={"copy": CODES * (4.0 * bits + bits / 8)},
    )


def _numpy_distances(query: Tensor, codes: Tensor) -> list[Any]:
    """Of each query, one after the other: all at once would be a matrix of some hundred megabytes."""
    words = WORDS[min(8, codes.size(1))]
    whole = codes.numpy().view(words)
    return [np.bitwise_count(whole ^ q).sum(-1, dtype=np.uint16) for q in query.numpy().view(words)]


def _search(bits: int, queries: int, radius: bool) -> Workload:
    def make() -> dict[str, Call]:
        codes, query = (torch.randint(0, 256, (n, bits // 8), dtype=torch.uint8) for n in (CODES, queries))

        def ours() -> list[Tensor]:
            if radius:
                return list(functional.hamming_radius(query, codes, RADIUS))
            return list(functional.hamming_topk(query, codes, K))

        def numpy() -> list[Any]:
            if radius:
                return [np.flatnonzero(d <= RADIUS) for d in _numpy_distances(query, codes)]
            nearest = [(d, np.argpartition(d, K)[:K]) for d in _numpy_distances(query, codes)]
            return [np.sort(d[i]) for d, i in nearest]

        calls: dict[str, Call] = {"lect11ext": ours}
        if "faiss" in PEERS:
            faiss.omp_set_num_threads(torch.get_num_threads())
            index = faiss.IndexBinaryFlat(bits)
            index.add(codes.numpy())
            # A range search of faiss takes what is nearer than the radius.
            calls["faiss"] = lambda: (
                index.range_search(query.numpy(), RADIUS + 1) if radius else index.search(query.numpy(), K)
            )
        if "numpy" in PEERS:
            calls["numpy"] = numpy
        # Peers break ties as they like, so what is compared is how many were found, or how far away.
        found, expected = {name: call() for name, call in calls.items()}, ours()
        if radius:
            sizes = expected[0].diff().numpy()
            assert "faiss" not in found or np.array_equal(np.diff(found["faiss"][0].astype(np.int64)), sizes)
            assert "numpy" not in found or [len(i) for i in found["numpy"]] == sizes.tolist()
        else:
            assert "faiss" not in found or np.array_equal(found["faiss"][0], expected[0].numpy())
            assert "numpy" not in found or np.array_equal(np.stack(found["numpy"]), expected[0].numpy())
        return calls

    return Workload(
        f"hamming_{'radius' if radius else 'topk'}/{CODES}x{bits}/queries{queries}",
        make,
        ("lect11ext", *PEERS),
        work={"copy": CODES * bits / 8},
        check=False,
    )


WORKLOADS = [
    _pack(),
    *[_search(bits, queries, radius) for radius in (False, True) for bits in (32, 64, 128, 256) for queries in (1, 64)],
]


@parametrize(WORKLOADS)
def test_hashing(benchmark: Any, workload: Workload, implementation: str, turn: int) -> None:
    run_turn(benchmark, workload, implementation, turn)
