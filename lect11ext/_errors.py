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
    """A TypeError that names the first argument that is not of its types; ``error`` itself where all of them are."""
    for name, (value, types) in arguments.items():
        if not isinstance(value, types):
            words = " or ".join(_WORDS.get(t, f"a {t.__name__}") for t in types)
            return TypeError(f"{name} must be {words}, but got {type(value).__name__}")
    return error
