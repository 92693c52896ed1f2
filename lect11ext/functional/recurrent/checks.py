"""Checks of layers' options, for functions and modules alike. What tensors must be, the ops say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._errors import NUMBER, OPTIONAL_GENERATOR, OPTIONAL_NUMBER, TENSOR, check_device, check_range, check_type, plain

# weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
NamedWeights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Any]


def check_options(
    grad_clip: float | None, truncate: int, recompute: int, generator: torch.Generator | None, **flags: bool
) -> None:
    """The options that both layers have, and those that are yes or no."""
    check_clip(grad_clip)
    check_steps("truncate", truncate)
    check_steps("recompute", recompute)
    check_type("generator", generator, OPTIONAL_GENERATOR)
    for name, flag in flags.items():
        check_type(name, flag, (bool,))


def check_rate(name: str, rate: float) -> float:
    """``rate`` as a number of Python's; raises unless it is a probability."""
    check_type(name, rate, NUMBER)
    if not 0 <= rate <= 1:
        raise ValueError(f"{name} must be a probability, from 0 to 1, but got {rate}")
    return plain(rate)


def zoneout_rates(zoneout: tuple[float, float]) -> tuple[float, float]:
    """An LSTM's rates, of h and of c; raises unless they are probabilities."""
    try:
        rate_h, rate_c = zoneout
    except (TypeError, ValueError):
        raise TypeError(f"zoneout must be two probabilities, of h and of c, but got {zoneout!r}") from None
    return check_rate("zoneout of h", rate_h), check_rate("zoneout of c", rate_c)


def check_clip(grad_clip: float | None) -> None:
    """Raises unless gradients can be clamped to it, or it is None."""
    check_type("grad_clip", grad_clip, OPTIONAL_NUMBER)
    if grad_clip is not None and not grad_clip >= 0:
        raise ValueError(f"grad_clip must be nonnegative, but got {grad_clip}")


def check_steps(name: str, steps: int) -> None:
    """Raises unless it is a number of steps, or 0."""
    check_type(name, steps, (int,))
    check_range(name, steps)
    if steps < 0:
        raise ValueError(f"{name} must be a number of steps, or 0 for none, but got {steps}")


def listed(name: str, items: Any, what: str) -> list[Any]:
    """The items of any sequence; raises for what is none."""
    try:
        return [items[i] for i in range(len(items))]
    except (TypeError, KeyError):
        raise TypeError(f"{name} must be a sequence of {what}, but got {type(items).__name__}") from None


def named_weights(weights: Sequence[Sequence[Tensor]], projected: bool) -> list[NamedWeights]:
    items = listed("weights", weights, "sequences of tensors")
    for i, item in enumerate(items):
        if isinstance(item, Tensor):
            raise TypeError(
                "weights must be a sequence of sequences of tensors, one for each layer and direction, "
                f"but weights[{i}] is a Tensor"
            )
    return [_named(listed(f"weights[{i}]", item, "tensors"), projected) for i, item in enumerate(items)]


def _named(weight: Sequence[Tensor], projected: bool) -> NamedWeights:
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


def listed_extras(name: str, extras: Any, what: str, weights: Sequence[Any]) -> list[Any]:
    """An item for every item of weights."""
    items = listed(name, extras, what)
    if len(items) != len(weights):
        raise ValueError(f"{name} must have as many items as weights, {len(weights)}, but got {len(items)}")
    return items


def listed_peepholes(peepholes: Any, weights: Sequence[NamedWeights]) -> list[Tensor]:
    items = listed_extras("peepholes", peepholes, "tensors", weights)
    for i, (item, (weight, *_)) in enumerate(zip(items, weights, strict=True)):
        check_type(f"peepholes[{i}]", item, TENSOR)
        if isinstance(weight, Tensor) and weight.dim() == 2 and item.shape != (3, weight.size(0) // 4):
            raise ValueError(
                f"peepholes[{i}] must have shape [3, {weight.size(0) // 4}] (of the gates i, f and o), "
                f"but got {list(item.shape)}"
            )
    return items


def listed_norms(layer_norms: Any, weights: Sequence[Sequence[Any]]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of scales. The input's never reaches the op as it is, and one of a wrong shape would be taken for another
    norm; so its shape is checked here, and with it the state's."""
    pairs = []
    for i, item in enumerate(listed_extras("layer_norms", layer_norms, "pairs of tensors", weights)):
        pair = listed(f"layer_norms[{i}]", item, "two tensors")
        if len(pair) != 2:
            raise ValueError(f"layer_norms[{i}] must be (scale_ih, scale_hh), but got {len(pair)} items")
        for part, scale in zip(("scale_ih", "scale_hh"), pair, strict=True):
            name = f"{part} of layer_norms[{i}]"
            check_type(name, scale, TENSOR)
            weight = weights[i][0] if weights[i] else None
            if isinstance(weight, Tensor) and weight.dim() == 2:
                _check_scale(name, scale, weight)
        pairs.append((pair[0], pair[1]))
    return pairs


def _check_scale(name: str, scale: Tensor, weight: Tensor) -> None:
    rows = weight.size(0)
    if scale.dim() != 1 or scale.size(0) != rows:
        raise ValueError(f"{name} must have shape [{rows}] (rows of weight_ih), but got {list(scale.shape)}")
    check_device(name, scale, weight, "weight_ih")
    if scale.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(f"{name} must have the type of weight_ih, {weight.dtype}, but got {scale.dtype}")


def check_batch_sizes(sizes: list[int], rows: int) -> None:
    """Raises for what pack_padded_sequence does not make: for some of it torch's functions write beyond memory."""
    if not sizes or sizes[-1] <= 0 or sizes != sorted(sizes, reverse=True) or sum(sizes) != rows:
        raise ValueError(
            "batch_sizes of a PackedSequence must be positive, in descending order, and sum to the rows of its data, "
            f"{rows}, but got {sizes}"
        )
