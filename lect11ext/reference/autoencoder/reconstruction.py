"""Losses of a reconstruction in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL = 0.5  # below it log(sinh(u) / u) is summed as a series
# Its coefficients in powers of u².
SERIES = (
    1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250, 2 / 127702575, -3617 / 2605132530000,
    43867 / 350813659321125, -174611 / 15313294652906250,
)  # fmt: skip


def _log_sinhc(u: Tensor) -> Tensor:
    is_small = u.abs() < SMALL
    near, far = torch.where(is_small, u, 0), torch.where(is_small, 1, u.abs())
    series = torch.zeros_like(u)
    for coefficient in reversed(SERIES):
        series = (series + coefficient) * near.square()
    return torch.where(is_small, series, far + ((1 - (-2 * far).exp()) / (2 * far)).log())


def reconstruction_loss(
    input: Tensor,
    target: Tensor,
    likelihood: str = "bernoulli",
    *,
    logvar: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "sum_features",
) -> Tensor:
    """See :func:`lect11ext.functional.reconstruction_loss`."""
    compute = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
    for other in (logvar, weight):
        compute = compute if other is None else torch.promote_types(compute, other.dtype)
    x, t = input.to(compute), target.to(compute)
    if likelihood == "bernoulli":
        loss = F.softplus(x, threshold=40) - x * t
    elif likelihood == "continuous_bernoulli":
        loss = x * (0.5 - t) + _log_sinhc(x / 2)
    elif likelihood == "gaussian":
        v = torch.zeros_like(x) if logvar is None else logvar.to(compute)
        loss = (((x - t) * (-v / 2).exp()).square() + v + math.log(2 * math.pi)) / 2
    else:
        loss = (x - t).square()
    if weight is not None:
        w = weight.to(compute)
        loss = w * torch.where(w == 0, loss.detach(), loss)
        loss = torch.where(w == 0, loss.nan_to_num(0, 0, 0), loss)
    if reduction == "sum_features":
        return loss.sum(-1)
    if reduction == "batchmean":
        return loss.sum() / max(input.size(0), 1)
    return loss.sum() if reduction == "sum" else loss
