"""The elementwise half of the LSTM step, forward and backward, against float64 PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cell_operands import BF16, DTYPES, F32, F64, SIZES, Draw, far_apart, near
from host_kernels import Kernels, Output
from torch import Tensor

from lect11ext import reference


class Lstm:
    """One step over given pre-activations: the reference's input, whose weight is the identity."""

    def __init__(
        self,
        batch: int,
        hidden: int,
        dtype: torch.dtype,
        *,
        gap: int = 0,
        biases: bool = True,
        sigma: bool = False,
    ) -> None:
        draw = Draw(dtype)
        self.batch, self.hidden, self.dtype, self.sigma = batch, hidden, dtype, sigma
        self.pre, self.c = draw(batch, 4 * hidden), draw.state(batch, hidden, gap)
        self.biases = [draw(4 * hidden, spread=0.5) for _ in range(2)] if biases else [None, None]
        self.grad_h, self.grad_c = draw(batch, hidden), draw(batch, hidden)

    def expected(self, clip: float = math.inf) -> tuple[Tensor, ...]:
        """Leaves pre and c, then h', c' and the gates."""
        pre, c = self.pre.double().requires_grad_(), self.c.double().requires_grad_()
        size, biases = 4 * self.hidden, [None if b is None else b.double() for b in self.biases]
        h = torch.zeros(self.batch, self.hidden, dtype=F64)
        h_out, c_out = reference.lstm_cell(
            pre, (h, c), torch.eye(size, dtype=F64), torch.zeros(size, self.hidden, dtype=F64), *biases,
            candidate="sigmoid" if self.sigma else "tanh", grad_clip=None if clip == math.inf else clip,
        )  # fmt: skip
        i, f, g, o = (pre + sum(b for b in biases if b is not None)).chunk(4, 1)
        gates = torch.cat([i.sigmoid(), f.sigmoid(), g.sigmoid() if self.sigma else g.tanh(), o.sigmoid()], 1)
        return pre, c, h_out, c_out, gates

    def fields(self) -> dict[str, Any]:
        return dict(
            batch=self.batch, hidden=self.hidden, dtype=self.dtype, sigmoid_candidate=self.sigma, c=self.c,
            c_stride=self.c.stride(0),
        )  # fmt: skip

    def check_forward(self, kernels: Kernels, *, keep: bool = True, in_place: bool = False, shift: int = 0) -> None:
        B, H = self.batch, self.hidden
        h_out, c_out = (Output(B, H, dtype=self.dtype, shift=shift) for _ in range(2))
        gates = Output(B, 4 * H, dtype=self.dtype, shift=shift, like=self.pre if in_place else None)
        kernels.lstm_gates_forward(
            **self.fields(), pre=gates if in_place else self.pre, bias_ih=self.biases[0],
            bias_hh=self.biases[1], h_out=h_out, c_out=c_out, gates=gates if keep else None,
        )  # fmt: skip
        _, _, h, c, activated = self.expected()
        near(h_out, h)
        near(c_out, c)
        if keep:
            near(gates, activated)
        else:
            assert gates.checked().isnan().all()

    def check_backward(
        self,
        kernels: Kernels,
        *,
        clip: float = math.inf,
        use: str = "hc",
        ask_c: bool = True,
        shift: int = 0,
    ) -> None:
        B, H = self.batch, self.hidden
        pre, c, h_out, c_out, gates = self.expected(clip)
        grads = {"h": self.grad_h if "h" in use else None, "c": self.grad_c if "c" in use else None}
        zeros = torch.zeros(B, H, dtype=F64)
        wanted = torch.autograd.grad(
            [h_out, c_out], [pre, c], [zeros if g is None else g.double() for g in grads.values()]
        )
        grad_pre = Output(B, 4 * H, dtype=self.dtype, shift=shift)
        grad_c_in = Output(B, H, dtype=self.dtype, shift=shift)
        kernels.lstm_gates_backward(
            **self.fields(), grad_h=grads["h"], grad_c=grads["c"], clip=clip,
            gates=gates.detach().to(self.dtype), c_out=c_out.detach().to(self.dtype), grad_pre=grad_pre,
            grad_c_in=grad_c_in if ask_c else None,
        )  # fmt: skip
        near(grad_pre, wanted[0])
        if ask_c:
            near(grad_c_in, wanted[1])
        else:
            assert grad_c_in.checked().isnan().all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lstm(kernels: Kernels, size: tuple[int, int], dtype: torch.dtype) -> None:
    step = Lstm(*size, dtype)
    step.check_forward(kernels)
    step.check_backward(kernels)


@pytest.mark.parametrize("size", [(3, 5), (64, 40)], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_lstm_options(kernels: Kernels, size: tuple[int, int], dtype: torch.dtype) -> None:
    plain, sigma = Lstm(*size, dtype), Lstm(*size, dtype, sigma=True, biases=False)
    plain.check_forward(kernels, keep=False)
    plain.check_forward(kernels, in_place=True)
    sigma.check_forward(kernels)
    for step in (plain, sigma):
        for use in ("h", "c", ""):
            step.check_backward(kernels, use=use)
        step.check_backward(kernels, clip=0.5)
        step.check_backward(kernels, ask_c=False)


@pytest.mark.parametrize("gap", [1, 3, 8])
@pytest.mark.parametrize("shift", [0, 1])
def test_lstm_strides_and_alignment(kernels: Kernels, gap: int, shift: int) -> None:
    for dtype in (F32, F64, BF16):
        step = Lstm(64, 40, dtype, gap=gap)
        step.check_forward(kernels, shift=shift)
        step.check_backward(kernels, shift=shift)


def test_lstm_more_units_than_the_grid_has_threads(kernels: Kernels) -> None:
    for size in ((301, 67), (301, 256)):
        step = Lstm(*size, F32)
        step.check_forward(kernels)
        step.check_backward(kernels)


def test_nothing_to_do(kernels: Kernels) -> None:
    for batch, hidden in ((0, 4), (4, 0)):
        kernels.lstm_gates_forward(batch=batch, hidden=hidden, dtype=F32)
        kernels.lstm_gates_backward(batch=batch, hidden=hidden, dtype=F32)


def test_saturation_and_nan(kernels: Kernels) -> None:
    """σ and tanh at their ends, a gradient that is NaN under a clip, and a NaN that stays in its own unit."""
    step = Lstm(1, 8, F32, biases=False)
    step.pre[0, ::3] = 200.0
    step.pre[0, 1::3] = -200.0
    step.check_forward(kernels)
    step.check_backward(kernels)
    step.grad_h[0, 3] = math.nan
    grad_pre, grad_c = Output(1, 32, dtype=F32), Output(1, 8, dtype=F32)
    kernels.lstm_gates_backward(
        **step.fields(), grad_h=step.grad_h, clip=0.1, gates=torch.full((1, 32), 0.5), c_out=torch.ones(1, 8),
        grad_pre=grad_pre, grad_c_in=grad_c,
    )  # fmt: skip
    assert grad_pre.checked().isnan().nonzero()[:, 1].tolist() == [3, 11, 19, 27]
    assert grad_c.checked().isnan().nonzero()[:, 1].tolist() == [3]
    step.pre[0, 5] = math.nan  # the input gate of unit 5
    h_out, c_out, gates = (Output(1, n, dtype=F32) for n in (8, 8, 32))
    kernels.lstm_gates_forward(**step.fields(), pre=step.pre, h_out=h_out, c_out=c_out, gates=gates)
    for output in (h_out, c_out, gates):
        assert output.checked().isnan().nonzero()[:, 1].tolist() == [5]


def test_states_beyond_2_to_the_31(kernels: Kernels) -> None:
    step = Lstm(2, 1024, BF16, biases=False)
    step.c = far_apart(step.c)
    h_out, c_out, gates = (Output(2, n * 1024, dtype=BF16) for n in (1, 1, 4))
    kernels.lstm_gates_forward(**step.fields(), pre=step.pre, h_out=h_out, c_out=c_out, gates=gates)
    i, f, g, o = step.pre.double().chunk(4, 1)
    c = f.sigmoid() * step.c.double() + i.sigmoid() * g.tanh()
    near(c_out, c)
    near(h_out, o.sigmoid() * c.tanh())
