"""Recurrent layers. They derive from torch's base class, which brings parameters, initialisation and checkpoints.

Not from torch.nn.LSTM and GRU themselves: torch.compile breaks the graph at any subclass of those two.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ...functional import gru, lstm
from ...functional.recurrent.checks import check_batch_sizes, check_options, check_rate, zoneout_rates
from .cells import _extra


class _Layers(nn.RNNBase):
    """What the two share: parameters beyond torch's, checks, zero states, packed sequences."""

    layer_norm: bool
    peephole: bool = False

    def _set_options(
        self,
        gates: int,
        grad_clip: float | None,
        layer_norm: bool,
        recurrent_dropout: float,
        truncate: int,
        recompute: int,
        **flags: bool,
    ) -> None:
        """The options that both layers have, and the parameters that these and each's own flags bring."""
        check_rate("recurrent_dropout", recurrent_dropout)
        check_options(grad_clip, truncate, recompute, None, layer_norm=layer_norm, **flags)
        self.grad_clip = grad_clip
        self.layer_norm = layer_norm
        self.recurrent_dropout = recurrent_dropout
        self.truncate = truncate
        self.recompute = recompute
        self._add_parameters(gates)

    def _add_parameters(self, gates: int) -> None:
        """Scales of norms, and peepholes: beside torch's parameters, with its names' endings."""
        like: Tensor = self.get_parameter("weight_ih_l0").detach()
        for ending in self._endings():
            if self.layer_norm:
                for part in ("ih", "hh"):
                    scale = nn.Parameter(like.new_ones(gates * self.hidden_size))
                    self.register_parameter(f"weight_norm_{part}{ending}", scale)
            if self.peephole:
                bound = self.hidden_size**-0.5
                weight = nn.Parameter(like.new_empty(3, self.hidden_size).uniform_(-bound, bound))
                self.register_parameter(f"weight_peephole{ending}", weight)

    def _endings(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def reset_parameters(self) -> None:
        """As torch.nn's, uniform within ±1/√hidden_size; scales of norms are one."""
        super().reset_parameters()
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("weight_norm_"):
                nn.init.ones_(parameter)
        for name in getattr(self, "parametrizations", ()):
            if name.startswith("weight_norm_"):
                with suppress(RuntimeError):  # one without a right_inverse cannot be given a value
                    setattr(self, name, torch.ones_like(getattr(self, name)))

    def _layer_norms(self) -> list[tuple[Tensor, Tensor]] | None:
        if not self.layer_norm:
            return None
        parts = ("weight_norm_ih", "weight_norm_hh")
        return [(getattr(self, parts[0] + e), getattr(self, parts[1] + e)) for e in self._endings()]

    def flatten_parameters(self) -> None:
        """Accepted and not needed: weights are read wherever they lie."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        if getattr(self._flat_weights[0], "dtype", None) != self.weight_ih_l0.dtype:
            self._update_flat_weights()  # where torch looks for the weights' type; stale in torch.func.functional_call
        super().check_input(input, batch_sizes)

    def _run(
        self,
        input: Tensor,
        states: tuple[Tensor, ...],
        lengths: Tensor | None,
        reset: Tensor | None,
        **options: Any,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What is given for every step, output first, and the last states."""
        raise NotImplementedError

    def _sizes(self) -> tuple[int, ...]:
        """The columns of each state."""
        raise NotImplementedError

    def _forward(
        self,
        input: Tensor | PackedSequence,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        **options: Any,
    ) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, states, lengths, reset, **options)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor or a PackedSequence, but got {type(input).__name__}")
        name = type(self).__name__
        if input.dim() not in (2, 3):
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.dim() == 2:
            if lengths is not None or reset is not None:
                raise ValueError(f"{name}: lengths and reset need a batched, 3-D input, but got 2-D")
            if states is not None:
                self._check_dims(states, 2, "unbatched 2-D")
                states = tuple(s.unsqueeze(1) for s in states)
            batch = 0 if self.batch_first else 1
            over_time, last = self._forward(input.unsqueeze(batch), states, None, None, **options)
            return tuple(t.squeeze(batch) for t in over_time), tuple(s.squeeze(1) for s in last)
        self.check_input(input, None)
        batch_size = input.size(0 if self.batch_first else 1)
        if states is None:
            states = self._zeros(input, batch_size)
        else:
            self._check_dims(states, 3, "batched 3-D")
            self._check_sizes(states, batch_size)
        return self._run(input, states, lengths, reset, **options)

    def _forward_packed(
        self,
        input: PackedSequence,
        states: tuple[Tensor, ...] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        **options: Any,
    ) -> tuple[tuple[PackedSequence, ...], tuple[Tensor, ...]]:
        if lengths is not None or reset is not None:
            raise ValueError("lengths and reset go with padded input; a PackedSequence has its own lengths")
        self.check_input(input.data, input.batch_sizes)
        if not torch.compiler.is_compiling():
            check_batch_sizes(input.batch_sizes.tolist(), input.data.size(0))
        # In the order in which it is packed, longest first.
        ordered = PackedSequence(input.data, input.batch_sizes)
        padded, own_lengths = pad_packed_sequence(ordered, batch_first=self.batch_first)
        if states is None:
            states = self._zeros(padded, len(own_lengths))
        else:
            self._check_sizes(states, len(own_lengths))
            states = _select(states, input.sorted_indices)
        over_time, last = self._run(padded, states, own_lengths.to(padded.device), None, **options)
        datas = (pack_padded_sequence(t, own_lengths, self.batch_first).data for t in over_time)
        orders = (input.batch_sizes, input.sorted_indices, input.unsorted_indices)
        return tuple(PackedSequence(data, *orders) for data in datas), _select(last, input.unsorted_indices)

    def _entries(self) -> int:
        return self.num_layers * (2 if self.bidirectional else 1)

    def _zeros(self, input: Tensor, batch: int) -> tuple[Tensor, ...]:
        entries = self._entries()
        return tuple(
            torch.zeros(entries, batch, size, dtype=input.dtype, device=input.device) for size in self._sizes()
        )

    def _check_dims(self, states: tuple[Tensor, ...], dim: int, kind: str) -> None:
        if any(s.dim() != dim for s in states):
            dims = ", ".join(f"{s.dim()}-D" for s in states)
            names, got = ("hx", f"{dims} tensor") if len(states) == 1 else ("hx and cx", f"({dims}) tensors")
            raise RuntimeError(f"For {kind} input, {names} should also be {dim}-D but got {got}")

    def _check_sizes(self, states: tuple[Tensor, ...], batch: int) -> None:
        for i, (state, size) in enumerate(zip(states, self._sizes(), strict=True)):
            where = "hidden" if len(states) == 1 else f"hidden[{i}]"
            self.check_hidden_size(state, (self._entries(), batch, size), f"Expected {where} size {{}}, got {{}}")


def _select(states: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    return states if order is None else tuple(s.index_select(1, order) for s in states)


class LSTM(_Layers):
    r"""Drop-in for :class:`torch.nn.LSTM`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.lstm_cell`, what happens over time in
    :func:`lect11ext.functional.lstm`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            torch.nn's.
        candidate: ``"tanh"``, or ``"sigmoid"`` for Goodfellow et al.'s eq. 10.41.
        grad_clip: clamps the gradients of h and c element by element at every step.
        layer_norm: whether the gates' sums are normalised (parameters weight_norm_ih_l0, weight_norm_hh_l0, …).
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


class GRU(_Layers):
    r"""Drop-in for :class:`torch.nn.GRU`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.gru_cell`, what happens over time in
    :func:`lect11ext.functional.lstm`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn's.
        grad_clip: clamps the gradient of h element by element at every step.
        reset_after: whether the reset gate acts after the recurrent product, as in torch.nn, or before it; not
            before it with ``layer_norm``.
        layer_norm: whether the gates' sums are normalised (parameters weight_norm_ih_l0, weight_norm_hh_l0, …).
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
            recurrent_dropout=self.recurrent_dropout, truncate=self.truncate, recompute=self.recompute,
        )  # fmt: skip
        return (output,), (h,)

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra(
            grad_clip=(self.grad_clip, None), reset_after=(self.reset_after, True),
            layer_norm=(self.layer_norm, False), zoneout=(self.zoneout, 0.0),
            recurrent_dropout=(self.recurrent_dropout, 0.0), truncate=(self.truncate, 0),
            recompute=(self.recompute, 0),
        )  # fmt: skip
