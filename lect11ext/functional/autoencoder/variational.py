"""The stochastic bottleneck of a variational autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._errors import NUMBER, OPTIONAL_GENERATOR, OPTIONAL_INT, OPTIONAL_NUMBER, OPTIONAL_TENSOR, TENSOR, wrong_type
from ..._load import _C
from .._dispatch import through_torch
from ..random import philox_key, words_of_normals


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
) -> tuple[Tensor, Tensor]:
    r"""Draws z from a diagonal Gaussian and returns it with the Gaussian's KL divergence, in one pass over memory.

    .. math::
        z = \mu + e^{v/2} \odot \varepsilon, \qquad
        \mathrm{KL} = \tfrac12 \left( e^{v - v_p} - 1 - (v - v_p) + (\mu - \mu_p)^2 e^{-v_p} \right)

    with :math:`v` the log-variance and :math:`(\mu_p, v_p)` the prior, :math:`N(0, I)` by default. The KL is in nats
    and is computed without cancellation, so that it keeps its digits near the prior. The noise
    :math:`\varepsilon` is regenerated in the backward, never stored.

    Args:
        mean: any shape and strides (say, half of one tensor): float32, float64, bfloat16 or float16.
        logvar: the shape of ``mean``.
        prior_mean, prior_logvar: the prior of a conditional VAE, broadcast to the shape of ``mean``; both or neither.
        num_samples: K draws a row; z gets a leading axis K (also for K = 1), kl does not.
        free_bits: nats an element; smaller elements of the KL are raised to it, before the reduction, and have no
            gradient.
        logvar_range: ``(low, high)``; ``logvar`` is clamped to it first, as by ``torch.clamp``; the slope is one on a
            bound and zero beyond.
        reduction: of the KL. ``"sum_latent"`` sums over the last dimension, ``"batchmean"`` sums everything and
            divides by ``mean.size(0)`` (an empty batch gives 0), ``"sum"`` sums everything, ``"none"`` leaves the
            elements.
        generator: where the key is drawn from, by default the device's default generator.
        key: int64 tensor ``[seed, offset]`` that makes the draw explicit (:func:`philox_key`); then no generator is
            touched. ``torch.compile(fullgraph=True)`` takes no generator: draw a key from it outside and pass that.

    Returns:
        ``(z, kl)``; z in the promoted type of ``mean`` and ``logvar``, kl in float32, or float64 where any input is.

    Gradients: to mean, logvar, prior_mean and prior_logvar, of any order; forward-mode AD; ``vmap`` (``randomness=``
    decides whether samples share their noise). Deterministic: the same key gives the same bits for any number of
    threads. Autocast changes no type.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Kingma & Welling 2014; Sohn et al. 2015 (conditional); Kingma et al. 2016 (free bits).

    Example::

        >>> import torch, lect11ext
        >>> mean, logvar = torch.randn(8, 4).chunk(2, -1)
        >>> z, kl = lect11ext.functional.gaussian_rsample_kl(mean, logvar)
        >>> z.shape, kl.shape
        (torch.Size([8, 2]), torch.Size([8]))
    """
    try:
        low, high = (None, None) if logvar_range is None else logvar_range
    except (TypeError, ValueError):
        raise TypeError(f"logvar_range must be (low, high), but got {logvar_range!r}") from None
    if through_torch(mean, logvar, prior_mean, prior_logvar):
        if key is None:
            given = [t.dtype for t in (mean, logvar, prior_mean, prior_logvar) if t is not None]
            numel = mean.numel() * (1 if num_samples is None else num_samples)
            key = philox_key(mean, words_of_normals(numel, *given), generator)
        return torch.ops.lect11ext.gaussian_rsample_kl(
            mean, logvar, prior_mean, prior_logvar, key, num_samples, free_bits, low, high, reduction
        )
    try:
        return _C.gaussian_rsample_kl(
            mean, logvar, prior_mean, prior_logvar, num_samples, free_bits, low, high, reduction, generator, key
        )
    except TypeError as error:
        raise wrong_type(
            error, mean=(mean, TENSOR), logvar=(logvar, TENSOR), prior_mean=(prior_mean, OPTIONAL_TENSOR),
            prior_logvar=(prior_logvar, OPTIONAL_TENSOR), num_samples=(num_samples, OPTIONAL_INT),
            free_bits=(free_bits, NUMBER), **{"logvar_range[0]": (low, OPTIONAL_NUMBER)},
            **{"logvar_range[1]": (high, OPTIONAL_NUMBER)}, reduction=(reduction, (str,)),
            generator=(generator, OPTIONAL_GENERATOR), key=(key, OPTIONAL_TENSOR),
        ) from None  # fmt: skip
