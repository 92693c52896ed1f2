"""The Philox stream in NumPy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def philox_words(seed: int, offset: int, blocks: int) -> np.ndarray:
    """Words ``[blocks, 4]`` (uint32) of Philox4x32-10, counters ``offset …``, key ``seed``."""
    counter = (np.arange(blocks, dtype=np.uint64) + np.uint64(offset % 2**64)).astype(np.uint64)
    c0, c1 = counter & _LOW, counter >> _32
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW
        c2, c3 = (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], 1).astype(np.uint32)


def philox_normal(
    size: Sequence[int], key: Tensor, *, dtype: torch.dtype = torch.float32, exact: bool = False
) -> Tensor:
    """Standard normals of the stream, computed in float64 by NumPy and rounded once to ``dtype``.

    ``exact=True`` leaves the rounding out and returns float64; ``dtype`` still says which stream is meant: float64
    takes two words a uniform, every other type one.
    """
    seed, offset = (int(v) % 2**64 for v in key.tolist())
    numel = int(np.prod(size, dtype=np.int64))
    if dtype == torch.float64:
        x = philox_words(seed, offset, -(-numel // 2)).astype(np.uint64).reshape(-1, 2, 2)
        u = (((x[..., 1] << _32 | x[..., 0]) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    else:
        u = philox_words(seed, offset, -(-numel // 4)).reshape(-1, 2) * 2.0**-32 + 2.0**-33
    radius, angle = np.sqrt(-2 * np.log(u[:, 0])), 2 * np.pi * u[:, 1]
    normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:numel]
    out = torch.from_numpy(normals).reshape(tuple(size))
    return (out if exact else out.to(dtype)).to(key.device)
