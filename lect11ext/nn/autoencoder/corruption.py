"""The corruptions of denoising autoencoders."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from ...functional import corrupt


class Corruption(nn.Module):
    r"""Corrupts the input of a denoising autoencoder while it trains; in ``eval()`` the input goes through as it is.

    Args:
        kind: ``"gaussian"``, ``"masking"`` or ``"salt_and_pepper"``.
        amount: the standard deviation, or the probability with which an element is replaced.
        low, high: what salt and pepper are.

    All as in :func:`lect11ext.functional.corrupt`. Shape: that of the input, which is any. No parameters.

    Example::

        >>> import torch, lect11ext
        >>> corruption = lect11ext.nn.Corruption("salt_and_pepper", 0.5)
        >>> x = torch.full((4, 6), 0.5)
        >>> noisy, corrupted = corruption(x, return_mask=True)
        >>> torch.equal(noisy != x, corrupted)
        True
        >>> corruption.eval()(x) is x
        True
    """

    def __init__(self, kind: str, amount: float, *, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.kind = kind
        self.amount = amount
        self.low = low
        self.high = high
        self._corrupt(
            torch.zeros(0, device="cpu"), False, None, torch.zeros(2, dtype=torch.int64, device="cpu")
        )  # checks

    @overload
    def forward(
        self,
        input: Tensor,
        *,
        return_mask: Literal[False] = ...,
        generator: torch.Generator | None = ...,
        key: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input: Tensor,
        *,
        return_mask: Literal[True],
        generator: torch.Generator | None = ...,
        key: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        input: Tensor,
        *,
        return_mask: bool = False,
        generator: torch.Generator | None = None,
        key: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The corrupted input; with ``return_mask`` a pair of it and where, in ``eval()`` nowhere (all false)."""
        if self.training:
            return self._corrupt(input, return_mask, generator, key)
        return (input, torch.zeros_like(input, dtype=torch.bool)) if return_mask else input

    def _corrupt(
        self, input: Tensor, return_mask: bool, generator: torch.Generator | None, key: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        return corrupt(
            input,
            self.kind,
            self.amount,
            low=self.low,
            high=self.high,
            return_mask=return_mask,
            generator=generator,
            key=key,
        )

    def extra_repr(self) -> str:
        ends = f", low={self.low}, high={self.high}" if self.kind == "salt_and_pepper" else ""
        return f"{self.kind!r}, amount={self.amount}{ends}"
