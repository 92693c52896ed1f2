"""Autoencoders of autoencoders' codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


class StackedAutoencoder(nn.Module):
    r"""Autoencoders one upon another: each encodes the code of the one below.

    .. math::
        h_0 = x, \quad h_i = f_i(h_{i-1}), \qquad r_n = h_n, \quad r_{i-1} = g_i(r_i)

    Trained greedily, stage i on the codes of the stages below it, which stay as they are, with :meth:`stage_loss`;
    then, if wanted, all together as one deep autoencoder.

    Args:
        encoders, decoders: f_1 … f_n and g_1 … g_n, from the data upwards.

    Shape: x in; the reconstruction r_0 out.

    Source: Hinton & Salakhutdinov 2006; Bengio et al. 2007; Vincent et al. 2010 (each stage a denoising autoencoder:
    give :meth:`stage_loss` a ``corruption``).

    Example::

        >>> import torch, lect11ext
        >>> encoders = [torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.Tanh()) for a, b in ((16, 8), (8, 2))]
        >>> stack = lect11ext.nn.StackedAutoencoder(encoders, [torch.nn.Linear(8, 16), torch.nn.Linear(2, 8)])
        >>> x = torch.randn(5, 16)
        >>> stack.stage_loss(x, 1).shape, stack.encode(x).shape, stack(x).shape
        (torch.Size([]), torch.Size([5, 2]), torch.Size([5, 16]))
    """

    def __init__(self, encoders: Sequence[nn.Module], decoders: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(encoders) != len(decoders) or not encoders:
            raise ValueError(
                f"encoders and decoders must be as many, and at least one, but got {len(encoders)} and {len(decoders)}"
            )
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)

    def __len__(self) -> int:
        return len(self.encoders)

    def encode(self, input: Tensor, depth: int | None = None) -> Tensor:
        """The code of the lowest ``depth`` stages, by default of all."""
        for encoder in list(self.encoders)[: self._checked("depth", depth, 0)]:
            input = encoder(input)
        return input

    def decode(self, code: Tensor, depth: int | None = None) -> Tensor:
        """From the code of the lowest ``depth`` stages, by default of all, down to the data."""
        for decoder in list(self.decoders)[: self._checked("depth", depth, 0)][::-1]:
            code = decoder(code)
        return code

    def forward(self, input: Tensor) -> Tensor:
        """The reconstruction by the whole stack."""
        return self.decode(self.encode(input))

    def stage_parameters(self, stage: int) -> list[nn.Parameter]:
        """What an optimizer of one stage is to be given; stages count from 0."""
        stage = self._checked("stage", stage, 0, -1)
        return [*self.encoders[stage].parameters(), *self.decoders[stage].parameters()]

    def stage_loss(
        self,
        input: Tensor,
        stage: int,
        loss: Loss = nn.functional.mse_loss,
        corruption: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """How well a stage reconstructs what comes to it: ``loss(g(f(corruption(h))), h)``. No gradient goes below."""
        stage = self._checked("stage", stage, 0, -1)
        with torch.no_grad():
            below = self.encode(input, stage)
        seen = below if corruption is None else corruption(below)
        return loss(self.decoders[stage](self.encoders[stage](seen)), below)

    def _checked(self, name: str, value: int | None, low: int, beyond: int = 0) -> int:
        high = len(self) + beyond
        if value is None:
            return high
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, but got {type(value).__name__}")
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low} and {high}, but got {value}")
        return value
