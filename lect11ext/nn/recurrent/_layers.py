"""What the recurrent layers share: parameters beyond torch's, checks, zero states, packed sequences."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..._errors import NUMBER, check_range, check_type
from ...functional.recurrent.checks import check_batch_sizes, check_options, check_rate


class Layers(nn.RNNBase):
    """What the two share: parameters beyond torch's, checks, zero states, packed sequences."""

    layer_norm: bool
    peephole: bool = False

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        # What torch's constructor takes, or refuses without a name.
        for name, size in (("num_layers", num_layers), ("proj_size", proj_size)):
            check_type(name, size, (int,))
            check_range(name, size)
        check_type("bidirectional", bidirectional, (bool,))
        for name, number in (("input_size", input_size), ("hidden_size", hidden_size), ("dropout", dropout)):
            check_range(name, number)
        if not isinstance(dropout, bool):  # which torch names, as it does what is no probability
            check_type("dropout", dropout, NUMBER)
        super().__init__(
            mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip

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
                    self.register_parameter(f"layer_norm_{part}{ending}", scale)
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
            if name.startswith("layer_norm_"):
                nn.init.ones_(parameter)
        for name in getattr(self, "parametrizations", ()):
            if name.startswith("layer_norm_"):
                with suppress(RuntimeError):  # one without a right_inverse cannot be given a value
                    setattr(self, name, torch.ones_like(getattr(self, name)))

    def _layer_norms(self) -> list[tuple[Tensor, Tensor]] | None:
        if not self.layer_norm:
            return None
        parts = ("layer_norm_ih", "layer_norm_hh")
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
