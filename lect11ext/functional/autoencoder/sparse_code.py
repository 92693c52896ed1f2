"""Sparse codes: the K largest activations of each row, and what is computed from them alone."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._errors import OPTIONAL_TENSOR, TENSOR, wrong_type
from ..._load import _C
from .._dispatch import through_torch
from .checks import check_linear


def topk_code(input: Tensor, k: int, *, activation: str = "relu") -> tuple[Tensor, Tensor]:
    r"""Returns the k largest entries of the last dimension, largest first, and their indices.

    The k-sparse activation: with ``"relu"`` what is negative among them becomes zero. Unlike ``torch.topk``, equal
    entries come in the order of their indices, so that the result is determined. NaN counts as the largest.

    Args:
        input: ``[*, n]``, any strides: float32, float64, bfloat16 or float16.
        k: from 0 to n.
        activation: ``"relu"`` or ``"identity"``.

    Returns:
        ``(values, indices)``, both ``[*, k]``: values in the type of ``input``, indices int64. The code written out is
        ``torch.zeros_like(input).scatter(-1, indices, values)``.

    Gradients: to input, of any order, zero but at the indices (and, with ``"relu"``, where a value is zero);
    forward-mode AD; ``vmap``. Deterministic: the same bits for any number of threads. Autocast changes no type.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Makhzani & Frey 2013, "k-Sparse Autoencoders"; Gao et al. 2024, "Scaling and evaluating sparse
    autoencoders".

    Example::

        >>> import torch, lect11ext
        >>> values, indices = lect11ext.functional.topk_code(torch.tensor([[1.0, 3.0, -2.0, 3.0]]), 3)
        >>> values, indices
        (tensor([[3., 3., 1.]]), tensor([[1, 3, 0]]))
    """
    if through_torch(input):
        return torch.ops.lect11ext.topk_code(input, k, activation)
    try:
        return _C.topk_code(input, k, activation)
    except TypeError as error:
        raise wrong_type(error, input=(input, TENSOR), k=(k, (int,)), activation=(activation, (str,))) from None


def sparse_decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Sums the rows of a dictionary that a sparse code names, each with its value.

    .. math::
        y_b = \sum_j v_{bj} W_{i_{bj}} + \beta

    It is ``torch.nn.functional.embedding_bag`` with ``per_sample_weights`` and ``mode="sum"``, with every derivative.
    The time and memory are those of the named rows, whatever the size of the dictionary, but for the gradient of
    ``weight``, which is dense.

    Args:
        values: :math:`v`, ``[*, K]``: float32, float64, bfloat16 or float16, any strides.
        indices: :math:`i`, ``[*, K]``: int64 or int32, in :math:`[0, M)`; one may come several times in a row.
        weight: the dictionary :math:`W`, ``[M, D]``: its rows are the atoms.
        bias: :math:`\beta`, ``[D]``.

    Returns:
        ``[*, D]`` in the promoted type of values, weight and bias.

    Gradients: to values, weight and bias, of any order; forward-mode AD; ``vmap``. Every derivative is again such a
    sum, a product of rows at the indices, or a sum of outer products, and takes a kernel of its own. Deterministic: the
    same bits for any number of threads; sums are formed in float32, or float64 for float64. Autocast changes no type.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.
        IndexError: of an index that is no row of ``weight``. On CUDA, where to ask would be to wait, such an index
            makes its row NaN instead, and touches no atom's gradient.

    Example::

        >>> import torch, lect11ext
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> lect11ext.functional.sparse_decode(torch.tensor([[2.0, 3.0]]), torch.tensor([[1, 0]]), weight)
        tensor([[3., 2.]])
    """
    if through_torch(values, weight, bias):
        return torch.ops.lect11ext.sparse_decode(values, indices, weight, bias)
    try:
        return _C.sparse_decode(values, indices, weight, bias)
    except TypeError as error:
        raise wrong_type(
            error, values=(values, TENSOR), indices=(indices, TENSOR), weight=(weight, TENSOR),
            bias=(bias, OPTIONAL_TENSOR),
        ) from None  # fmt: skip


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    operands = [input, weight] if bias is None else [input, weight, bias]
    dtype = functools.reduce(torch.promote_types, [operand.dtype for operand in operands])
    return F.linear(*(operand.to(dtype) for operand in operands))


def topk_encode(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, k: int, activation: str = "relu"
) -> tuple[Tensor, Tensor]:
    r"""``topk_code(linear(input, weight, bias), k)`` whose derivatives cost as much as the k entries are.

    The product with the whole dictionary is needed only to find the k largest of its columns. It is formed without a
    gradient; the values are then computed anew, as k dot products a row. So the backward forms no dense gradient of the
    M activations, and neither of the two products with it: of three products of a training step one is left.

    Args:
        input: ``[*, D]``: float32, float64, bfloat16 or float16.
        weight: ``[M, D]``, as in ``torch.nn.functional.linear``.
        bias: ``[M]`` or None.
        k, activation: as in :func:`topk_code`.

    Returns:
        ``(values, indices)``, both ``[*, k]``: values in the promoted type of input, weight and bias, indices int64.
        Computed anew, the values are in descending order up to the rounding of the product.

    Gradients: to input, weight and bias, of any order; forward-mode AD; ``vmap``; those of topk_code of a linear layer.
    Under autocast the product that finds the indices runs in autocast's type, the values do not.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: as for :func:`topk_code`.

    Example::

        >>> import torch, lect11ext
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> lect11ext.functional.topk_encode(torch.tensor([[2.0, 3.0]]), weight, k=2)
        (tensor([[25.,  3.]]), tensor([[2, 1]]))
    """
    check_linear(input, weight, bias, "atoms", "features")
    with torch.no_grad():
        _, indices = topk_code(_linear(input, weight, bias), k, activation=activation)
    if through_torch(input, weight, bias):
        values = torch.ops.lect11ext.sparse_dots(input, indices, weight, bias)
    else:
        values = _C.sparse_dots(input, indices, weight, bias)
    return (torch.relu(values) if activation == "relu" else values), indices
