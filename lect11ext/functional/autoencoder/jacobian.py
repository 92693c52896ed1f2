"""What an encoder of any depth does near a point: the size of its Jacobian, and the directions that it sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vjp, vmap

from ..._errors import OPTIONAL_GENERATOR, OPTIONAL_INT, TENSOR, check_range, check_type
from ..random import philox_key, philox_normal, words_of_normals

Encoder = Callable[[Tensor], Tensor]


def jacobian_penalty(
    encoder: Encoder,
    input: Tensor,
    *,
    num_probes: int | None = 1,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The code, and the squared Frobenius norm of its Jacobian: the contractive penalty of an encoder of any depth.

    .. math::
        p_b = \left\lVert \frac{\partial h_b}{\partial x_b} \right\rVert_F^2
            = \mathbb{E}_{v \sim N(0, I)} \left\lVert v^\top \frac{\partial h_b}{\partial x_b} \right\rVert^2
            \approx \tfrac1K \sum_{k=1}^{K} \left\lVert v_k^\top \frac{\partial h_b}{\partial x_b} \right\rVert^2

    Args:
        encoder: ``[batch, *] → [batch, *]``, each row from its own row alone (in training mode a batch norm is no such
            function). A module, or any function of tensors; its parameters get gradients.
        input: ``[batch, *]``, of a floating-point type.
        num_probes: K, one backward each, without bias; None for the exact value, one backward for each unit of the
            code. The estimate's variance is 2/K · ‖J Jᵀ‖², so that one probe does for training.
        generator, key: of the probes, as for :func:`gaussian_rsample_kl`; unused where ``num_probes`` is None.

    Returns:
        ``(code, penalty)``, the penalty ``[batch]`` in float32, or float64 where the code is.

    Gradients: to ``input`` and to whatever ``encoder`` holds, of any order that it has: the fused functions have all.
    Deterministic where ``encoder`` is: the same key gives the same probes.
    For a single layer :func:`contractive_linear` is exact and costs no backward.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Rifai et al. 2011; Hoffman, Roberts & Yaida 2019 (random projections); Hutchinson 1990.

    Example::

        >>> import torch, lect11ext
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(20, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
        >>> code, penalty = lect11ext.functional.jacobian_penalty(encoder, torch.randn(8, 20))
        >>> code.shape, penalty.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """
    _check(encoder, input)
    check_type("generator", generator, OPTIONAL_GENERATOR)
    check_type("num_probes", num_probes, OPTIONAL_INT)
    check_range("num_probes", num_probes)
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, but got {num_probes}")
    code, pullback = _vjp(encoder, input)
    units = code.numel() // code.size(0) if code.numel() else 0
    wide = torch.promote_types(code.dtype, torch.float32)

    def squares(cotangent: Tensor) -> Tensor:
        (gradient,) = pullback(cotangent.to(code.dtype).view_as(code))
        return gradient.to(wide).flatten(1).square().sum(1) if gradient.dim() > 1 else gradient.to(wide).square()

    penalty = torch.zeros(code.size(0), dtype=wide, device=code.device)
    if num_probes is None:
        for unit in range(units):
            one = torch.zeros(code.size(0), units, dtype=code.dtype, device=code.device)
            one[:, unit] = 1
            penalty = penalty + squares(one)
        return code, penalty
    if key is None:
        key = philox_key(code.detach(), words_of_normals(num_probes * code.numel(), wide), generator)
    probes = philox_normal((num_probes, *code.shape), key, dtype=wide)
    for probe in probes.unbind(0):
        penalty = penalty + squares(probe)
    return code, penalty / num_probes


def _check(encoder: Encoder, input: Tensor) -> None:
    if not callable(encoder):
        raise TypeError(f"encoder must be callable, but got {type(encoder).__name__}")
    check_type("input", input, TENSOR)
    if input.is_nested:
        raise TypeError("input must have rows of one size, but got a nested tensor")
    if not input.is_floating_point():
        raise TypeError(f"input must have a floating-point type, but got {input.dtype}")
    if input.dim() == 0:
        raise ValueError("input must have a batch dimension, but got a scalar")


def _vjp(encoder: Encoder, input: Tensor) -> tuple[Tensor, Callable[[Tensor], Any]]:
    code, pullback = vjp(encoder, input)[:2]
    if not isinstance(code, Tensor):
        raise TypeError(f"encoder must return a Tensor, but got {type(code).__name__}")
    if code.dim() == 0 or code.size(0) != input.size(0):
        raise ValueError(f"encoder must return one code a row, [{input.size(0)}, *], but got {list(code.shape)}")
    if not code.is_floating_point():
        raise TypeError(f"encoder must return a floating-point type, but got {code.dtype}")
    return code, pullback


def tangent_directions(encoder: Encoder, input: Tensor, num_directions: int | None = None) -> tuple[Tensor, Tensor]:
    r"""The directions in input space to which the code reacts most: an estimate of the manifold's tangents at a point.

    .. math::
        \frac{\partial h_b}{\partial x_b} = U \, \mathrm{diag}(s) \, V^\top

    Args:
        encoder: ``[batch, *] → [batch, *]``, each row from its own row alone.
        input: ``[batch, *]``, the points, of a floating-point type.
        num_directions: how many; by default all, the smaller of the sizes of a code and of an input.

    Returns:
        ``(directions, strengths)``: ``[batch, n, *]``, columns of V, of unit length, orthogonal, in descending order of
        their ``[batch, n]`` singular values; in the type of ``input``, and float32 or, where the code is, float64. A
        direction and its opposite are the same tangent: the largest component is positive. Directions of equal strength
        (zero, say) are any basis of their span.

    Gradients: torch.linalg.svd's, which are infinite where strengths are equal.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Rifai, Dauphin, Vincent, Bengio & Muller 2011 (the manifold tangent classifier).

    Example::

        >>> import torch, lect11ext
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(20, 9), torch.nn.Sigmoid())
        >>> directions, strengths = lect11ext.functional.tangent_directions(encoder, torch.randn(8, 20), 2)
        >>> directions.shape, strengths.shape
        (torch.Size([8, 2, 20]), torch.Size([8, 2]))
    """
    _check(encoder, input)
    with torch.no_grad():
        row = input[:1] if input.size(0) > 0 else input.new_zeros(1, *input.shape[1:])
        code, _ = _vjp(encoder, row)
    inputs, units = row.numel(), code.numel()
    most = min(inputs, units)
    if most == 0:
        raise ValueError(
            f"input and its code must have elements, but got {list(input.shape[1:])} and {list(code.shape[1:])} a row"
        )
    if num_directions is None:
        num_directions = most
    check_type("num_directions", num_directions, (int,))
    if not 1 <= num_directions <= most:
        raise ValueError(f"num_directions must lie between 1 and {most}, but got {num_directions}")
    if input.size(0) == 0:
        strengths = code.new_empty(0, num_directions, dtype=torch.promote_types(code.dtype, torch.float32))
        return input.new_empty(0, num_directions, *input.shape[1:]), strengths
    jacobian_of = jacrev if units <= inputs else jacfwd
    jacobian = vmap(jacobian_of(lambda x: encoder(x.unsqueeze(0)).flatten()))(input)
    flat = jacobian.reshape(input.size(0), units, inputs)
    # LAPACK has no 16-bit types.
    _, strengths, directions = torch.linalg.svd(
        flat.to(torch.promote_types(flat.dtype, torch.float32)), full_matrices=False
    )
    largest = directions.abs().argmax(-1, keepdim=True)
    directions = directions * directions.gather(-1, largest).sign()
    directions = directions[:, :num_directions].to(input.dtype)
    return directions.reshape(input.size(0), num_directions, *input.shape[1:]), strengths[:, :num_directions]
