"""Masks of recurrent layers, drawn from the Philox stream, and the norm of an input's part of the sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import layer_norm, linear

from ..random import philox_key, philox_normal


def bernoulli(like: Tensor, size: Sequence[int], rate: float, generator: torch.Generator | None) -> Tensor:
    """True with probability ``rate``: where a normal of the stream lies below the normal distribution's quantile."""
    if rate in (0, 1):
        return torch.full(tuple(size), rate == 1, device=like.device)
    numel = 1
    for n in size:
        numel *= n
    key = philox_key(like, numel, generator)
    # The quantile is torch's: statistics.NormalDist gives the same one, but torch.compile breaks the graph there.
    return philox_normal(size, key) < torch.special.ndtri(torch.tensor(rate, dtype=torch.float64))


def dropout_mask(like: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """What ``like`` is multiplied by: 0 with probability ``rate``, else 1 / (1 − rate)."""
    keeps = bernoulli(like, like.shape, 1 - rate, generator)
    return keeps.to(like.dtype) / (1 - rate) if rate < 1 else keeps.to(like.dtype)


def without_padding(input: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """Zeros beyond the lengths. The op's gradients are zero there, but zero times what stands there may be NaN."""
    steps = torch.arange(input.size(1 if batch_first else 0), device=input.device)
    beyond = steps >= lengths[:, None] if batch_first else steps[:, None] >= lengths
    return input.masked_fill(beyond[..., None], 0)


def normed_sums(input: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The input's part of the sums of all steps, normalised over all gates' units, without its bias."""
    sums = linear(input, weight)
    if forward_ad._current_level < 0:
        # float16 has not the cube of 1/√ε, in the second derivatives: of padding's zeros, say.
        if sums.dtype == torch.float16:
            return layer_norm(sums.float(), scale.shape, scale.float()).half()
        return layer_norm(sums, scale.shape, scale)
    # Under forward-mode AD, torch.func.jvp's too, step by step: gradients of layer_norm's own tangents, as in
    # grad(lambda x: jvp(f, (x,), (v,))[1]), are wrong in PyTorch (seen in 2.13), and no error says so.
    wide = sums if sums.dtype == torch.float64 else sums.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return (normed * scale).to(sums.dtype)
