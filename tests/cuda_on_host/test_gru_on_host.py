"""The elementwise stages of the GRU step, forward and backward, against float64 PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cell_operands import BF16, DTYPES, F32, F64, SIZES, Draw, far_apart, near
from host_kernels import Kernels, Output
from torch import Tensor

from lect11ext import reference

AFTER, RESET, OUTPUT = range(3)


class Gru:
    """The stages of a step over given products; test_gru_step_is_the_reference makes the products too."""

    def __init__(self, batch: int, hidden: int, dtype: torch.dtype, *, gap: int = 0, biases: bool = True) -> None:
        draw = Draw(dtype, seed=1)
        self.batch, self.hidden, self.dtype = batch, hidden, dtype
        self.pre_input, self.pre_hidden = draw(batch, 3 * hidden), draw(batch, 3 * hidden)
        self.h, self.grad_h = draw.state(batch, hidden, gap), draw(batch, hidden)
        self.biases = [draw(3 * hidden, spread=0.5) for _ in range(2)] if biases else [None, None]

    def fields(self, stage: int) -> dict[str, Any]:
        return dict(
            batch=self.batch,
            hidden=self.hidden,
            dtype=self.dtype,
            stage=stage,
            h=self.h,
            h_stride=self.h.stride(0),
        )

    def bias(self, which: int) -> Tensor:
        bias = self.biases[which]
        return torch.zeros(3 * self.hidden, dtype=F64) if bias is None else bias.double()

    def output(
        self, gates: int, dtype: torch.dtype | None = None, shift: int = 0, like: Tensor | None = None
    ) -> Output:
        return Output(self.batch, gates * self.hidden, dtype=dtype or self.dtype, shift=shift, like=like)

    def check_forward(self, kernels: Kernels, *, reset_after: bool, keep: bool = True, shift: int = 0) -> None:
        H, x, w = self.hidden, self.pre_input.double() + self.bias(0), self.pre_hidden.double() + self.bias(1)
        h = self.h.double()
        r, z = (x + w)[:, : 2 * H].sigmoid().chunk(2, 1)
        x_n, w_n = x[:, 2 * H :], w[:, 2 * H :]
        biases = dict(zip(("bias_ih", "bias_hh"), self.biases, strict=True))
        h_out = self.output(1, shift=shift)
        if reset_after:
            n = (x_n + r * w_n).tanh()
            gates = self.output(4, shift=shift)
            kernels.gru_gates_forward(
                **self.fields(AFTER), **biases, pre_input=self.pre_input, pre_hidden=self.pre_hidden,
                h_out=h_out, gates=gates if keep else None,
            )  # fmt: skip
            if keep:
                near(gates, torch.cat([r, z, n, w_n], 1))
            else:
                assert gates.checked().isnan().all()
        else:
            n = (x_n + w_n).tanh()
            gates, reset_h = self.output(3, shift=shift), self.output(1, shift=shift)
            pre_gates, pre_n = (t.contiguous() for t in self.pre_hidden.split([2 * H, H], 1))
            kernels.gru_gates_forward(
                **self.fields(RESET), **biases, pre_input=self.pre_input, pre_hidden=pre_gates,
                reset_h=reset_h, gates=gates,
            )  # fmt: skip
            assert gates.checked()[:, 2 * H :].isnan().all()
            near(reset_h, r * h)
            kernels.gru_gates_forward(
                **self.fields(OUTPUT),
                **biases,
                pre_input=self.pre_input,
                pre_hidden=pre_n,
                h_out=h_out,
                gates=gates,
            )
            near(gates, torch.cat([r, z, n], 1))
        near(h_out, z * h + (1 - z) * n)

    def check_backward(
        self,
        kernels: Kernels,
        *,
        reset_after: bool,
        clip: float = math.inf,
        ask_h: bool = True,
        shift: int = 0,
    ) -> None:
        """By autograd from the pre-activations on."""
        H, P = self.hidden, self.dtype
        x = (self.pre_input.double() + self.bias(0)).requires_grad_()
        w = (self.pre_hidden.double() + self.bias(1)).requires_grad_()
        h = self.h.double().requires_grad_()
        r, z = (x + w)[:, : 2 * H].sigmoid().chunk(2, 1)
        reset_h = r * h
        n = (x[:, 2 * H :] + (r * w[:, 2 * H :] if reset_after else w[:, 2 * H :])).tanh()
        h_out = z * h + (1 - z) * n
        grad_h = self.grad_h.double().clamp(-clip, clip)
        grad_input, grad_h_in = self.output(3, P, shift), self.output(1, P, shift)
        fields = dict(
            grad_h=self.grad_h, clip=clip, grad_pre_input=grad_input,
            grad_h_in=grad_h_in if ask_h else None,
        )  # fmt: skip
        if reset_after:
            d_x, d_w, d_h = torch.autograd.grad(h_out, [x, w, h], grad_h)
            gates = torch.cat([r, z, n, w[:, 2 * H :]], 1).detach().to(self.dtype)
            grad_hidden = self.output(3, P, shift)
            kernels.gru_gates_backward(**self.fields(AFTER), **fields, gates=gates, grad_pre_hidden=grad_hidden)
            near(grad_hidden, d_w)
        else:
            gates = torch.cat([r, z, n], 1).detach().to(self.dtype)
            kernels.gru_gates_backward(**self.fields(RESET), **fields, gates=gates)
            assert grad_input.checked()[:, :H].isnan().all()
            # What the second product's backward would hand over: any gradient of r ⊙ h.
            grad_reset_h = Draw(P, seed=2)(self.batch, H)
            d_x, d_h = torch.autograd.grad([h_out, reset_h], [x, h], [grad_h, grad_reset_h.double()])
            fields.update(grad_h=None, grad_reset_h=grad_reset_h)
            kernels.gru_gates_backward(**self.fields(OUTPUT), **fields, gates=gates)
        near(grad_input, d_x)
        if ask_h:
            near(grad_h_in, d_h)
        else:
            assert grad_h_in.checked().isnan().all()


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru(kernels: Kernels, size: tuple[int, int], dtype: torch.dtype, reset_after: bool) -> None:
    step = Gru(*size, dtype)
    step.check_forward(kernels, reset_after=reset_after)
    step.check_backward(kernels, reset_after=reset_after)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("size", [(3, 5), (64, 40)], ids=str)
def test_gru_options(kernels: Kernels, size: tuple[int, int], reset_after: bool) -> None:
    for dtype in (F32, F64, BF16):
        step = Gru(*size, dtype, biases=False)
        step.check_forward(kernels, reset_after=reset_after, keep=not reset_after)
        step.check_backward(kernels, reset_after=reset_after, clip=0.5)
        step.check_backward(kernels, reset_after=reset_after, ask_h=False)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("gap", [1, 3, 8])
@pytest.mark.parametrize("shift", [0, 1])
def test_gru_strides_and_alignment(kernels: Kernels, gap: int, shift: int, reset_after: bool) -> None:
    for dtype in (F32, F64, BF16):
        step = Gru(64, 40, dtype, gap=gap)
        step.check_forward(kernels, reset_after=reset_after, shift=shift)
        step.check_backward(kernels, reset_after=reset_after, shift=shift)


def test_gru_nan_under_a_clip(kernels: Kernels) -> None:
    step = Gru(1, 8, F32)
    step.grad_h[0, 3] = math.nan
    step.check_backward(kernels, reset_after=True, clip=0.1)
    step.check_backward(kernels, reset_after=False, clip=0.1)


def test_nothing_to_do(kernels: Kernels) -> None:
    for batch, hidden in ((0, 4), (4, 0)):
        for stage in (AFTER, RESET, OUTPUT):
            kernels.gru_gates_forward(batch=batch, hidden=hidden, dtype=F32, stage=stage)
            kernels.gru_gates_backward(batch=batch, hidden=hidden, dtype=F32, stage=stage)


@pytest.mark.parametrize("reset_after", [True, False])
def test_states_beyond_2_to_the_31(kernels: Kernels, reset_after: bool) -> None:
    step = Gru(2, 1024, BF16)
    step.h = far_apart(step.h)
    step.check_forward(kernels, reset_after=reset_after)
    step.check_backward(kernels, reset_after=reset_after)


@pytest.mark.parametrize("reset_after", [True, False])
def test_gru_step_is_the_reference(kernels: Kernels, reset_after: bool) -> None:
    """With the two products made by torch, as the op makes them: h' and the gradients of x Wᵀ and of h."""
    B, size, H, clip = 5, 3, 8, 0.3
    draw = Draw(F64, seed=3)
    x, h, grad_h = draw(B, size), draw(B, H), draw(B, H)
    w_ih, w_hh, b_ih, b_hh = draw(3 * H, size), draw(3 * H, H, spread=0.4), draw(3 * H), draw(3 * H)
    x.requires_grad_(), h.requires_grad_()
    expected = reference.gru_cell(x, h, w_ih, w_hh, b_ih, b_hh, reset_after=reset_after, grad_clip=clip)
    d_x, d_h = torch.autograd.grad(expected, [x, h], grad_h)
    x, h = x.detach(), h.detach()
    step = dict(batch=B, hidden=H, dtype=F64, h=h, h_stride=H)
    biases = dict(bias_ih=b_ih, bias_hh=b_hh, pre_input=x @ w_ih.T)
    h_out, d_input, d_h_in = Output(B, H, dtype=F64), Output(B, 3 * H, dtype=F64), Output(B, H, dtype=F64)
    gradient = dict(step, grad_h=grad_h, clip=clip, grad_pre_input=d_input, grad_h_in=d_h_in)
    if reset_after:
        gates, d_hidden = Output(B, 4 * H, dtype=F64), Output(B, 3 * H, dtype=F64)
        kernels.gru_gates_forward(**step, **biases, stage=AFTER, pre_hidden=h @ w_hh.T, h_out=h_out, gates=gates)
        kernels.gru_gates_backward(**gradient, stage=AFTER, gates=gates, grad_pre_hidden=d_hidden)
        from_hidden = d_h_in.checked() + d_hidden.checked() @ w_hh
    else:
        gates, reset_h = Output(B, 3 * H, dtype=F64), Output(B, H, dtype=F64)
        forward = dict(step, **biases, gates=gates)
        kernels.gru_gates_forward(**forward, stage=RESET, pre_hidden=h @ w_hh[: 2 * H].T, reset_h=reset_h)
        pre_n = reset_h.checked() @ w_hh[2 * H :].T
        kernels.gru_gates_forward(**forward, stage=OUTPUT, pre_hidden=pre_n, h_out=h_out)
        kernels.gru_gates_backward(**gradient, stage=RESET, gates=gates)
        grad_reset_h = d_input.tensor[:, 2 * H :] @ w_hh[2 * H :]
        kernels.gru_gates_backward(**gradient, stage=OUTPUT, gates=gates, grad_reset_h=grad_reset_h)
        from_hidden = d_h_in.checked() + d_input.checked()[:, : 2 * H] @ w_hh[: 2 * H]
    torch.testing.assert_close(h_out.checked(), expected.detach())
    torch.testing.assert_close(d_input.checked() @ w_ih, d_x)
    torch.testing.assert_close(from_hidden, d_h)
