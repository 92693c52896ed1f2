"""Checks that functions of autoencoders share."""

from __future__ import annotations

from torch import Tensor

from ..._errors import OPTIONAL_TENSOR, TENSOR, check_device, check_type


def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, rows: str, columns: str) -> None:
    """Raises unless they are a linear layer and its input; ``rows`` and ``columns``: what those of weight are."""
    for name, tensor in (("input", input), ("weight", weight)):
        check_type(name, tensor, TENSOR)
    check_type("bias", bias, OPTIONAL_TENSOR)
    for name, operand in (("input", input), ("weight", weight), ("bias", bias)):
        if operand is not None and not operand.is_floating_point():
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, but got {operand.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape [{rows}, {columns}], but got {list(weight.shape)}")
    if input.dim() == 0 or input.size(-1) != weight.size(1):
        raise ValueError(f"input must have shape [*, {weight.size(1)}], but got {list(input.shape)}")
    check_device("weight", weight, input, "input")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias must have shape [{weight.size(0)}] (the rows of weight), but got {list(bias.shape)}"
            )
        check_device("bias", bias, input, "input")
