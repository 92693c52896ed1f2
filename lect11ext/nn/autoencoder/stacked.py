"""Autoencoders of autoencoders' codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..._errors import check_type

Loss = Callable[[Tensor, Tensor], Tensor]


class StackedAutoencoder(nn.Module):
    r"""Autoencoders one upon another: each encodes the code of the one below.

    .. math::
        h_0 = x, \quad h_i = f_i(h_{i-1}), \qquad r_n = h_n, \quad r_{i-1} = g_i(r_i)

    Trained greedily, stage i on the codes of the stages below it, whose parameters stay as they are, with
    :meth:`stage_loss`; then, if wanted, all together as one deep autoencoder. The stages below run in the mode they are
    in: put those with dropout or batch norm into ``eval()``.

    Args:
        encoders, decoders: f_1 … f_n and g_1 … g_n, from the data upwards; each takes and returns one tensor.

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
        check_type("encoders", encoders, (Sequence, nn.ModuleList))
        check_type("decoders", decoders, (Sequence, nn.ModuleList))
        if len(encoders) != len(decoders) or not encoders:
            raise ValueError(
                f"encoders and decoders must be as many, and at least one, but got {len(encoders)} and {len(decoders)}"
            )
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)

    def __len__(self) -> int:
        return len(self.encoders)

    def encode(self, input: Tensor, depth: int | None = None) -> Tensor:
        """The code of the lowest ``depth`` stages, by default of all."""
        for encoder in list(self.encoders)[: self._depth(depth)]:
            input = encoder(input)
        return input

    def decode(self, code: Tensor, depth: int | None = None) -> Tensor:
        """From the code of the lowest ``depth`` stages, by default of all, down to the data."""
        for decoder in list(self.decoders)[: self._depth(depth)][::-1]:
            code = decoder(code)
        return code

    def forward(self, input: Tensor) -> Tensor:
        """The reconstruction by the whole stack."""
        return self.decode(self.encode(input))

    def stage_parameters(self, stage: int) -> list[nn.Parameter]:
        """What an optimizer of one stage is to be given; stages count from 0."""
        stage = self._stage(stage)
        return [*self.encoders[stage].parameters(), *self.decoders[stage].parameters()]

    def stage_loss(
        self,
        input: Tensor,
        stage: int,
        loss: Loss = nn.functional.mse_loss,
        corruption: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """How well a stage reconstructs what comes to it: ``loss(g(f(corruption(h))), h)``. No gradient goes below.

        What ``loss`` returns is returned: of :func:`lect11ext.functional.reconstruction_loss` give a functools.partial,
        with the likelihood and a reduction to a scalar.
        """
        stage = self._stage(stage)
        with torch.no_grad():
            below = self.encode(input, stage)
        seen = below if corruption is None else corruption(below)
        return loss(self.decoders[stage](self.encoders[stage](seen)), below)

    def _depth(self, depth: int | None) -> int:
        return len(self) if depth is None else self._checked("depth", depth, len(self))

    def _stage(self, stage: int) -> int:
        return self._checked("stage", stage, len(self) - 1)

    @staticmethod
    def _checked(name: str, value: int, high: int) -> int:
        check_type(name, value, (int,))
        if not 0 <= value <= high:
            raise ValueError(f"{name} must lie between 0 and {high}, but got {value}")
        return value
