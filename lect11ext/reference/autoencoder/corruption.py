"""The corruptions of denoising autoencoders in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..random import philox_normal, philox_words


def _words(input: Tensor, key: Tensor) -> Tensor:
    """Words number 0 … numel − 1 of the stream, as int64."""
    seed, offset = (int(v) % 2**64 for v in key.tolist())
    words = philox_words(seed, offset, -(-input.numel() // 4)).astype(np.int64).reshape(-1)[: input.numel()]
    return torch.from_numpy(words).reshape(input.shape).to(input.device)


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
    noise: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`lect11ext.functional.corrupt`.

    ``key`` takes the same noise as the fused function; without it torch draws; ``noise`` gives it outright: normals
    for ``"gaussian"``, else words of 32 bits as int64.
    """
    if kind == "gaussian":
        compute = torch.promote_types(input.dtype, torch.float32)
        if noise is None and key is not None:
            noise = philox_normal(input.shape, key, dtype=compute)
        elif noise is None:
            noise = torch.randn(input.shape, dtype=compute, device=input.device, generator=generator)
        output = (input.to(compute) + amount * noise.to(compute)).to(input.dtype)
        mask = torch.ones_like(input, dtype=torch.bool)
    else:
        if noise is None and key is not None:
            noise = _words(input, key)
        elif noise is None:
            noise = torch.randint(2**32, input.shape, device=input.device, generator=generator)
        threshold = round(amount * 2**32)
        mask = noise < threshold
        if kind == "masking":
            value = torch.zeros((), dtype=input.dtype, device=input.device)
        else:
            salt, pepper = (torch.tensor(v, dtype=torch.float64).to(input) for v in (high, low))
            value = torch.where(noise < threshold // 2, pepper, salt)
        output = torch.where(mask, value, input)
    return (output, mask) if return_mask else output
