"""Recurrent layers. They derive from torch's base class, which brings parameters, initialisation and checkpoints.

Not from torch.nn.LSTM and GRU themselves: torch.compile breaks the graph at any subclass of those two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ...functional import gru, lstm
from ...functional.recurrent.checks import check_rate, zoneout_rates
from ._layers import Layers
from .cells import _extra


class LSTM(Layers):
    r"""Drop-in for :class:`torch.nn.LSTM`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.lstm_cell`, what happens over time in
    :func:`lect11ext.functional.lstm`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            torch.nn's.
        candidate: ``"tanh"``, or ``"sigmoid"`` for Goodfellow et al.'s eq. 10.41.
        grad_clip: clamps the gradients of h and c element by element at every step.
        layer_norm: whether the gates' sums are normalised (parameters layer_norm_ih_l0, layer_norm_hh_l0, …).
        peephole: whether the gates see c (parameters weight_peephole_l0, …).
        zoneout: probabilities (of h, of c), or one for both.
        recurrent_dropout, truncate, recompute: as in :func:`lect11ext.functional.lstm`.

    Inputs: ``input`` ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]`` or a PackedSequence, ``(h, c)``,
    zeros where missing, and for padded input ``lengths=``, whose values are not checked, and ``reset=``. Outputs:
    ``(output, (h_n, c_n))``; with ``return_cells=True`` ``(output, (h_n, c_n), cells)``, the last layer's c at every
    step in output's form.

    Example::

        >>> import torch, lect11ext
        >>> layer = lect11ext.nn.LSTM(5, 4, num_layers=2, batch_first=True)
        >>> output, (h, c) = layer(torch.randn(3, 7, 5), lengths=torch.tensor([7, 2, 0]))
        >>> output.shape, h.shape
        (torch.Size([3, 7, 4]), torch.Size([2, 3, 4]))
        >>> output, (h, c), cells = layer(torch.randn(3, 7, 5), return_cells=True)
        >>> cells.shape, torch.equal(cells[:, -1], c[-1])
        (torch.Size([3, 7, 4]), True)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        candidate: str = "tanh",
        grad_clip: float | None = None,
        layer_norm: bool = False,
        peephole: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        truncate: int = 0,
        recompute: int = 0,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip
        if candidate not in ("tanh", "sigmoid"):
            raise ValueError(f"candidate must be 'tanh' or 'sigmoid', but got {candidate!r}")
        self.candidate = candidate
        self.peephole = peephole
        self.zoneout = zoneout
        self._rates()
        self._set_options(4, grad_clip, layer_norm, recurrent_dropout, truncate, recompute, peephole=peephole)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """All steps; ``hx`` is ``(h, c)``. With ``return_cells`` a third item: c of the last layer at every step."""
        if hx is not None:
            if not isinstance(hx, (tuple, list)):
                raise TypeError(f"hx must be (h, c), two tensors, but got {type(hx).__name__}")
            if len(hx) != 2 or not all(isinstance(s, Tensor) for s in hx):
                got = ", ".join(type(s).__name__ for s in hx)
                raise TypeError(f"hx must be (h, c), two tensors, but got ({got})")
        states = None if hx is None else tuple(hx)
        (output, *cells), (h, c) = self._forward(input, states, lengths, reset, return_cells=return_cells)
        return output, (h, c), *cells

    def _rates(self) -> tuple[float, float]:
        """Zoneout's, of h and of c."""
        return zoneout_rates(self.zoneout if isinstance(self.zoneout, (tuple, list)) else (self.zoneout, self.zoneout))

    def _sizes(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...],
        lengths: Tensor | None,
        reset: Tensor | None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        h, c = states
        output, last, *cells = lstm(
            input, (h, c), self.all_weights, batch_first=self.batch_first, bidirectional=self.bidirectional,
            dropout=float(self.dropout), training=self.training, lengths=lengths, reset=reset, candidate=self.candidate,
            grad_clip=self.grad_clip, layer_norms=self._layer_norms(),
            peepholes=[getattr(self, "weight_peephole" + e) for e in self._endings()] if self.peephole else None,
            zoneout=self._rates(), recurrent_dropout=self.recurrent_dropout, truncate=self.truncate,
            recompute=self.recompute, **options,
        )  # fmt: skip
        return (output, *cells), last

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra(
            candidate=(self.candidate, "tanh"), grad_clip=(self.grad_clip, None), layer_norm=(self.layer_norm, False),
            peephole=(self.peephole, False), zoneout=(self.zoneout, 0.0),
            recurrent_dropout=(self.recurrent_dropout, 0.0), truncate=(self.truncate, 0),
            recompute=(self.recompute, 0),
        )  # fmt: skip


class GRU(Layers):
    r"""Drop-in for :class:`torch.nn.GRU`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.gru_cell`, what happens over time in
    :func:`lect11ext.functional.lstm`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn's.
        grad_clip: clamps the gradient of h element by element at every step.
        reset_after: whether the reset gate acts after the recurrent product, as in torch.nn, or before it; not
            before it with ``layer_norm``.
        layer_norm: whether the gates' sums are normalised (parameters layer_norm_ih_l0, layer_norm_hh_l0, …).
        zoneout: probability with which a unit keeps its value.
        recurrent_dropout, truncate, recompute: as in :func:`lect11ext.functional.lstm`.

    Inputs: ``input`` ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]`` or a PackedSequence, ``h``, zeros
    where missing, and for padded input ``lengths=``, whose values are not checked, and ``reset=``. Outputs:
    ``(output, h_n)``.

    Example::

        >>> import torch, lect11ext
        >>> output, h = lect11ext.nn.GRU(5, 4, bidirectional=True)(torch.randn(7, 3, 5))
        >>> output.shape, h.shape
        (torch.Size([7, 3, 8]), torch.Size([2, 3, 4]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        grad_clip: float | None = None,
        reset_after: bool = True,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        truncate: int = 0,
        recompute: int = 0,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype
        )
        check_rate("zoneout", zoneout)
        self.reset_after = reset_after
        self.zoneout = zoneout
        self._set_options(3, grad_clip, layer_norm, recurrent_dropout, truncate, recompute, reset_after=reset_after)
        if layer_norm and not reset_after:
            raise ValueError("layer_norm needs reset_after=True: the norm is over the sums of all gates")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """All steps; ``hx`` is h."""
        if hx is not None and not isinstance(hx, Tensor):
            raise TypeError(f"hx must be a Tensor or None, but got {type(hx).__name__}")
        (output,), (h,) = self._forward(input, None if hx is None else (hx,), lengths, reset)
        return output, h

    def _sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...],
        lengths: Tensor | None,
        reset: Tensor | None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        output, h = gru(
            input, states[0], self.all_weights, batch_first=self.batch_first, bidirectional=self.bidirectional,
            dropout=float(self.dropout), training=self.training, lengths=lengths, reset=reset, grad_clip=self.grad_clip,
            reset_after=self.reset_after, layer_norms=self._layer_norms(), zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout, truncate=self.truncate, recompute=self.recompute, **options,
        )  # fmt: skip
        return (output,), (h,)

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra(
            grad_clip=(self.grad_clip, None), reset_after=(self.reset_after, True),
            layer_norm=(self.layer_norm, False), zoneout=(self.zoneout, 0.0),
            recurrent_dropout=(self.recurrent_dropout, 0.0), truncate=(self.truncate, 0),
            recompute=(self.recompute, 0),
        )  # fmt: skip
