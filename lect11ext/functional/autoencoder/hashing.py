"""Semantic hashing: binary codes, packed into bytes, and look-up by Hamming distance."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._errors import NUMBER, OPTIONAL_INT, TENSOR, check_range, check_type, wrong_type
from ..._load import _C
from .._dispatch import through_torch

INT = (int,)


def binarize(input: Tensor, threshold: float = 0.5) -> Tensor:
    r"""Ones and zeros that let gradients through: 1 where ``input > threshold``, else 0.

    Args:
        input: any shape and strides: float32, float64, bfloat16 or float16.
        threshold: rounded to the type of ``input``, as ``input > threshold`` does.

    Returns:
        Exactly 0 or 1, in the type of ``input``. NaN stays NaN.

    Gradients: of the identity, of any order and in forward mode (the straight-through estimator): what comes in goes
    out unchanged, for the step's own derivative is zero nearly everywhere and trains nothing. ``vmap``. Autocast
    changes no type.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Bengio, Léonard & Courville 2013.

    Example::

        >>> import torch, lect11ext
        >>> lect11ext.functional.binarize(torch.tensor([0.2, 0.5, 0.9]))
        tensor([0., 0., 1.])
    """
    if through_torch(input):
        return torch.ops.lect11ext.binarize(input, threshold)
    try:
        return _C.binarize(input, threshold)
    except TypeError as error:
        raise wrong_type(error, input=(input, TENSOR), threshold=(threshold, NUMBER)) from None


def pack_bits(input: Tensor, threshold: float = 0.5) -> Tensor:
    r"""Packs the last dimension into bytes, eight bits each: a bit is set where ``input > threshold``.

    The layout is numpy.packbits' and that of faiss's binary indexes: the first bit is the most significant one of the
    first byte, and what is missing to a whole byte is zero.

    Args:
        input: ``[*, bits]``, any strides: float32, float64, bfloat16, float16, bool, uint8 or a signed integer.
        threshold: rounded to the type of ``input`` where that is a floating-point one; integers are compared with it
            as a float64, exactly up to 2**53; of bool the bits are the elements themselves.

    Returns:
        uint8, ``[*, ceil(bits / 8)]``. NaN is above no threshold: its bit is zero. No gradient (:func:`binarize` has
        one). ``vmap``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example::

        >>> import torch, lect11ext
        >>> lect11ext.functional.pack_bits(torch.tensor([0.9, 0.1, 0.8, 0.0, 0.0, 0.0, 0.0, 0.7, 0.6]))
        tensor([161, 128], dtype=torch.uint8)
    """
    if through_torch(input):
        return torch.ops.lect11ext.pack_bits(input, threshold)
    try:
        return _C.pack_bits(input, threshold)
    except TypeError as error:
        raise wrong_type(error, input=(input, TENSOR), threshold=(threshold, NUMBER)) from None


def unpack_bits(codes: Tensor, num_bits: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""The bits of packed codes as zeros and ones: what :func:`pack_bits` packed.

    Args:
        codes: uint8, ``[*, bytes]``, any strides.
        num_bits: how many bits of a code are wanted, at most ``8 * bytes``; all by default.
        dtype: of the result: float32, float64, bfloat16, float16, bool, uint8 or a signed integer.

    Returns:
        ``[*, num_bits]``. No gradient. ``vmap``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example::

        >>> import torch, lect11ext
        >>> lect11ext.functional.unpack_bits(torch.tensor([[160]], dtype=torch.uint8), 3)
        tensor([[1., 0., 1.]])
    """
    if not torch.compiler.is_compiling():
        check_type("codes", codes, TENSOR)
        check_type("num_bits", num_bits, OPTIONAL_INT)
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, but got {type(dtype).__name__}")
        check_range("num_bits", num_bits)
    return torch.ops.lect11ext.unpack_bits(codes, num_bits, dtype)


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""The number of bits in which codes differ, for all pairs.

    Args:
        a, b: packed codes (:func:`pack_bits`), uint8, ``[*, n, bytes]`` and ``[*, m, bytes]`` of at most 8191 bytes a
            code; the batches broadcast. Any strides.

    Returns:
        int32, ``[*, n, m]``. No gradient. ``vmap``.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Example::

        >>> import torch, lect11ext
        >>> codes = torch.tensor([[0], [1], [255]], dtype=torch.uint8)
        >>> lect11ext.functional.hamming_distance(codes[:1], codes)
        tensor([[0, 1, 8]], dtype=torch.int32)
    """
    if through_torch(a, b):
        return torch.ops.lect11ext.hamming_distance(a, b)
    try:
        return _C.hamming_distance(a, b)
    except TypeError as error:
        raise wrong_type(error, a=(a, TENSOR), b=(b, TENSOR)) from None


def hamming_topk(query: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""The k codes nearest to each query, without the matrix of all distances.

    Args:
        query, codes: packed codes (:func:`pack_bits`), uint8, ``[n, bytes]`` and ``[m, bytes]`` of at most 8191 bytes
            a code, any strides.
        k: from 0 to m.

    Returns:
        ``(distances, indices)``, int32 and int64, both ``[n, k]``: ascending by distance and, where that is the same,
        by index. So the result is one and the same on every device and for any number of threads. No gradient.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Salakhutdinov & Hinton 2009.

    Example::

        >>> import torch, lect11ext
        >>> codes = torch.tensor([[255], [1], [0], [1]], dtype=torch.uint8)
        >>> distances, indices = lect11ext.functional.hamming_topk(codes[2:3], codes, 3)
        >>> distances.tolist(), indices.tolist()
        ([[0, 1, 1]], [[2, 1, 3]])
    """
    if through_torch(query, codes):
        return torch.ops.lect11ext.hamming_topk(query, codes, k)
    try:
        return _C.hamming_topk(query, codes, k)
    except TypeError as error:
        raise wrong_type(error, query=(query, TENSOR), codes=(codes, TENSOR), k=(k, INT)) from None


def hamming_radius(query: Tensor, codes: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""All codes within ``radius`` flipped bits of each query, without the matrix of all distances.

    Args:
        query, codes: packed codes (:func:`pack_bits`), uint8, ``[n, bytes]`` and ``[m, bytes]`` of at most 8191 bytes
            a code, any strides.
        radius: the largest distance that is found; none or more.

    Returns:
        ``(offsets, distances, indices)``, int64 ``[n + 1]``, int32 and int64: what query i found stands from
        ``offsets[i]`` to ``offsets[i + 1]``, in ascending order of the index. No gradient. The sizes depend on the
        data: ``torch.compile(fullgraph=True)`` takes them as unbacked; ``vmap`` serves where all samples find as many.
        On CUDA the host waits for their number, which no CUDA graph can capture.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Salakhutdinov & Hinton 2009.

    Example::

        >>> import torch, lect11ext
        >>> codes = torch.tensor([[255], [1], [0], [3]], dtype=torch.uint8)
        >>> offsets, distances, indices = lect11ext.functional.hamming_radius(codes[:3], codes, 1)
        >>> offsets.tolist(), distances.tolist(), indices.tolist()
        ([0, 1, 4, 6], [0, 0, 1, 1, 1, 0], [0, 1, 2, 3, 1, 2])
    """
    if through_torch(query, codes):
        return torch.ops.lect11ext.hamming_radius(query, codes, radius)
    try:
        return _C.hamming_radius(query, codes, radius)
    except TypeError as error:
        raise wrong_type(error, query=(query, TENSOR), codes=(codes, TENSOR), radius=(radius, INT)) from None


def _fake_hamming_radius(query: Tensor, codes: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.ops.lect11ext.hamming_topk(query, codes, 0)  # checks the codes
    if radius < 0:
        raise ValueError(f"radius must be nonnegative, but got {radius}")
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        query.new_empty(query.size(0) + 1, dtype=torch.int64),
        query.new_empty(found, dtype=torch.int32),
        query.new_empty(found, dtype=torch.int64),
    )


# In Python, for a Meta kernel in C++ has no way to say that a size is known only once the op has run.
torch.library.register_fake("lect11ext::hamming_radius", _fake_hamming_radius)
