"""Recurrent modules. They derive from torch's base class, which brings parameters, initialisation and checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import gru_cell, lstm_cell


class LSTMCell(nn.RNNCellBase):
    r"""Drop-in for :class:`torch.nn.LSTMCell`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.lstm_cell`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn's.
        candidate: ``"tanh"``, or ``"sigmoid"`` for Goodfellow et al.'s eq. 10.41.
        grad_clip: clamps the incoming gradients of h' and c' element by element.

    Inputs: ``input`` ``[B, I]`` or ``[I]``, and ``(h, c)``, zeros where missing. Outputs: ``(h', c')``.

    Example::

        >>> import torch, lect11ext
        >>> cell = lect11ext.nn.LSTMCell(5, 4)
        >>> h, c = cell(torch.randn(3, 5))
        >>> h.shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        candidate: str = "tanh",
        grad_clip: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        if candidate not in ("tanh", "sigmoid"):
            raise ValueError(f"candidate must be 'tanh' or 'sigmoid', but got {candidate!r}")
        self.candidate = candidate
        self.grad_clip = grad_clip

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step; ``hx`` is ``(h, c)``."""
        if hx is None:
            zeros = _zero_state(self, input)
            hx = (zeros, zeros)
        return lstm_cell(
            input, hx, *_weights(self),
            candidate=self.candidate, grad_clip=self.grad_clip,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra(candidate=(self.candidate, "tanh"), grad_clip=(self.grad_clip, None))


class GRUCell(nn.RNNCellBase):
    r"""Drop-in for :class:`torch.nn.GRUCell`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.gru_cell`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn's.
        reset_after: False for the form of Cho et al. 2014, whose reset gate acts before the state's product.
        grad_clip: clamps the incoming gradient of h' element by element.

    Inputs: ``input`` ``[B, I]`` or ``[I]``, and ``h``, zeros where missing. Output: h'.

    Example::

        >>> import torch, lect11ext
        >>> lect11ext.nn.GRUCell(5, 4)(torch.randn(3, 5)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        grad_clip: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self.reset_after = reset_after
        self.grad_clip = grad_clip

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; ``hx`` is h."""
        if hx is None:
            hx = _zero_state(self, input)
        return gru_cell(
            input, hx, *_weights(self),
            reset_after=self.reset_after, grad_clip=self.grad_clip,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra(reset_after=(self.reset_after, True), grad_clip=(self.grad_clip, None))


def _weights(cell: nn.RNNCellBase) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    # From the dictionary: four look-ups through Module.__getattr__ take longer than a small step.
    p = cell._parameters
    if len(p) == 4:
        return p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]  # type: ignore[return-value]
    # Parametrised (weight_norm, …): the attribute is computed.
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


def _zero_state(cell: nn.RNNCellBase, input: Tensor) -> Tensor:
    return torch.zeros(*input.shape[:-1], cell.hidden_size, dtype=input.dtype, device=input.device)


def _extra(**arguments: tuple[object, object]) -> str:
    """The arguments that differ from their defaults, as extra_repr shows them."""
    return "".join(f", {name}={value!r}" for name, (value, default) in arguments.items() if value != default)
