"""Codes with a penalty: sparse and contractive autoencoders."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._errors import NUMBER, OPTIONAL_TENSOR, TENSOR, check_type, plain, wrong_type
from ..._load import _C
from .._dispatch import through_torch
from .checks import check_linear
from .reconstruction import reconstruction_loss

KL_FLOOR = 1e-6  # a unit that is silent over a whole batch has a large divergence, not an infinite one


def _penalized(input: Tensor, scale: Tensor | None, activation: str, penalty: str) -> tuple[Tensor, Tensor]:
    if through_torch(input, scale):
        return torch.ops.lect11ext.penalized_activation(input, scale, activation, penalty)
    try:
        return _C.penalized_activation(input, scale, activation, penalty)
    except TypeError as error:
        raise wrong_type(
            error, input=(input, TENSOR), scale=(scale, OPTIONAL_TENSOR), activation=(activation, (str,))
        ) from None  # fmt: skip


def _kl_sparsity(mean: Tensor, target: float) -> Tensor:
    """The Bernoulli's negative log-likelihood of the target at the means, less what it is at best: in float64, since
    near the best the two are alike. There is one mean a unit."""
    entropy = -target * math.log(target) - (1 - target) * math.log1p(-target)
    wide = mean.double()
    wanted = wide.new_full((), target).expand_as(wide)
    inside = wide.clamp(KL_FLOOR, 1 - KL_FLOOR)  # torch.logit's own bound has infinite slopes beyond it, times zero
    loss = reconstruction_loss(torch.logit(inside), wanted, reduction="sum") - mean.numel() * entropy
    return loss.to(mean.dtype)


def sparse_activation(
    input: Tensor, activation: str = "relu", *, penalty: str = "l1", scale: Tensor | None = None, target: float = 0.05
) -> tuple[Tensor, Tensor]:
    r"""A code's activation and the penalty that makes the code sparse, in one pass over memory.

    .. math::
        h = \varphi(a), \qquad
        \text{l1: } p_b = \sum_i s_i |h_{bi}|, \qquad
        \text{kl: } p = \sum_i \rho \log\frac{\rho}{\hat\rho_i} + (1-\rho) \log\frac{1-\rho}{1-\hat\rho_i},
        \quad \hat\rho_i = \tfrac1B \sum_b h_{bi}

    Args:
        input: ``[*, units]``, the code before its activation, any strides: float32, float64, bfloat16 or float16.
        activation: "identity", "relu", "sigmoid", "softplus" or "tanh"; "sigmoid" for the KL penalty.
        penalty: "l1" or "kl" (nats).
        scale: ``[units]``, a weight of each unit in the L1 penalty (say, the norms of a decoder's atoms); default ones.
        target: ρ, the mean activation that the KL penalty asks of every unit, in (0, 1).

    Returns:
        ``(code, penalty)``: the code in the type of ``input``; the penalty in float32, or float64 where any input is:
        for "l1" one value a row, ``[*]``, for "kl" a scalar. Means within 1e-6 of 0 or 1 are taken as 1e-6 away, so
        that a silent unit's penalty is finite (0.49 at ρ = 0.05); nearer, its gradient is zero. An empty batch counts
        as silent.

    Gradients: to input and scale, of any order; forward-mode AD; ``vmap``. The subgradient of \|h\| at 0 is 0.
    Deterministic: the same bits for any number of threads. Autocast changes no type.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Olshausen & Field 1996 (L1); Ng 2011, Lee et al. 2007 (KL); Conerly et al. 2024 (L1 by the norms of atoms).

    Example::

        >>> import torch, lect11ext
        >>> code, penalty = lect11ext.functional.sparse_activation(torch.randn(8, 100))
        >>> code.shape, penalty.shape
        (torch.Size([8, 100]), torch.Size([8]))
    """
    check_type("penalty", penalty, (str,))
    check_type("target", target, NUMBER)
    if penalty not in ("l1", "kl"):
        raise ValueError(f"penalty must be 'l1' or 'kl', but got {penalty!r}")
    if penalty == "l1":
        return _penalized(input, scale, activation, penalty)
    if activation != "sigmoid":
        raise ValueError(f"activation must be 'sigmoid' for the KL penalty, but got {activation!r}")
    if not 0 < target < 1:
        raise ValueError(f"target must lie between 0 and 1, but got {target}")
    if scale is not None:
        raise ValueError(f"scale must be None for the KL penalty, but got {type(scale).__name__}")
    code, mean = _penalized(input, None, activation, "mean")
    return code, _kl_sparsity(mean, plain(target))


def contractive_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "sigmoid"
) -> tuple[Tensor, Tensor]:
    r"""A layer and the squared Frobenius norm of its Jacobian, in closed form.

    .. math::
        h = \varphi(x W^\top + b), \qquad
        p_b = \left\lVert \frac{\partial h_b}{\partial x_b} \right\rVert_F^2
            = \sum_i \varphi'(a_{bi})^2 \sum_j W_{ij}^2

    Args:
        input: ``[*, in]``: float32, float64, bfloat16 or float16.
        weight: ``[units, in]``, as torch.nn.Linear's; outside autocast of the type of ``input``, as the bias is.
        bias: ``[units]`` or None.
        activation: "identity", "relu", "sigmoid", "softplus" or "tanh".

    Returns:
        ``(code, penalty)``: ``[*, units]`` in the type of ``input`` (or autocast's), and ``[*]`` in float32, or float64
        where any input is.

    Gradients: to all three, of any order; forward-mode AD; ``vmap``. The product is torch's; activation and penalty are
    one pass over it. Under autocast the product runs in autocast's type, as torch.nn.Linear does, the penalty does not.
    For an encoder of several layers: :func:`jacobian_penalty`.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.
        RuntimeError: torch's, where the types differ.

    Source: Rifai et al. 2011.

    Example::

        >>> import torch, lect11ext
        >>> layer = torch.nn.Linear(20, 5)
        >>> code, penalty = lect11ext.functional.contractive_linear(torch.randn(8, 20), layer.weight, layer.bias)
        >>> code.shape, penalty.shape
        (torch.Size([8, 5]), torch.Size([8]))
    """
    check_linear(input, weight, bias, "units", "in")
    norms = reconstruction_loss(weight, weight.new_zeros(()).expand_as(weight), "squared_error")  # from zero
    return _penalized(F.linear(input, weight, bias), norms, activation, "contractive")
