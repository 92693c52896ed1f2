"""Says which argument had a type that no kernel takes. Costs nothing until a call has failed."""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor

TENSOR = (Tensor,)
OPTIONAL_TENSOR = (Tensor, NoneType)
NUMBER = (float, int)
OPTIONAL_NUMBER = (float, int, NoneType)
OPTIONAL_INT = (int, NoneType)
OPTIONAL_GENERATOR = (torch.Generator, NoneType)

_WORDS = {NoneType: "None", Tensor: "a Tensor", float: "a float", int: "an int", str: "a str", bool: "a bool"}


def wrong_type(error: Exception, **arguments: tuple[object, tuple[type, ...]]) -> Exception:
    """An error that names the first argument of another type or out of range; ``error`` itself where there is none."""
    for name, (value, types) in arguments.items():
        if not isinstance(value, types):
            words = " or ".join(_WORDS.get(t, f"a {t.__name__}") for t in types)
            return TypeError(f"{name} must be {words}, but got {type(value).__name__}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return ValueError(f"{name} must fit in 64 bits, but got one of {value.bit_length() + 1}")
    return error
