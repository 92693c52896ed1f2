"""LSTM and GRU, cell steps and layers, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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
    i, f, g, o = (F.linear(input, weight_ih, bias_ih) + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
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
    x_r, x_z, x_n = F.linear(input, weight_ih, bias_ih).chunk(3, -1)
    w_gates, w_n = weight_hh.split([2 * size, size])
    b_gates, b_n = (None, None) if bias_hh is None else bias_hh.split([2 * size, size])
    h_r, h_z = F.linear(h, w_gates, b_gates).chunk(2, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    h_n = r * F.linear(h, w_n, b_n) if reset_after else F.linear(r * h, w_n, b_n)
    n = (x_n + h_n).tanh()
    return _clip_gradient(z * h + (1 - z) * n, grad_clip)


def _keep(mask: Tensor | None, rate: float, before: Tensor, after: Tensor) -> Tensor:
    """Zoneout: what the mask, or a rate everywhere, keeps of the state before the step."""
    if mask is not None:
        return torch.where(mask, before, after)
    return after + rate * (before - after) if rate else after


def _product(h: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, mask: Tensor | None) -> Tensor:
    """The state's part of the sums."""
    u = h if mask is None else h * mask
    if norm is None:
        return F.linear(u, weight, bias)
    v = F.layer_norm(F.linear(u, weight), norm.shape, norm)
    return v if bias is None else v + bias


def lstm_layer(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    weight_hr: Tensor | None = None,
    weight_peephole: Tensor | None = None,
    layer_norm: Tensor | None = None,
    hidden_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    candidate: str = "tanh",
    zoneout_rate_h: float = 0.0,
    zoneout_rate_c: float = 0.0,
    grad_clip: float | None = None,
    truncate: int = 0,
    reverse: bool = False,
    return_cells: bool = False,
) -> tuple[Any, ...]:
    """One LSTM layer in one direction over ``input`` ``[T, B, I]``: h of all steps, the last state, and where asked for
    c of all steps."""
    p_i, p_f, p_o = (0.0, 0.0, 0.0) if weight_peephole is None else weight_peephole

    def step(t: int, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        x = _sums(input[t], weight_ih, bias_ih)
        i, f, g, o = (x + _product(h, weight_hh, bias_hh, layer_norm, hidden_mask)).chunk(4, -1)
        i, f = (i + p_i * c).sigmoid(), (f + p_f * c).sigmoid()
        c_new = f * c + i * (g.tanh() if candidate == "tanh" else g.sigmoid())
        h_new = (o + p_o * c_new).sigmoid() * c_new.tanh()
        if weight_hr is not None:
            h_new = F.linear(h_new, weight_hr)
        h_new = _keep(None if zoneout_h is None else zoneout_h[t], zoneout_rate_h, h, h_new)
        c_new = _keep(None if zoneout_c is None else zoneout_c[t], zoneout_rate_c, c, c_new)
        return _clip_gradient(h_new, grad_clip), _clip_gradient(c_new, grad_clip)

    kept = 2 if return_cells else 1
    (output, *cells), (h, c) = _unroll(step, input, state, lengths, reset, truncate, reverse, kept)
    return output, (h, c), *cells


def gru_layer(
    input: Tensor,
    h: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    layer_norm: Tensor | None = None,
    hidden_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    reset_after: bool = True,
    zoneout_rate_h: float = 0.0,
    grad_clip: float | None = None,
    truncate: int = 0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction over ``input`` ``[T, B, I]``: the outputs of all steps, and the last state."""
    size = h.size(-1)

    def step(t: int, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = states
        x_r, x_z, x_n = _sums(input[t], weight_ih, bias_ih).chunk(3, -1)
        if reset_after:
            h_r, h_z, h_n = _product(h, weight_hh, bias_hh, layer_norm, hidden_mask).chunk(3, -1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + r * h_n).tanh()
        else:
            u = h if hidden_mask is None else h * hidden_mask
            w_gates, w_n = weight_hh.split([2 * size, size])
            b_gates, b_n = (None, None) if bias_hh is None else bias_hh.split([2 * size, size])
            h_r, h_z = F.linear(u, w_gates, b_gates).chunk(2, -1)
            r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
            n = (x_n + F.linear(r * u, w_n, b_n)).tanh()
        h_new = _keep(None if zoneout_h is None else zoneout_h[t], zoneout_rate_h, h, z * h + (1 - z) * n)
        return (_clip_gradient(h_new, grad_clip),)

    (output,), (last,) = _unroll(step, input, (h,), lengths, reset, truncate, reverse)
    return output, last


def _sums(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        return F.linear(x, weight, bias)
    return x if bias is None else x + bias


def _unroll(
    step: Callable[[int, tuple[Tensor, ...]], tuple[Tensor, ...]],
    input: Tensor,
    states: tuple[Tensor, ...],
    lengths: Tensor | None,
    reset: Tensor | None,
    truncate: int,
    reverse: bool,
    kept: int = 1,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """All steps of a cell: the first ``kept`` states after every one, and all states after the last. Rows keep their
    state, and give zero, from their length on; ``reset`` restarts a row."""
    steps, batch = input.shape[:2]
    over_time = [[state] * steps for state in states[:kept]]
    for s in range(steps):
        t = steps - 1 - s if reverse else s
        active = torch.ones(batch, dtype=torch.bool, device=input.device) if lengths is None else lengths > t
        if truncate and s > 0 and s % truncate == 0:  # of rows that take the step: the others' last states are behind
            states = tuple(torch.where(active.unsqueeze(-1), a.detach(), a) for a in states)
        if reset is not None:
            restart = (reset[t] & active).unsqueeze(-1)
            states = tuple(torch.where(restart, torch.zeros_like(s), s) for s in states)
        new = step(t, states)
        mask = active.unsqueeze(-1)
        for outputs, state in zip(over_time, new, strict=False):
            outputs[t] = torch.where(mask, state, torch.zeros_like(state))
        states = tuple(torch.where(mask, a, b) for a, b in zip(new, states, strict=True))
    if steps == 0:
        return tuple(input.new_zeros(0, batch, state.size(-1)) for state in states[:kept]), states
    return tuple(torch.stack(outputs) for outputs in over_time), states
