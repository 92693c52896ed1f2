"""Fused recurrent steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._errors import OPTIONAL_NUMBER, OPTIONAL_TENSOR, TENSOR, check_type, wrong_type
from ..._load import _C
from .._dispatch import is_overridden
from .checks import check_clip


def _check_input(function: str, input: Tensor) -> None:
    if input.dim() not in (1, 2):
        raise ValueError(f"{function}: Expected input to be 1D or 2D, got {input.dim()}D instead")


def _check_state(function: str, name: str, state: Tensor, dim: int) -> None:
    check_type(name, state, TENSOR)
    if state.dim() != dim:
        raise ValueError(f"{function}: Expected {name} to be {dim}D, as input is, got {state.dim()}D instead")


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
    r"""One LSTM step: on the CPU products and gates in one kernel, on CUDA cuBLAS and one kernel for the gates.

    .. math::
        i, f, o &= \sigma(\cdot), \quad g = \varphi(\cdot) \quad\text{of}\quad
            x W_{ih}^\top + b_{ih} + h W_{hh}^\top + b_{hh} \\
        c' &= f \odot c + i \odot g, \qquad h' = o \odot \tanh(c')

    with the gates in torch.nn's order i, f, g, o and :math:`\varphi` = tanh, or the logistic sigmoid of Goodfellow,
    Bengio & Courville's eq. 10.41.

    Args:
        input: ``[B, I]``, or ``[I]``; float32, float64, bfloat16 or float16. Rows may be strided (``x[:, t]`` costs no
            copy).
        state: ``(h, c)``, each ``[B, H]``, or ``[H]``.
        weight_ih, weight_hh: ``[4H, I]`` and ``[4H, H]``.
        bias_ih, bias_hh: ``[4H]`` or None.
        candidate: ``"tanh"`` or ``"sigmoid"``.
        grad_clip: clamps the incoming :math:`\partial L/\partial h'` and :math:`\partial L/\partial c'` to
            [−a, a] (Mikolov 2012). Forward-mode AD ignores it; double backward differentiates the clamp.

    Returns:
        ``(h', c')``, in the type of the inputs; sums are kept in float32 (float64 for float64).

    Gradients: to every tensor, of any order; forward-mode AD; ``vmap``. Deterministic, whatever the number of threads.
    Under autocast the step runs in autocast's type, on CPU (where torch.nn's keeps float32) as on CUDA. On CUDA the
    products are cuBLAS's.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

    Source: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate).

    Example::

        >>> import torch, lect11ext
        >>> x, h, c = torch.randn(3, 5), torch.zeros(3, 4), torch.zeros(3, 4)
        >>> h, c = lect11ext.functional.lstm_cell(x, (h, c), torch.randn(16, 5), torch.randn(16, 4))
        >>> h.shape, c.shape
        (torch.Size([3, 4]), torch.Size([3, 4]))
    """
    try:
        h, c = state
    except (TypeError, ValueError):
        raise TypeError(f"state must be (h, c), two tensors, but got {type(state).__name__}") from None
    try:
        dim = input.dim()
        batched = dim == 2 and h.dim() == 2 and c.dim() == 2
    except AttributeError as error:
        raise wrong_type(error, input=(input, TENSOR), h=(h, TENSOR), c=(c, TENSOR)) from None
    if not batched:
        _check_input("lstm_cell", input)
        _check_state("lstm_cell", "h", h, dim)
        _check_state("lstm_cell", "c", c, dim)
        state = (h.unsqueeze(0), c.unsqueeze(0))
        h, c = lstm_cell(
            input.unsqueeze(0), state, weight_ih, weight_hh, bias_ih, bias_hh, candidate=candidate, grad_clip=grad_clip
        )
        return h.squeeze(0), c.squeeze(0)
    if torch.compiler.is_compiling() or is_overridden(input, h, c, weight_ih, weight_hh):
        return torch.ops.lect11ext.lstm_cell(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, candidate, grad_clip)[
            :2
        ]
    if grad_clip is not None:
        check_clip(grad_clip)
    try:
        return _C.lstm_cell(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, candidate, grad_clip)
    except TypeError as error:
        raise wrong_type(
            error, weight_ih=(weight_ih, TENSOR), weight_hh=(weight_hh, TENSOR), bias_ih=(bias_ih, OPTIONAL_TENSOR),
            bias_hh=(bias_hh, OPTIONAL_TENSOR), candidate=(candidate, (str,)), grad_clip=(grad_clip, OPTIONAL_NUMBER),
        ) from None  # fmt: skip


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
    r"""One GRU step: on the CPU products and gates in one kernel (two where the reset gate comes first).

    .. math::
        r, z &= \sigma(x W_i^\top + b_i + h W_h^\top + b_h) \\
        n &= \tanh(x W_{in}^\top + b_{in} + r \odot (h W_{hn}^\top + b_{hn}))
            && \text{reset after: torch.nn, cuDNN} \\
        n &= \tanh(x W_{in}^\top + b_{in} + (r \odot h) W_{hn}^\top + b_{hn})
            && \text{reset before: Cho et al. 2014} \\
        h' &= z \odot h + (1 - z) \odot n

    with the gates in torch.nn's order r, z, n.

    Args:
        input: ``[B, I]``, or ``[I]``; float32, float64, bfloat16 or float16. Rows may be strided.
        h: ``[B, H]``, or ``[H]``.
        weight_ih, weight_hh: ``[3H, I]`` and ``[3H, H]``.
        bias_ih, bias_hh: ``[3H]`` or None.
        reset_after: whether the reset gate acts after the state's product, or before.
        grad_clip: clamps the incoming :math:`\partial L/\partial h'` to [−a, a]; see :func:`lstm_cell`.

    Returns:
        h', in the type of the inputs. Gradients, determinism, autocast and errors as in :func:`lstm_cell`.

    Source: Cho et al. 2014, arXiv:1406.1078 (its first version has the reset gate after the product, its third before).

    Example::

        >>> import torch, lect11ext
        >>> h = torch.zeros(3, 4)
        >>> lect11ext.functional.gru_cell(torch.randn(3, 5), h, torch.randn(12, 5), torch.randn(12, 4)).shape
        torch.Size([3, 4])
    """
    try:
        dim = input.dim()
        batched = dim == 2 and h.dim() == 2
    except AttributeError as error:
        raise wrong_type(error, input=(input, TENSOR), h=(h, TENSOR)) from None
    if not batched:
        _check_input("gru_cell", input)
        _check_state("gru_cell", "h", h, dim)
        return gru_cell(
            input.unsqueeze(0), h.unsqueeze(0), weight_ih, weight_hh, bias_ih, bias_hh,
            reset_after=reset_after, grad_clip=grad_clip,
        ).squeeze(0)  # fmt: skip
    if torch.compiler.is_compiling() or is_overridden(input, h, weight_ih, weight_hh):
        return torch.ops.lect11ext.gru_cell(input, h, weight_ih, weight_hh, bias_ih, bias_hh, reset_after, grad_clip)[0]
    if grad_clip is not None:
        check_clip(grad_clip)
    try:
        return _C.gru_cell(input, h, weight_ih, weight_hh, bias_ih, bias_hh, reset_after, grad_clip)
    except TypeError as error:
        raise wrong_type(
            error, weight_ih=(weight_ih, TENSOR), weight_hh=(weight_hh, TENSOR), bias_ih=(bias_ih, OPTIONAL_TENSOR),
            bias_hh=(bias_hh, OPTIONAL_TENSOR), reset_after=(reset_after, (bool,)),
            grad_clip=(grad_clip, OPTIONAL_NUMBER),
        ) from None  # fmt: skip
