"""Keys and normals of the counter-based stream that all drawing functions use (docs/random.md)."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from .._errors import OPTIONAL_GENERATOR, TENSOR, check_range, wrong_type
from .._load import _C


def in_functorch() -> bool:
    """Whether a torch.func transform is active, where drawing has rules of its own."""
    return _functorch.peek_interpreter_stack() is not None


def words_of_normals(numel: int, *dtypes: torch.dtype) -> int:
    """How many words so many normals take: float64 takes two for a uniform. What :func:`philox_key` is asked for."""
    return numel * (2 if torch.float64 in dtypes else 1)


def philox_key(like: Tensor, numel: int, generator: torch.Generator | None = None) -> Tensor:
    r"""A key ``[seed, offset]`` (int64, on the device of ``like``) for ``numel`` normals, taken from a generator.

    On the CPU the seed is one 64-bit draw of the generator and the offset 0; on CUDA the key is the generator's own
    Philox state, which advances by ``4 * ceil(numel / 4)`` 32-bit values. ``torch.manual_seed``, ``get_rng_state``,
    ``fork_rng`` and activation checkpointing therefore act as on ``torch.randn``.

    Under :func:`torch.vmap`, ``randomness="same"`` gives all samples one key, ``"different"`` gives each sample its
    own (same seed, offsets ``ceil(numel / 4)`` apart), and ``"error"`` raises a RuntimeError.

    Args:
        like: names the device; its values are not read.
        numel: how many normals will be drawn with the key; one of float64 counts twice. For the dropout of an attention
            ``4 * B * H * L * ceil(S / 8)``.
        generator: a generator of that device, by default the device's default one.

    Example::

        >>> import torch, lect11ext
        >>> _ = torch.manual_seed(0)
        >>> key = lect11ext.functional.philox_key(torch.empty(0), 4)
        >>> key.shape, key.dtype
        (torch.Size([2]), torch.int64)
    """
    if torch.compiler.is_compiling():
        # torch.compile merges calls of the same arguments, but for random ops of torch's own, and two draws would be
        # one. It never merges torch.empty; ``like`` stays in for vmap, which sees by it that there are samples.
        like = like.detach().reshape(-1)[:0] + torch.empty(0, dtype=like.dtype, device=like.device)
        return torch.ops.lect11ext.philox_key(like, numel, generator)
    if in_functorch():
        return _philox_key_vmap(like, numel, generator)
    try:
        return _C.philox_key(like, numel, generator)
    except TypeError as error:
        raise wrong_type(
            error, like=(like, TENSOR), numel=(numel, (int,)), generator=(generator, OPTIONAL_GENERATOR)
        ) from None


def _philox_key_vmap(like: Tensor, numel: int, generator: torch.Generator | None) -> Tensor:
    # A batching rule does not fire where no input is batched, so the levels are read here, from the inside out.
    levels = []
    for interpreter in reversed(_functorch.get_interpreter_stack() or []):
        if interpreter.key() != _functorch.TransformType.Vmap:
            continue
        vmap = _functorch.CVmapInterpreterPtr(interpreter)
        if vmap.randomness() == _functorch.RandomnessType.Error:
            raise RuntimeError(
                "vmap: called random operation while in randomness error mode. Please either use the "
                "'same' or 'different' randomness flags on vmap or perform the randomness operation out of vmap"
            )
        if vmap.randomness() == _functorch.RandomnessType.Different:
            levels.append((vmap.level(), vmap.batchSize()))
    device = torch.empty(0, device=like.device)
    blocks = (numel + 3) // 4
    samples = 1
    for _, size in levels:
        samples *= size
    key = torch.ops.lect11ext.philox_key(device, 4 * blocks * samples, generator)
    stride = blocks
    for level, size in levels:
        with temporarily_clear_interpreter_stack():  # inner levels must not wrap what belongs to this one
            step = torch.arange(size, dtype=torch.int64, device=like.device) * stride
            offsets = torch.stack([torch.zeros_like(step), step], 1)
        key = key + _functorch._add_batch_dim(offsets, 0, level)
        stride *= size
    return key


def philox_normal(size: Sequence[int], key: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Standard normals number 0 … numel − 1 of the stream of ``key``, on the key's device.

    What :func:`gaussian_rsample_kl` draws inside is bit for bit ``philox_normal(z.shape, key, dtype=d)``, where d is
    float64 if mean, logvar or the prior is, else float32. The stream is that of
    docs/random.md: Philox4x32-10 and Box–Muller, the same bits for any number of threads, the same values to rounding
    on every CPU and GPU. ``float64`` takes two words a uniform and is another stream; half types are ``float32``
    rounded. No gradient.

    Args:
        size: the shape.
        key: int64 tensor ``[seed, offset]``; ``offset`` counts blocks of four words.
        dtype: float32, float64, bfloat16 or float16.

    Raises:
        TypeError: ``key`` is not int64, or ``dtype`` not one of the four.
        ValueError: ``key`` does not have the shape [2], or ``size`` a negative number.

    Example::

        >>> import torch, lect11ext
        >>> key = torch.tensor([7, 0])
        >>> lect11ext.functional.philox_normal((3,), key).dtype
        torch.float32
    """
    try:
        # Not all of them: of a symbolic size it would make a number.
        shape = [n if isinstance(n, int | torch.SymInt) else operator.index(n) for n in size]
    except TypeError:
        raise TypeError(f"size must be a sequence of ints, but got {size!r}") from None
    for n in shape:
        check_range("size", n)
    for name, value, kind in (("key", key, Tensor), ("dtype", dtype, torch.dtype)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, but got {type(value).__name__}")
    return torch.ops.lect11ext.philox_normal(key, shape, dtype)
