"""LSTM and GRU, cell steps and layers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped to [−limit, limit]; forward-mode AD passes through it unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-ctx.limit, ctx.limit), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.view_as(tangent)


def _clip_gradient(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else _ClipGradient.apply(x, limit)


def lstm_cell(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    candidate: str = "tanh",
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step; see :func:`lect11ext.functional.lstm_cell`."""
    h, c = state
    i, f, g, o = (linear(input, weight_ih, bias_ih) + linear(h, weight_hh, bias_hh)).chunk(4, -1)
    i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
    g = g.tanh() if candidate == "tanh" else g.sigmoid()
    c_new = f * c + i * g
    h_new = o * c_new.tanh()
    return _clip_gradient(h_new, grad_clip), _clip_gradient(c_new, grad_clip)


def gru_cell(
    input: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    grad_clip: float | None = None,
) -> Tensor:
    """One GRU step; see :func:`lect11ext.functional.gru_cell`."""
    size = h.size(-1)
    x_r, x_z, x_n = linear(input, weight_ih, bias_ih).chunk(3, -1)
    w_gates, w_n = weight_hh.split([2 * size, size])
    b_gates, b_n = (None, None) if bias_hh is None else bias_hh.split([2 * size, size])
    h_r, h_z = linear(h, w_gates, b_gates).chunk(2, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    h_n = r * linear(h, w_n, b_n) if reset_after else linear(r * h, w_n, b_n)
    n = (x_n + h_n).tanh()
    return _clip_gradient(z * h + (1 - z) * n, grad_clip)


def lstm_layer(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    candidate: str = "tanh",
    grad_clip: float | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One LSTM layer in one direction over ``input`` ``[T, B, I]``: the outputs of all steps, and the last state."""

    def step(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        return lstm_cell(x, (states[0], states[1]), *weights, candidate=candidate, grad_clip=grad_clip)

    output, (h, c) = _unroll(step, input, state, lengths, reset, reverse)
    return output, (h, c)


def gru_layer(
    input: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    grad_clip: float | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction over ``input`` ``[T, B, I]``: the outputs of all steps, and the last state."""

    def step(x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (gru_cell(x, states[0], weight_ih, weight_hh, bias_ih, bias_hh, grad_clip=grad_clip),)

    output, (last,) = _unroll(step, input, (h,), lengths, reset, reverse)
    return output, last


def _unroll(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]],
    input: Tensor,
    states: tuple[Tensor, ...],
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All steps of a cell. Rows keep their state, and give zero, from their length on; ``reset`` restarts a row."""
    steps, batch = input.shape[:2]
    outputs: list[Tensor] = [states[0]] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        active = torch.ones(batch, dtype=torch.bool, device=input.device) if lengths is None else lengths > t
        if reset is not None:
            restart = (reset[t] & active).unsqueeze(-1)
            states = tuple(torch.where(restart, torch.zeros_like(s), s) for s in states)
        new = step(input[t], states)
        mask = active.unsqueeze(-1)
        outputs[t] = torch.where(mask, new[0], torch.zeros_like(new[0]))
        states = tuple(torch.where(mask, a, b) for a, b in zip(new, states, strict=True))
    return torch.stack(outputs) if outputs else input.new_zeros(0, batch, states[0].size(-1)), states
