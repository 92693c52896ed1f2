"""The loss of a reconstruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._errors import OPTIONAL_TENSOR, TENSOR, wrong_type
from ..._load import _C
from .._dispatch import through_torch


def _from_bool(value: Any, like: Tensor) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) and value.dtype == torch.bool else value


def reconstruction_loss(
    input: Tensor,
    target: Tensor,
    likelihood: str = "bernoulli",
    *,
    logvar: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "sum_features",
) -> Tensor:
    r"""What a decoder's output x costs where t should have been: a negative log-likelihood, summed in the same pass.

    .. math::
        \text{bernoulli: } & \max(x, 0) - x t + \log(1 + e^{-|x|}) \\
        \text{continuous bernoulli: } & x (\tfrac12 - t) + \log \frac{\sinh(x/2)}{x/2} \\
        \text{gaussian: } & \tfrac12 \left( (x - t)^2 e^{-v} + v + \log 2\pi \right) \\
        \text{squared error: } & (x - t)^2

    with x the logits of the two Bernoullis and the mean of the Gaussian, v its log-variance. All in nats but the last.
    The continuous Bernoulli is a density over t in [0, 1], as which the Bernoulli is often mistaken; its normaliser and
    the Bernoulli's logarithm cancel to the term above, which has no pole at x = 0.

    Args:
        input: any shape and strides: float32, float64, bfloat16 or float16.
        target: the shape of ``input``, of one of these types or bool (no integers).
        likelihood: "bernoulli", "continuous_bernoulli", "gaussian" or "squared_error".
        logvar: of the Gaussian, broadcast to the shape of ``input`` (a learned scalar, one a feature, or the decoder's
            own); default 0, a variance of one.
        weight: of every element, broadcast to the shape of ``input``; a bool mask too. Where it is zero the element
            does not count, be it NaN; its gradients are zeros then, and have no derivative by that weight, whose own
            gradient is the element's loss. No reduction divides by the weights.
        reduction: ``"sum_features"`` sums over the last dimension (of images, flatten the others into it first),
            ``"batchmean"`` sums everything and divides by ``input.size(0)`` (an empty batch gives 0), ``"sum"`` sums
            everything, ``"none"`` leaves the elements.

    Returns:
        The loss, in float32, or float64 where any input is.

    Gradients: to input, target, logvar and weight, of any order; forward-mode AD; ``vmap``. Deterministic: the same
    bits for any number of threads. Autocast changes no type.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.
            Targets beyond [0, 1] are not looked for.

    Source: Loaiza-Ganem & Cunningham 2019 (continuous Bernoulli); Rybkin et al. 2021 (learned variance).

    Example::

        >>> import torch, lect11ext
        >>> logits, x = torch.randn(8, 784), torch.rand(8, 784)
        >>> lect11ext.functional.reconstruction_loss(logits, x, "continuous_bernoulli").shape
        torch.Size([8])
    """
    if isinstance(input, Tensor):
        target, weight = _from_bool(target, input), _from_bool(weight, input)
    if through_torch(input, target, logvar, weight):
        return torch.ops.lect11ext.reconstruction_loss(input, target, logvar, weight, likelihood, reduction)
    try:
        return _C.reconstruction_loss(input, target, logvar, weight, likelihood, reduction)
    except TypeError as error:
        raise wrong_type(
            error, input=(input, TENSOR), target=(target, TENSOR), likelihood=(likelihood, (str,)),
            logvar=(logvar, OPTIONAL_TENSOR), weight=(weight, OPTIONAL_TENSOR), reduction=(reduction, (str,)),
        ) from None  # fmt: skip
