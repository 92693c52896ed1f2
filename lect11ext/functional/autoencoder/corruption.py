"""The corruptions of denoising autoencoders."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..._errors import NUMBER, OPTIONAL_GENERATOR, OPTIONAL_TENSOR, TENSOR, wrong_type
from ..._load import _C
from .._dispatch import through_torch
from ..random import philox_key, words_of_normals


@overload
def corrupt(
    input: Tensor,
    kind: str,
    amount: float,
    *,
    low: float = ...,
    high: float = ...,
    return_mask: Literal[False] = ...,
    generator: torch.Generator | None = ...,
    key: Tensor | None = ...,
) -> Tensor: ...


@overload
def corrupt(
    input: Tensor,
    kind: str,
    amount: float,
    *,
    low: float = ...,
    high: float = ...,
    return_mask: Literal[True],
    generator: torch.Generator | None = ...,
    key: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def corrupt(
    input: Tensor,
    kind: str,
    amount: float,
    *,
    low: float = ...,
    high: float = ...,
    return_mask: bool,
    generator: torch.Generator | None = ...,
    key: Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def corrupt(
    input: Tensor,
    kind: str,
    amount: float,
    *,
    low: float = 0.0,
    high: float = 1.0,
    return_mask: bool = False,
    generator: torch.Generator | None = None,
    key: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Corrupts the input of a denoising autoencoder, in one pass over memory.

    ========================= =====================================================================================
    ``kind``                  output
    ========================= =====================================================================================
    ``"gaussian"``            :math:`x + \sigma \varepsilon`, ``amount`` being the standard deviation :math:`\sigma`
    ``"masking"``             each element is zero with probability ``amount``; the others are *not* scaled up, as
                              dropout's are
    ``"salt_and_pepper"``     with probability ``amount`` an element becomes ``low`` or ``high``, half and half
    ========================= =====================================================================================

    The noise is drawn again in the backward, never stored.

    Args:
        input: any shape and strides: float32, float64, bfloat16 or float16.
        kind: one of the three.
        amount: nonnegative and finite for ``"gaussian"``, else from 0 (the input itself, copied) to 1.
        low, high: what salt and pepper are, in any order and of any value, NaN and infinity too; rounded to the type
            of ``input``. The other kinds do not use them.
        return_mask: whether the second output is asked for; it costs a byte an element.
        generator: where the key is drawn from, by default the device's default generator.
        key: int64 tensor ``[seed, offset]`` that makes the draw explicit (:func:`philox_key`); then no generator is
            touched. ``torch.compile(fullgraph=True)`` takes no generator: draw a key from it outside and pass that.

    Returns:
        The corrupted input, contiguous and of its type; with ``return_mask`` a pair of it and a bool tensor that is
        true where an element was corrupted (everywhere for ``"gaussian"``), for a loss on these elements alone.

    Gradients: to the input, of any order; forward-mode AD; ``vmap`` (``randomness=`` decides whether samples share
    their noise). An element that was replaced has no gradient, by selection: whatever stands there, NaN too, does not
    show, neither in the output nor in the gradient.

    Deterministic: the same key gives the same bits for any number of threads. An element is replaced where its word
    of the stream is below ``round(amount * 2**32)`` (becoming ``low`` below half of that), so that the same elements
    are, bit for bit, in every type, on every CPU and on CUDA. The normals are those of :func:`philox_normal`.
    Autocast changes no type.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Vincent et al. 2008, 2010.

    Example::

        >>> import torch, lect11ext
        >>> x = torch.rand(4, 6)
        >>> noisy, corrupted = lect11ext.functional.corrupt(x, "masking", 0.25, return_mask=True)
        >>> torch.equal(noisy, x.masked_fill(corrupted, 0))
        True
    """
    if through_torch(input):
        if key is None:
            numel = input.numel()
            key = philox_key(input, words_of_normals(numel, input.dtype) if kind == "gaussian" else numel, generator)
        output, mask = torch.ops.lect11ext.corrupt(input, key, kind, amount, low, high, return_mask)
        return (output, mask) if return_mask else output
    try:
        output, mask = _C.corrupt(input, kind, amount, low, high, return_mask, generator, key)
    except TypeError as error:
        raise wrong_type(
            error, input=(input, TENSOR), kind=(kind, (str,)), amount=(amount, NUMBER), low=(low, NUMBER),
            high=(high, NUMBER), return_mask=(return_mask, (bool,)), generator=(generator, OPTIONAL_GENERATOR),
            key=(key, OPTIONAL_TENSOR),
        ) from None  # fmt: skip
    if not return_mask:
        return output
    assert mask is not None
    return output, mask
