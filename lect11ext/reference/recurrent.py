"""LSTM and GRU cell steps in plain PyTorch."""

from __future__ import annotations

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
