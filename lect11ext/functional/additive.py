"""Additive attention, without a tensor of queries × keys × hidden units."""

from __future__ import annotations

import torch
from torch import Tensor

from .._errors import OPTIONAL_TENSOR, TENSOR, wrong_type
from .._load import _C
from ._dispatch import through_torch


def additive_attention(
    query: Tensor, key: Tensor, value: Tensor, score_weight: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    r"""Averages the values, weighted by how a small network with one hidden layer scores each pair of query and key.

    .. math::
        \mathrm{out}_i = \sum_j \alpha_{ij} v_j, \qquad
        \alpha_{i} = \mathrm{softmax}_j \left( w^\top \tanh(q_i + k_j) + \mathrm{mask}_{ij} \right)

    Queries and keys come projected to the hidden layer, :math:`q = W_q x` and :math:`k = W_k y`; a bias goes to either.
    Plain PyTorch holds a tensor ``[..., L, S, H']``, several times over in training; here nothing is larger than the
    weights :math:`\alpha`, ``[..., L, S]``, and those are held for training only.

    Args:
        query: ``[..., L, H']``: float32, float64, bfloat16 or float16, any strides.
        key: ``[..., S, H']``, of the type of ``query``, as are ``value`` and ``score_weight``.
        value: ``[..., S, Dv]``. Batch dimensions of all three broadcast as by ``torch.matmul``.
        score_weight: :math:`w`, ``[H']``.
        attn_mask: broadcast to ``[..., L, S]``; bool, True where a query may attend to a key, or added to the scores:
            in the type of ``query``, or in float32 where that has 16 bits.

    Returns:
        ``[..., L, Dv]`` in the type of ``query``. A query that may attend to no key gets zeros, and passes no gradient
        on.

    Gradients: to query, key, value, score_weight and the additive mask, of any order; forward-mode AD; ``vmap``. Those
    of higher order and forward-mode AD take the plain formula, with its memory. What the mask bars, by False or −inf,
    is not looked at: padding may be NaN (in the plain formula a value only if it is barred from every query).
    Deterministic: the same bits for any number of threads; sums are formed in float32, or float64 for float64. Autocast
    casts everything but a float32 mask.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Bahdanau, Cho & Bengio 2014, "Neural machine translation by jointly learning to align and translate".

    Example::

        >>> import torch, lect11ext
        >>> query, key, value = torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 5)
        >>> lect11ext.functional.additive_attention(query, key, value, torch.randn(16)).shape
        torch.Size([2, 3, 5])
    """
    arguments = (query, key, value, score_weight, attn_mask)
    given = [a for a in arguments if a is not None]
    if through_torch(*given):
        return torch.ops.lect11ext.additive_attention(*arguments, False)[0]
    try:
        return _C.additive_attention(*arguments)
    except TypeError as error:
        raise wrong_type(
            error, query=(query, TENSOR), key=(key, TENSOR), value=(value, TENSOR),
            score_weight=(score_weight, TENSOR), attn_mask=(attn_mask, OPTIONAL_TENSOR),
        ) from None  # fmt: skip
