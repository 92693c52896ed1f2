"""Reparametrised sampling and KL divergence in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..random import philox_normal


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
