"""Fused recurrent layers: all steps of a layer and a direction in one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.overrides import has_torch_function

from ..._errors import OPTIONAL_NUMBER, OPTIONAL_TENSOR, TENSOR, wrong_type
from ..._load import _C


def lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor],
    weights: Sequence[Sequence[Tensor]],
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    candidate: str = "tanh",
    grad_clip: float | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""An LSTM over whole sequences: :func:`lstm_cell` at every step, in every layer and direction.

    On the CPU a layer's forward and backward are one kernel each: one product for the inputs of all steps, then the
    recurrence in one parallel region, with the weights in the caches. What a step computes stands in :func:`lstm_cell`.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[T, I]``; float32, float64, bfloat16 or float16;
            any strides (only the last dimension's other than 1 costs a copy).
        state: ``(h, c)``, each ``[layers · directions, B, H]`` (h: ``[…, P]`` with projections), without ``B`` where
            the input has none.
        weights: for each layer, and in it for each direction, ``(weight_ih, weight_hh)``, then the two biases if there
            are any, then weight_hr if h is projected: the order of ``torch.nn.LSTM.all_weights``, with its shapes.
            Any strides.
        batch_first: whether the batch comes before time; neither order costs a copy.
        bidirectional: whether every layer has a second direction, which runs from the end; outputs are concatenated.
        dropout: applied to the output of every layer but the last, where ``training``.
        lengths: int64 ``[B]``, on the input's device, in any order, 0 to T. Rows end there: the steps beyond are not
            taken, their outputs are zero, the last state is that of the row's own end, and the reverse direction begins
            there. What stands beyond in ``input`` is not used, be it NaN. Values are not checked.
        reset: bool ``[T, B]`` (``[B, T]`` with ``batch_first``): where True, the row's state is set to zero before the
            step, as at an episode's start. In a reverse direction before the step too, in its own order.
        candidate: ``"tanh"`` or ``"sigmoid"``.
        grad_clip: clamps :math:`\partial L/\partial h_t` and :math:`\partial L/\partial c_t` to [−a, a] at every step
            of the recurrence (Mikolov 2012).

    Returns:
        ``(output, (h_n, c_n))``: the last layer's h at every step, ``[T, B, directions · H]`` in the input's order of
        dimensions, and the last states of every layer and direction, shaped as ``state``.

    Gradients: to every tensor, of any order, in ``eval()`` too; forward-mode AD; ``vmap`` (batched weights run once a
    sample). Deterministic: the same bits for any number of threads. Sums are kept in float32 (float64 for float64), of
    the 16-bit types c too within a call. Under autocast the layer runs in autocast's type. With projections, and on
    CUDA, a layer runs step by step from the fused cells.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Hochreiter & Schmidhuber 1997; Gers, Schmidhuber & Cummins 2000 (forget gate); Sak, Senior & Beaufays 2014
    (projections).

    Example::

        >>> import torch, lect11ext
        >>> module = torch.nn.LSTM(5, 4, num_layers=2, bidirectional=True)
        >>> h = c = torch.zeros(4, 3, 4)
        >>> output, (h, c) = lect11ext.functional.lstm(
        ...     torch.randn(7, 3, 5), (h, c), module.all_weights, bidirectional=True, lengths=torch.tensor([7, 0, 2])
        ... )
        >>> output.shape, h.shape
        (torch.Size([7, 3, 8]), torch.Size([4, 3, 4]))
    """
    try:
        h, c = state
    except (TypeError, ValueError):
        raise TypeError(f"state must be (h, c), two tensors, but got {type(state).__name__}") from None

    def layer(x: Tensor, states: tuple[Tensor, ...], weight: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
        h, c = states
        ih, hh, b_ih, b_hh, hr = _named(weight, projected=True)
        masks = (lengths, reset)
        if torch.compiler.is_compiling() or has_torch_function((x, *states, *weight)):
            op = torch.ops.lect11ext.lstm_layer
            rest = (None, None, None, lengths, reset, None, None, candidate, 0.0, 0.0, grad_clip, 0, 0, reverse)
            return op(x, h, c, ih, hh, b_ih, b_hh, hr, *rest, batch_first)[:3]
        try:
            return _C.lstm_layer(
                x, h, c, ih, hh, b_ih, b_hh, hr, lengths, reset, candidate, grad_clip, reverse, batch_first
            )
        except TypeError as error:
            raise wrong_type(
                error, **_tensors(x, ih, hh, b_ih, b_hh, lengths, reset), weight_hr=(hr, OPTIONAL_TENSOR),
                candidate=(candidate, (str,)), grad_clip=(grad_clip, OPTIONAL_NUMBER),
                batch_first=(batch_first, (bool,)),
            ) from None  # fmt: skip

    output, (h_n, c_n) = _stack("lstm", layer, input, (h, c), weights, batch_first, bidirectional, dropout, training)
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    state: Tensor,
    weights: Sequence[Sequence[Tensor]],
    *,
    batch_first: bool = False,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A GRU over whole sequences: :func:`gru_cell` (reset after the product) at every step.

    Args:
        state: h, ``[layers · directions, B, H]``.
        weights: for each layer, and in it for each direction, ``(weight_ih, weight_hh)``, then the two biases if there
            are any: the order of ``torch.nn.GRU.all_weights``, with its shapes.
        input, batch_first, bidirectional, dropout, training, lengths, reset, grad_clip: as in :func:`lstm`.

    Returns:
        ``(output, h_n)``. Gradients, determinism, autocast and errors as in :func:`lstm`.

    Source: Cho et al. 2014, arXiv:1406.1078.

    Example::

        >>> import torch, lect11ext
        >>> module = torch.nn.GRU(5, 4)
        >>> output, h = lect11ext.functional.gru(torch.randn(7, 3, 5), torch.zeros(1, 3, 4), module.all_weights)
        >>> output.shape, h.shape
        (torch.Size([7, 3, 4]), torch.Size([1, 3, 4]))
    """

    def layer(x: Tensor, states: tuple[Tensor, ...], weight: Sequence[Tensor], reverse: bool) -> tuple[Tensor, ...]:
        (h,) = states
        ih, hh, b_ih, b_hh, _ = _named(weight, projected=False)
        if torch.compiler.is_compiling() or has_torch_function((x, *states, *weight)):
            op = torch.ops.lect11ext.gru_layer
            return op(x, h, ih, hh, b_ih, b_hh, lengths, reset, grad_clip, reverse, batch_first)[:2]
        try:
            return _C.gru_layer(x, h, ih, hh, b_ih, b_hh, lengths, reset, grad_clip, reverse, batch_first)
        except TypeError as error:
            raise wrong_type(
                error, **_tensors(x, ih, hh, b_ih, b_hh, lengths, reset), grad_clip=(grad_clip, OPTIONAL_NUMBER),
                batch_first=(batch_first, (bool,)),
            ) from None  # fmt: skip

    output, (h_n,) = _stack("gru", layer, input, (state,), weights, batch_first, bidirectional, dropout, training)
    return output, h_n


def _named(weight: Sequence[Tensor], projected: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Any]:
    """One layer's and direction's weights by name; what is not there is None."""
    match tuple(weight):
        case (ih, hh):
            return ih, hh, None, None, None
        case (ih, hh, hr) if projected:
            return ih, hh, None, None, hr
        case (ih, hh, b_ih, b_hh):
            return ih, hh, b_ih, b_hh, None
        case (ih, hh, b_ih, b_hh, hr) if projected:
            return ih, hh, b_ih, b_hh, hr
    raise ValueError(
        "each item of weights must be (weight_ih, weight_hh), with or without (bias_ih, bias_hh) after them"
        + (" and weight_hr at the end" if projected else "")
        + f", but got {len(weight)} tensors"
    )


def _tensors(
    x: object, ih: object, hh: object, b_ih: object, b_hh: object, lengths: object, reset: object
) -> dict[str, tuple[object, tuple[type, ...]]]:
    return {
        "input": (x, TENSOR), "weight_ih": (ih, TENSOR), "weight_hh": (hh, TENSOR), "bias_ih": (b_ih, OPTIONAL_TENSOR),
        "bias_hh": (b_hh, OPTIONAL_TENSOR), "lengths": (lengths, OPTIONAL_TENSOR), "reset": (reset, OPTIONAL_TENSOR),
    }  # fmt: skip


def _stack(
    function: str,
    layer: Callable[[Tensor, tuple[Tensor, ...], Sequence[Tensor], bool], tuple[Tensor, ...]],
    input: Tensor,
    states: tuple[Tensor, ...],
    weights: Sequence[Sequence[Tensor]],
    batch_first: bool,
    bidirectional: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers over one another, each in one or two directions."""
    for name, tensor in (("input", input), *zip(("h", "c"), states, strict=False)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, but got {type(tensor).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"{function}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    for name, state in zip(("h", "c"), states, strict=False):
        if state.dim() != input.dim():
            raise ValueError(
                f"{function}: Expected {name} to be {input.dim()}D, as input is, got {state.dim()}D instead"
            )
        if state.size(0) != len(weights):
            raise ValueError(
                f"{name} must have as many entries as weights, layers * directions = {len(weights)}, "
                f"but got {state.size(0)}"
            )
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability, from 0 to 1, but got {dropout}")
    if input.dim() == 2:
        batch = 0 if batch_first else 1
        result, unbatched = _stack(
            function, layer, input.unsqueeze(batch), tuple(s.unsqueeze(1) for s in states), weights, batch_first,
            bidirectional, dropout, training,
        )  # fmt: skip
        return result.squeeze(batch), tuple(s.squeeze(1) for s in unbatched)
    directions = 2 if bidirectional else 1
    if len(weights) == 0 or len(weights) % directions != 0:
        raise ValueError(f"weights must have {directions} items a layer, one layer or more, but got {len(weights)}")
    last_states = []
    for first in range(0, len(weights), directions):
        if first > 0 and training and dropout > 0:
            input = drop(input, dropout)
        outputs = []
        for i in range(first, first + directions):
            output, *last = layer(input, tuple(s[i] for s in states), weights[i], i > first)
            outputs.append(output)
            last_states.append(last)
        input = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return input, tuple(torch.stack(s) for s in zip(*last_states, strict=True))
