"""Reparametrised sampling and KL divergence in plain PyTorch, and the Philox stream in NumPy."""

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


def _inside_or(x: Tensor, clamped: Tensor) -> Tensor:
    # The slope on a bound is one; torch.clamp's own was one up to torch 2.13 and is zero since.
    return torch.where(x == clamped, x, clamped.detach())


def gaussian_rsample_kl(
    mean: Tensor,
    logvar: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    num_samples: int | None = None,
    free_bits: float = 0.0,
    logvar_range: tuple[float, float] | None = None,
    reduction: str = "sum_latent",
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.gaussian_rsample_kl`.

    ``key`` takes the same noise as the fused function; without it ``torch.randn`` draws; ``noise`` gives it outright.
    """
    out_dtype = torch.promote_types(mean.dtype, logvar.dtype)
    compute = out_dtype
    for prior in (prior_mean, prior_logvar):
        compute = compute if prior is None else torch.promote_types(compute, prior.dtype)
    compute = torch.promote_types(compute, torch.float32)
    m, v = mean.to(compute), logvar.to(compute)
    if logvar_range is not None:
        v = _inside_or(v, v.clamp(*logvar_range))
    shape = m.shape if num_samples is None else (num_samples, *m.shape)
    if noise is None and key is not None:
        noise = philox_normal(shape, key, dtype=compute)
    elif noise is None:
        noise = torch.randn(shape, dtype=compute, device=m.device, generator=generator)
    z = m + (v / 2).exp() * noise.to(compute)

    if prior_mean is None or prior_logvar is None:
        kl = (m.square() + v.expm1() - v) / 2
    else:
        p, q = prior_mean.to(compute), prior_logvar.to(compute)
        d = v - q
        kl = (((m - p) * (-q / 2).exp()).square() + d.expm1() - d) / 2
    if free_bits > 0:
        kl = _inside_or(kl, kl.clamp_min(free_bits))
    if reduction == "sum_latent":
        kl = kl.sum(-1)
    elif reduction == "sum":
        kl = kl.sum()
    elif reduction == "batchmean":
        kl = kl.sum() / max(mean.size(0), 1)
    return z.to(out_dtype), kl
