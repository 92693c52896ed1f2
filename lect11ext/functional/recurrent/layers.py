"""Fused recurrent layers: all steps of a layer and a direction in one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop

from ..._errors import OPTIONAL_NUMBER, OPTIONAL_TENSOR, TENSOR, wrong_type
from ..._load import _C
from .._dispatch import is_overridden
from .checks import (
    check_options,
    check_rate,
    listed_norms,
    listed_peepholes,
    named_weights,
    zoneout_rates,
)
from .masks import bernoulli, dropout_mask, normed_sums, without_padding
from .overlap import fits_twice, from_here, is_wanted, side_by_side

Layer = Callable[[Tensor, tuple[Tensor, ...], int, bool], tuple[Any, ...]]


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
    layer_norms: Sequence[tuple[Tensor, Tensor]] | None = None,
    peepholes: Sequence[Tensor] | None = None,
    zoneout: tuple[float, float] = (0.0, 0.0),
    recurrent_dropout: float = 0.0,
    truncate: int = 0,
    recompute: int = 0,
    return_cells: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[Any, ...]:
    r"""An LSTM over whole sequences: :func:`lstm_cell` at every step, in every layer and direction.

    A layer's forward and backward are one op each. On the CPU its recurrence is one parallel region, with the weights
    in the caches; on CUDA one kernel. What a step computes stands in :func:`lstm_cell`.

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
            of the recurrence (Mikolov 2012). A double backward differentiates the clamp, and
            clamps second-order gradients where they pass it in turn.
        layer_norms: for each item of weights ``(scale_ih, scale_hh)``, each ``[4H]``: the input's and the state's part
            of the sums are normalised on their own, over all gates' units, and scaled; ε is 1e-5, the biases come after
            (Ba, Kiros & Hinton 2016, without a norm of the cell). Where sums or their squares overflow, a norm gives
            zeros or NaN, from finite input too.
        peepholes: for each item of weights ``[3, H]``: i and f see :math:`p_i c_{t-1}` and :math:`p_f c_{t-1}`, o
            sees :math:`p_o c_t` (Gers & Schmidhuber 2000).
        zoneout: probabilities (of h, of c) with which a unit keeps its value at a step; with ``training`` drawn at
            every step, else the expectation (Krueger et al. 2017).
        recurrent_dropout: probability with which, where ``training``, a unit of h is not seen by the recurrent product,
            the same units at all steps; the rest is scaled by 1 / (1 − p) (Gal & Ghahramani 2016).
        truncate: gradients of the states do not pass from steps k, 2k, … to those before them; 0: they pass.
        recompute: keeps c only every k steps, and no gates, and computes the rest again in the backward, k steps at a
            time: the same gradients, to rounding, in O(T / k + k) memory beyond the output's. 0: all is kept. Without
            effect with projections. Of second order ``grad_clip`` clamps what reaches a state by its output and by the
            steps made again apart, and not their sum.
        return_cells: whether c is given at every step too, not only h: :math:`c_t = f_t c_{t-1} + i_t g_t`, after
            zoneout where there is any. The last layer keeps all for its backward then, whatever ``recompute`` says.
        generator: where all masks are drawn from, dropout's too (:func:`philox_key`); torch's default generator if
            None, and dropout's masks are then torch.nn's.

    Returns:
        ``(output, (h_n, c_n))``: the last layer's h at every step, ``[T, B, directions · H]`` (``P`` for ``H`` with
        projections) in the input's order of dimensions, and the last states of every layer and direction, shaped as
        ``state``. With ``return_cells`` ``(output, (h_n, c_n), cells)``: the last layer's c at every step, laid out as
        output, ``[T, B, directions · H]`` with projections too, and zero beyond a row's length, as output is.

    Gradients: through every output to every tensor, of any order, in ``eval()`` too; forward-mode AD; ``vmap`` (batched
    weights run once a sample). Deterministic: the same bits in every run, and for any number of threads but where
    torch's own products and norms serve (a layer norm of the inputs, projections). Sums are kept in float32 (float64
    for float64), of the 16-bit types c too within a call, but for projections, whose states are rounded at every step
    as torch.nn's are. Under autocast the layer runs in autocast's type. With projections a layer runs step by step from
    the fused cells; a compiled or exported graph of its derivatives then holds for one number of steps, and any batch.
    On CUDA float32 is multiplied as TF32 where ``torch.backends.cudnn.rnn.fp32_precision`` says so, as torch.nn's
    layers are.

    Raises:
        TypeError, ValueError, RuntimeError (of devices): naming the argument, what was expected and what came.

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
        >>> output, (h, c), cells = lect11ext.functional.lstm(
        ...     torch.randn(7, 3, 5), (h, c), module.all_weights, bidirectional=True, return_cells=True
        ... )
        >>> cells.shape, torch.equal(cells[-1, :, :4], c[-2])  # the forward direction's last
        (torch.Size([7, 3, 8]), True)
    """
    try:
        h, c = state
    except (TypeError, ValueError):
        raise TypeError(f"state must be (h, c), two tensors, but got {type(state).__name__}") from None

    rate_h, rate_c = zoneout_rates(zoneout)
    dropout = check_rate("dropout", dropout)
    recurrent_dropout = check_rate("recurrent_dropout", recurrent_dropout)
    check_options(
        grad_clip, truncate, recompute, generator, batch_first=batch_first, bidirectional=bidirectional,
        training=training, return_cells=return_cells,
    )  # fmt: skip
    items = named_weights(weights, projected=True)
    norms = None if layer_norms is None else listed_norms(layer_norms, items)
    peeps = None if peepholes is None else listed_peepholes(peepholes, items)
    if bidirectional and is_wanted(input):
        items, norms, peeps = from_here((items, norms, peeps))

    def layer(
        x: Tensor, weight: Tensor | None, norm: Tensor | None, states: tuple[Tensor, ...], item: int, reverse: bool
    ) -> tuple[Any, ...]:
        h, c = states
        ih, hh, b_ih, b_hh, hr = items[item]
        keep_h = _keep(x, h.size(-1), rate_h, training, generator)
        keep_c = _keep(x, c.size(-1), rate_c, training, generator)
        mask = dropout_mask(h, recurrent_dropout, generator) if training and recurrent_dropout > 0 else None
        peephole = None if peeps is None else peeps[item]
        keeps_cells = return_cells and item >= len(items) - (2 if bidirectional else 1)
        rates = (0.0 if keep_h is not None else rate_h, 0.0 if keep_c is not None else rate_c)
        args = (x, h, c, weight, hh, b_ih, b_hh, hr, peephole, norm, mask, lengths, reset, keep_h, keep_c, candidate,
                *rates, grad_clip, truncate, 0 if keeps_cells else recompute, reverse, batch_first,
                keeps_cells)  # fmt: skip
        if torch.compiler.is_compiling() or is_overridden(x, *states, *items[item]):
            output, h, c, _, cells = torch.ops.lect11ext.lstm_layer(*args)[:5]
        else:
            try:
                output, h, c, cells = _C.lstm_layer(*args)
            except TypeError as error:
                raise wrong_type(
                    error, **_tensors(x, ih, hh, b_ih, b_hh, lengths, reset), weight_hr=(hr, OPTIONAL_TENSOR),
                    candidate=(candidate, (str,)), grad_clip=(grad_clip, OPTIONAL_NUMBER), truncate=(truncate, (int,)),
                    recompute=(recompute, (int,)),
                ) from None  # fmt: skip
        return (output, cells, h, c) if keeps_cells else (output, h, c)

    run = _normed(layer, items, norms, lengths, batch_first, bidirectional)
    (output, *cells), (h_n, c_n) = _stack(
        "lstm", run, input, (h, c), len(items), batch_first, bidirectional, dropout if training else 0.0, generator,
        given=(lengths, reset, *chain.from_iterable((*items, *(norms or ()))), *(peeps or ())),
    )  # fmt: skip
    return output, (h_n, c_n), *cells


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
    reset_after: bool = True,
    layer_norms: Sequence[tuple[Tensor, Tensor]] | None = None,
    zoneout: float = 0.0,
    recurrent_dropout: float = 0.0,
    truncate: int = 0,
    recompute: int = 0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A GRU over whole sequences: :func:`gru_cell` (reset after the product) at every step.

    Args:
        state: h, ``[layers · directions, B, H]``.
        weights: for each layer, and in it for each direction, ``(weight_ih, weight_hh)``, then the two biases if there
            are any: the order of ``torch.nn.GRU.all_weights``, with its shapes.
        reset_after: whether the reset gate acts after the recurrent product, as in torch.nn, or before it, as in Cho et
            al.; without ``layer_norms`` where False.
        layer_norms: for each item of weights ``(scale_ih, scale_hh)``, each ``[3H]``; zoneout: a single probability.
        input, batch_first, bidirectional, dropout, training, lengths, reset, grad_clip, recurrent_dropout, truncate,
            recompute, generator: as in :func:`lstm`.

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

    zoneout = check_rate("zoneout", zoneout)
    dropout = check_rate("dropout", dropout)
    recurrent_dropout = check_rate("recurrent_dropout", recurrent_dropout)
    check_options(
        grad_clip, truncate, recompute, generator, batch_first=batch_first, bidirectional=bidirectional,
        training=training, reset_after=reset_after,
    )  # fmt: skip
    if layer_norms is not None and not reset_after:
        raise ValueError("layer_norms must be None where reset_after is False: the norm is over the sums of all gates")
    items = named_weights(weights, projected=False)
    norms = None if layer_norms is None else listed_norms(layer_norms, items)
    if bidirectional and is_wanted(input):
        items, norms = from_here((items, norms))

    def layer(
        x: Tensor, weight: Tensor | None, norm: Tensor | None, states: tuple[Tensor, ...], item: int, reverse: bool
    ) -> tuple[Tensor, ...]:
        (h,) = states
        ih, hh, b_ih, b_hh, _ = items[item]
        keep = _keep(x, h.size(-1), zoneout, training, generator)
        mask = dropout_mask(h, recurrent_dropout, generator) if training and recurrent_dropout > 0 else None
        args = (x, h, weight, hh, b_ih, b_hh, norm, mask, lengths, reset, keep, reset_after,
                0.0 if keep is not None else zoneout, grad_clip, truncate, recompute, reverse,
                batch_first)  # fmt: skip
        if torch.compiler.is_compiling() or is_overridden(x, *states, *items[item]):
            return torch.ops.lect11ext.gru_layer(*args)[:2]
        try:
            return _C.gru_layer(*args)
        except TypeError as error:
            raise wrong_type(
                error, **_tensors(x, ih, hh, b_ih, b_hh, lengths, reset), grad_clip=(grad_clip, OPTIONAL_NUMBER),
                truncate=(truncate, (int,)), recompute=(recompute, (int,)),
            ) from None  # fmt: skip

    run = _normed(layer, items, norms, lengths, batch_first, bidirectional)
    (output,), (h_n,) = _stack(
        "gru", run, input, (state,), len(items), batch_first, bidirectional, dropout if training else 0.0, generator,
        given=(lengths, reset, *chain.from_iterable((*items, *(norms or ())))),
    )  # fmt: skip
    return output, h_n


def _normed(
    layer: Callable[[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...], int, bool], tuple[Any, ...]],
    items: Sequence[Sequence[Any]],
    norms: Sequence[tuple[Tensor, Tensor]] | None,
    lengths: Tensor | None,
    batch_first: bool,
    bidirectional: bool,
) -> Layer:
    """The layer with weight_ih and the state's scale as the ops take them: under a norm the input is multiplied and
    normalised beforehand."""

    def run(x: Tensor, states: tuple[Tensor, ...], item: int, reverse: bool) -> tuple[Any, ...]:
        weight = items[item][0]
        if norms is None:
            return layer(x, weight, None, states, item, reverse)
        scale_ih, scale_hh = norms[item]
        try:
            # Layers above the first see outputs, which are zero beyond the lengths.
            first = item < (2 if bidirectional else 1)
            seen = x if lengths is None or not first else without_padding(x, lengths, batch_first)
            return layer(normed_sums(seen, weight, scale_ih), None, scale_hh, states, item, reverse)
        except (TypeError, ValueError, RuntimeError, IndexError, OverflowError):
            layer(x, weight, None, states, item, reverse)  # names what does not fit: all of it is given here
            raise

    return run


def _keep(x: Tensor, units: int, rate: float, training: bool, generator: torch.Generator | None) -> Tensor | None:
    """Zoneout's mask over time, where one is drawn."""
    return bernoulli(x, (*x.shape[:2], units), rate, generator) if training and rate > 0 else None


def _tensors(
    x: object, ih: object, hh: object, b_ih: object, b_hh: object, lengths: object, reset: object
) -> dict[str, tuple[object, tuple[type, ...]]]:
    return {
        "input": (x, TENSOR), "weight_ih": (ih, TENSOR), "weight_hh": (hh, TENSOR), "bias_ih": (b_ih, OPTIONAL_TENSOR),
        "bias_hh": (b_hh, OPTIONAL_TENSOR), "lengths": (lengths, OPTIONAL_TENSOR), "reset": (reset, OPTIONAL_TENSOR),
    }  # fmt: skip


def _dropped(x: Tensor, p: float, batch_first: bool, generator: torch.Generator | None) -> Tensor:
    """Without a generator as torch.nn drops between layers, whose masks are drawn with time first."""
    if generator is not None:
        return x * dropout_mask(x, p, generator)
    if not batch_first or x.dim() < 3:
        return drop(x, p)
    mask = drop(torch.ones_like(x.transpose(0, 1), memory_format=torch.contiguous_format), p)
    return x * mask.transpose(0, 1)


def _stack(
    function: str,
    layer: Layer,
    input: Tensor,
    states: tuple[Tensor, ...],
    items: int,
    batch_first: bool,
    bidirectional: bool,
    dropout: float,
    generator: torch.Generator | None,
    given: Sequence[Any],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Layers over one another, each in one or two directions.

    ``layer`` gives its output, whatever else it has over time, and its last states. Given back: what the last layer has
    over time, and the last states of all. ``given``: what ``layer`` reads besides.
    """
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
        if state.size(0) != items:
            raise ValueError(
                f"{name} must have as many entries as weights, layers * directions = {items}, but got {state.size(0)}"
            )
        if input.dim() == 3 and state.size(1) != (rows := input.size(0 if batch_first else 1)):
            raise ValueError(
                f"{name} must have shape [{items}, {rows}, {state.size(2)}] (layers * directions, batch, size), "
                f"but got {list(state.shape)}"
            )
    if input.dim() == 2:
        batch = 0 if batch_first else 1
        result, unbatched = _stack(
            function, layer, input.unsqueeze(batch), tuple(s.unsqueeze(1) for s in states), items, batch_first,
            bidirectional, dropout, generator, given,
        )  # fmt: skip
        return tuple(r.squeeze(batch) for r in result), tuple(s.squeeze(1) for s in unbatched)
    directions = 2 if bidirectional else 1
    if items == 0 or items % directions != 0:
        raise ValueError(f"weights must have {directions} items a layer, one layer or more, but got {items}")
    last_states: list[tuple[Tensor, ...]] = []
    reads = [t for t in (*states, *given) if isinstance(t, Tensor)]
    size = (states[-1].size(-1), states[-1].size(1))
    together = directions > 1 and is_wanted(input) and fits_twice(input, *size)
    if together:
        input, states = from_here((input, states))
    for first in range(0, items, directions):
        if first > 0 and dropout > 0:
            input = _dropped(input, dropout, batch_first, generator)
        calls = [
            partial(layer, input, tuple(s[i] for s in states), i, i > first) for i in range(first, first + directions)
        ]
        results = side_by_side((input, *reads), calls) if together else [call() for call in calls]
        parts = zip(*(r[: -len(states)] for r in results), strict=True)
        over_time = tuple(p[0] if directions == 1 else torch.cat(p, -1) for p in parts)
        last_states += [r[-len(states) :] for r in results]
        input = over_time[0]
    return over_time, tuple(torch.stack(s) for s in zip(*last_states, strict=True))
