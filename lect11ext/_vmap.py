"""Batching rules of all ops, for torch.vmap and everything built on it.

They stand in Python because a C++ rule needs a header that torch does not ship. Where it can, an op folds the new
dimension into one that it has: a cell or a layer whose weights are shared into its batch. What cannot runs once a
sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., tuple[Any, Any]]


def _is_batched(dim: Any) -> bool:
    return isinstance(dim, int)


def _run_each(op: Callable[..., Any], size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """Calls ``op`` once a sample and stacks what comes back; None stays None."""
    if size == 0:  # a sample of zeros gives the shapes, and is dropped
        zeros = [
            a.new_zeros(a.movedim(d, 0).shape[1:]) if _is_batched(d) else a for a, d in zip(args, in_dims, strict=True)
        ]
        return _stack_all([op(*zeros)], 0)
    return _stack_all([op(*_sample(args, in_dims, i)) for i in range(size)], size)


def _sample(args: Sequence[Any], in_dims: Sequence[Any], i: int) -> list[Any]:
    return [a.select(d, i) if _is_batched(d) else a for a, d in zip(args, in_dims, strict=True)]


def _stack_all(calls: Sequence[Any], size: int) -> tuple[Any, Any]:
    """The first ``size`` calls' outputs, one or several, stacked."""
    if isinstance(calls[0], Tensor):
        return torch.stack(list(calls))[:size], 0
    outputs = [None if parts[0] is None else torch.stack(parts)[:size] for parts in zip(*calls, strict=True)]
    return tuple(outputs), tuple(None if out is None else 0 for out in outputs)


def _each(op: Callable[..., Any]) -> Rule:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        return _run_each(op, info.batch_size, in_dims, args)

    return rule


def _repeat(x: Tensor, dim: Any, size: int) -> Tensor:
    """The new dimension in front; what is not batched is repeated."""
    return x.movedim(dim, 0) if _is_batched(dim) else x.expand(size, *x.shape)


def _fold(x: Tensor | None, dim: Any, size: int) -> Tensor | None:
    """``[V, B, *] → [V·B, *]``; what is not batched is repeated."""
    if x is None:
        return None
    x = _repeat(x, dim, size)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _cell(op: Callable[..., Any], rows: Sequence[int], shared: Sequence[int]) -> Rule:
    """A rule for a cell's forward: arguments ``rows`` have the batch, arguments ``shared`` are weights and biases."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if size == 0 or any(_is_batched(in_dims[i]) for i in shared):
            return _run_each(op, size, in_dims, args)
        folded = list(args)
        for i in rows:
            folded[i] = _fold(args[i], in_dims[i], size)
        outputs = [None if out is None else out.unflatten(0, (size, out.size(0) // size)) for out in op(*folded)]
        return tuple(outputs), tuple(None if out is None else 0 for out in outputs)

    return rule


def _cell_backward(op: Callable[..., Any], rows: Sequence[int], shared: Sequence[int], weight_outputs: int) -> Rule:
    """The same for a backward, which can fold only where no gradient of a weight is asked for: those are per sample."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        mask = args[-1]
        if any(_is_batched(in_dims[i]) for i in shared) or any(mask[-weight_outputs:]):
            return _run_each(op, info.batch_size, in_dims, args)
        return _cell(op, rows, shared)(info, in_dims, *args)

    return rule


def _layer(op: Callable[..., Any], arguments: Sequence[Any], backward: bool) -> Rule:
    """A rule for a layer's forward or backward with its schema's arguments: what has a batch is known by name."""
    names = [a.name.replace("output_mask", "mask") for a in arguments]
    over_time = {
        "input",
        "factors",
        "reset",
        "zoneout_h",
        "zoneout_c",
        "grad_output",
        "grad_gates",
        "grad_cells",
        "output",
        "gates",
    }
    over_time |= {"cells", "normed", "rstd"}
    states = {"h", "c", "hidden_mask", "lengths", "grad_h", "grad_c"}
    weights = [i for i, name in enumerate(names) if name.startswith(("weight", "bias", "layer_norm"))]
    # Outputs in order: whether each is over time. A backward's are the gradients of the input, of the states, of the
    # weights, and at last of the hidden mask.
    forward_outputs = (True, False, False, *[True] * 4) if "c" in names else (True, False, *[True] * 3)
    backward_outputs = (True, False, False) if "c" in names else (True, False)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        # The dispatcher leaves out what equals its default at the end.
        args = (*args, *(a.default_value for a in arguments[len(args) :]))
        in_dims = (*in_dims, *[None] * (len(args) - len(in_dims)))
        mask = args[names.index("mask")][len(backward_outputs) : -1] if backward else ()
        size = info.batch_size
        # With recompute the cells that are kept lie otherwise.
        recomputes = "recompute" in names and args[names.index("recompute")] > 0
        if size == 0 or recomputes or any(_is_batched(in_dims[i]) for i in weights) or any(mask):
            return _run_each(op, size, in_dims, args)
        batch = 0 if "batch_first" in names and args[names.index("batch_first")] else 1
        folded = list(args)
        for i, name in enumerate(names):
            if name in states:
                folded[i] = _fold(args[i], in_dims[i], size)
            elif name in over_time and args[i] is not None:
                x = args[i].movedim(in_dims[i], batch) if _is_batched(in_dims[i]) else args[i].unsqueeze(batch)
                shape = list(x.shape)
                shape[batch] = size
                folded[i] = x.expand(shape).flatten(batch, batch + 1)
        outputs, dims = [], []
        kinds = backward_outputs if backward else forward_outputs
        for i, out in enumerate(op(*folded)):
            at = batch if i < len(kinds) and kinds[i] else 0
            outputs.append(None if out is None else out.unflatten(at, (size, out.size(at) // size)))
            dims.append(None if out is None else at)
        return tuple(outputs), tuple(dims)

    return rule


def _attention(op: Callable[..., Any], arguments: Sequence[Any]) -> Rule:
    """A rule for attention or one of its derivatives: the new dimension becomes part of the batch."""
    names = [a.name for a in arguments]
    # Drawn elements are numbered by the batch, packed sequences lie in one: samples go one by one there.
    single = [names.index(n) for n in ("dropout_key", "cu_seqlens_q") if n in names]
    masks = {"attn_mask", "attn_mask_t"}
    tensors = {i for i, a in enumerate(arguments) if "Tensor" in str(a.type)}

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if size == 0 or any(args[i] is not None for i in single):
            return _run_each(op, size, in_dims, args)
        rows = _sample(args, in_dims, 0)[names.index("query")].size(0)
        wants_mask = "output_mask" in names and args[names.index("output_mask")][3]
        # A mask and its tangent stay alike: one for all stays one only if both are, and no sample's gradient is wanted.
        keeps_masks = not wants_mask and not any(_is_batched(in_dims[i]) for i, n in enumerate(names) if n in masks)
        folded = list(args)
        for i, name in enumerate(names):
            x = args[i]
            if i not in tensors or x is None:
                continue
            if name in masks:
                if keeps_masks and x.size(0) == 1:
                    continue
                x = _repeat(x, in_dims[i], size)
                folded[i] = x.expand(size, rows, *x.shape[2:]).flatten(0, 1)
            elif name == "alibi_slopes":
                x = _repeat(x, in_dims[i], size)
                x = x if x.dim() == 3 else x.unsqueeze(1)
                folded[i] = x.expand(size, rows, x.size(2)).flatten(0, 1)
            else:
                folded[i] = _fold(x, in_dims[i], size)
        result = op(*folded)
        if isinstance(result, Tensor):
            return result.unflatten(0, (size, rows)), 0
        outputs = [None if out is None else out.unflatten(0, (size, rows)) for out in result]
        if wants_mask and outputs[3] is not None and rows != 1:
            is_shared = _sample(args, in_dims, 0)[names.index("attn_mask")].size(0) == 1
            outputs[3] = outputs[3].sum(1, keepdim=True) if is_shared else outputs[3]
        return tuple(outputs), tuple(None if out is None else 0 for out in outputs)

    return rule


def _lead(x: Tensor | None, dim: Any, size: int, rank: int, every: bool) -> Tensor | None:
    """The new dimension in front of ``rank`` others. What has no batch stays as it is, or is repeated if ``every``."""
    if x is None or not (_is_batched(dim) or every):
        return x
    x = _repeat(x, dim, size)
    return x.reshape(size, *[1] * (rank + 1 - x.dim()), *x.shape[1:])


# additive_attention(query, key, value, score_weight, attn_mask, save_weights): batches broadcast as they are, so that
# the new dimension goes in front of them.
def _additive(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    op, size = torch.ops.lect11ext.additive_attention, info.batch_size
    if size == 0 or _is_batched(in_dims[3]):
        return _run_each(op, size, in_dims, args)
    shaped = (0, 1, 2, 4)
    ranks = [args[i].dim() - _is_batched(in_dims[i]) for i in shaped if args[i] is not None]
    led = [_lead(args[i], in_dims[i], size, max(ranks), False) if i in shaped else args[i] for i in range(len(args))]
    # A batched mask alone would not make the batch larger.
    led[0] = _lead(args[0], in_dims[0], size, max(ranks), True)
    output, weights = op(*led)
    return (output, weights), (0, None if weights is None else 0)


# additive_attention_backward(grad_output, query, key, value, score_weight, attn_mask, weights, mask)
def _additive_backward(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    op, size = torch.ops.lect11ext.additive_attention_backward, info.batch_size
    if size == 0 or _is_batched(in_dims[4]) or args[7][3]:  # a weight's gradient is one for each sample
        return _run_each(op, size, in_dims, args)
    shaped = (0, 1, 2, 3, 5, 6)
    ranks = [args[i].dim() - _is_batched(in_dims[i]) for i in shaped if args[i] is not None]
    led = [_lead(args[i], in_dims[i], size, max(ranks), True) if i in shaped else args[i] for i in range(len(args))]
    grads = [None if grad is None else grad.reshape(size, *_shape_of(args[i], in_dims[i]))
             for i, grad in zip((1, 2, 3, 4, 5), op(*led), strict=True)]  # fmt: skip
    return tuple(grads), tuple(None if grad is None else 0 for grad in grads)


def _is_scalar(x: Tensor, dim: Any) -> bool:
    """Whether a sample is one. Ops that go along rows refuse it, and would take the new dimension for its row."""
    return x.dim() == _is_batched(dim)


def _shape_of(x: Tensor, dim: Any) -> torch.Size:
    return x.movedim(dim, 0).shape[1:] if _is_batched(dim) else x.shape


# penalized_activation(input, scale, activation, penalty): rows are of any number of dimensions.
def _penalized(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    op, size = torch.ops.lect11ext.penalized_activation, info.batch_size
    if size == 0 or _is_batched(in_dims[1]) or args[3] == "mean" or _is_scalar(args[0], in_dims[0]):
        return _run_each(op, size, in_dims, args)
    return op(args[0].movedim(in_dims[0], 0), *args[1:]), (0, 0)


# penalized_activation_backward(grad_output, grad_penalty, input, scale, activation, penalty, mask)
def _penalized_backward(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    op, size = torch.ops.lect11ext.penalized_activation_backward, info.batch_size
    if size == 0 or _is_batched(in_dims[3]) or args[5] == "mean" or args[6][1]:  # a scale's gradient is one a sample
        return _run_each(op, size, in_dims, args)
    whole = [x if x is None else _repeat(x, dim, size) for x, dim in zip(args[:3], in_dims[:3], strict=True)]
    return op(*whole, *args[3:]), (0, None)


# reconstruction_loss(input, target, logvar, weight, likelihood, reduction), its backward with the gradient in front.
def _reconstruction(op: Callable[..., Any], backward: bool) -> Rule:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        size, first = info.batch_size, int(backward)
        keeps_rows = args[first + 5] in ("none", "sum_features")
        shared = [i for i in (first + 2, first + 3) if args[i] is not None and not _is_batched(in_dims[i])]
        is_scalar = _is_scalar(args[first], in_dims[first])
        # What is one for all samples has a gradient for each.
        if size == 0 or is_scalar or not keeps_rows or (backward and any(args[-1][i - first] for i in shared)):
            return _run_each(op, size, in_dims, args)
        led = list(args)
        for i in range(first + 2):
            led[i] = _repeat(args[i], in_dims[i], size)
        for i in (first + 2, first + 3):
            led[i] = _lead(args[i], in_dims[i], size, led[first].dim() - 1, False)
        if not backward:
            return op(*led), 0
        grads = [None if g is None else g if i < 3 else g.reshape(size, *_shape_of(args[i], in_dims[i]))
                 for i, g in enumerate(op(*led), 1)]  # fmt: skip
        return tuple(grads), tuple(None if g is None else 0 for g in grads)

    return rule


# binarize, pack_bits, unpack_bits: elements, or rows of any number of dimensions.
def _rows(op: Callable[..., Any]) -> Rule:
    def rule(info: Any, in_dims: Sequence[Any], rows: Tensor, *args: Any) -> tuple[Any, Any]:
        if _is_scalar(rows, in_dims[0]):
            return _run_each(op, info.batch_size, in_dims, (rows, *args))
        return op(rows.movedim(in_dims[0], 0), *args), 0

    return rule


# hamming_distance(a, b): batches broadcast as they are, so that the new dimension goes in front of them.
def _hamming_distance(info: Any, in_dims: Sequence[Any], *codes: Tensor) -> tuple[Any, Any]:
    rank = max(x.dim() - _is_batched(d) for x, d in zip(codes, in_dims, strict=True))
    led = [_lead(x, d, info.batch_size, rank, False) for x, d in zip(codes, in_dims, strict=True)]
    return torch.ops.lect11ext.hamming_distance(*led), 0


def _code(op: Callable[..., Any], rows: Sequence[int]) -> Rule:
    """A rule for an op on sparse codes: arguments ``rows`` take any number of dimensions, others are shared by all."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        is_scalar = any(_is_scalar(args[i], in_dims[i]) for i in rows)
        if is_scalar or any(_is_batched(d) and i not in rows for i, d in enumerate(in_dims)):
            return _run_each(op, info.batch_size, in_dims, args)
        whole = [_repeat(a, in_dims[i], info.batch_size) if i in rows else a for i, a in enumerate(args)]
        result = op(*whole)
        return result, 0 if isinstance(result, Tensor) else (0,) * len(result)

    return rule


def _philox_key(info: Any, in_dims: Sequence[Any], like: Tensor, numel: int, generator: Any = None) -> tuple[Any, Any]:
    """One key for all samples with randomness="same"; with "different" offsets ceil(numel / 4) apart."""
    op = torch.ops.lect11ext.philox_key
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
            "randomness flags on vmap or perform the randomness operation out of vmap"
        )
    if info.randomness == "same":
        return op(like, numel, generator), None
    blocks = (numel + 3) // 4
    key = op(like, 4 * blocks * info.batch_size, generator)
    step = torch.arange(info.batch_size, dtype=torch.int64, device=key.device) * blocks
    return key + torch.stack([torch.zeros_like(step), step], 1), 0


def register() -> None:
    """Registers every rule; called once, when the package is imported."""
    ops = torch.ops.lect11ext
    for op in (ops.philox_normal, ops.clip_gradient, ops.gaussian_rsample_kl, ops.gaussian_rsample_kl_backward):
        torch.library.register_vmap(op.default, _each(op))
    for op in (ops.corrupt, ops.corrupt_backward):
        torch.library.register_vmap(op.default, _each(op))
    torch.library.register_vmap(ops.philox_key.default, _philox_key)
    for op in (ops.binarize, ops.pack_bits, ops.unpack_bits):
        torch.library.register_vmap(op.default, _rows(op))
    torch.library.register_vmap(ops.hamming_distance.default, _hamming_distance)
    torch.library.register_vmap(ops.hamming_topk.default, _each(ops.hamming_topk))
    torch.library.register_vmap(ops.topk_code.default, _code(ops.topk_code, (0,)))
    for op in (ops.topk_code_backward, ops.sparse_decode, ops.sparse_dots):
        torch.library.register_vmap(op.default, _code(op, (0, 1)))
    torch.library.register_vmap(ops.sparse_outer.default, _each(ops.sparse_outer))
    torch.library.register_vmap(ops.penalized_activation.default, _penalized)
    torch.library.register_vmap(
        ops.reconstruction_loss.default, _reconstruction(ops.reconstruction_loss, backward=False)
    )
    torch.library.register_vmap(
        ops.reconstruction_loss_backward.default, _reconstruction(ops.reconstruction_loss_backward, backward=True)
    )
    torch.library.register_vmap(ops.penalized_activation_backward.default, _penalized_backward)
    torch.library.register_vmap(ops.additive_attention.default, _additive)
    torch.library.register_vmap(ops.additive_attention_backward.default, _additive_backward)
    # lstm_cell(input, h, c, weight_ih, weight_hh, bias_ih, bias_hh, …)
    # lstm_cell_backward(grad_h, grad_c, input, h, c, weights and biases, candidate, grad_clip, gates, c_out, mask)
    torch.library.register_vmap(ops.lstm_cell.default, _cell(ops.lstm_cell, (0, 1, 2), (3, 4, 5, 6)))
    torch.library.register_vmap(
        ops.lstm_cell_backward.default,
        _cell_backward(ops.lstm_cell_backward, (0, 1, 2, 3, 4, 11, 12), (5, 6, 7, 8), weight_outputs=4),
    )
    # gru_cell(input, h, weight_ih, weight_hh, bias_ih, bias_hh, …)
    # gru_cell_backward(grad_h, input, h, weights and biases, reset_after, grad_clip, gates, mask)
    torch.library.register_vmap(ops.gru_cell.default, _cell(ops.gru_cell, (0, 1), (2, 3, 4, 5)))
    torch.library.register_vmap(
        ops.gru_cell_backward.default,
        _cell_backward(ops.gru_cell_backward, (0, 1, 2, 9), (3, 4, 5, 6), weight_outputs=4),
    )
    for op in (
        ops.attention,
        ops.attention_backward,
        ops.attention_tangent,
        ops.attention_backward_tangent,
        ops.attention_weights,
        ops.attention_with_weights,
        ops.attention_weights_backward,
    ):
        torch.library.register_vmap(op.default, _attention(op, op.default._schema.arguments))
    torch.library.register_vmap(ops.attention_dropout_mask.default, _each(ops.attention_dropout_mask))
    for op, backward in (
        (ops.lstm_layer, False),
        (ops.lstm_layer_backward, True),
        (ops.gru_layer, False),
        (ops.gru_layer_backward, True),
        (ops.layer_tangents, False),
    ):
        torch.library.register_vmap(op.default, _layer(op, op.default._schema.arguments, backward))
