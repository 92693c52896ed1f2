"""Activations of a code with their penalties in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

KL_FLOOR = 1e-6  # a unit that is silent (or always on) over a whole batch has a large divergence, not an infinite one


def _activate(a: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """φ(a) and φ'(a), the slope without differences of nearly equal numbers."""
    if activation == "relu":
        return a.relu(), (~(a <= 0)).to(a.dtype)
    if activation == "sigmoid":
        return a.sigmoid(), a.sigmoid() * (-a).sigmoid()
    if activation == "softplus":
        return F.softplus(a, threshold=40), a.sigmoid()
    if activation == "tanh":
        return a.tanh(), 4 * (2 * a).sigmoid() * (-2 * a).sigmoid()
    return a, torch.ones_like(a)


def penalized_activation(input: Tensor, scale: Tensor | None, activation: str, penalty: str) -> tuple[Tensor, Tensor]:
    """The op behind the functions: φ(a), and sums over rows (``l1``, ``contractive``) or the units' ``mean``."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    if scale is not None:
        wide = wide.to(torch.promote_types(wide.dtype, scale.dtype))
    code, slope = _activate(wide, activation)
    if penalty == "mean":
        sums = code.sum(tuple(range(code.dim() - 1))) if code.dim() > 1 else code
        sums = sums / max(math.prod(code.shape[:-1]), 1)
    else:
        summands = code.abs() if penalty == "l1" else slope.square()
        sums = (summands if scale is None else summands * scale.to(wide.dtype)).sum(-1)
    return code.to(input.dtype), sums


def kl_sparsity(mean: Tensor, target: float) -> Tensor:
    """Σ KL(Bernoulli(target) ‖ Bernoulli(mean)), the means kept ``KL_FLOOR`` away from 0 and 1."""
    q = mean.clamp(KL_FLOOR, 1 - KL_FLOOR)
    return (torch.special.xlogy(target, target / q) + torch.special.xlogy(1 - target, (1 - target) / (1 - q))).sum()


def sparse_activation(
    input: Tensor, activation: str = "relu", *, penalty: str = "l1", scale: Tensor | None = None, target: float = 0.05
) -> tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.sparse_activation`."""
    code, sums = penalized_activation(input, scale, activation, "mean" if penalty == "kl" else penalty)
    return code, kl_sparsity(sums, target) if penalty == "kl" else sums


def contractive_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid"
) -> tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.contractive_linear`."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return penalized_activation(F.linear(input, weight, bias), wide.square().sum(1), activation, "contractive")
