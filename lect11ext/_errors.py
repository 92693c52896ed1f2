"""Says which argument had a type that no kernel takes, once a call has failed or before it is made."""

from __future__ import annotations

import builtins
import math
from numbers import Integral, Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor

TENSOR = (Tensor,)
OPTIONAL_TENSOR = (Tensor, NoneType)
NUMBER = (float, int)
OPTIONAL_NUMBER = (float, int, NoneType)
OPTIONAL_INT = (int, NoneType)
OPTIONAL_GENERATOR = (torch.Generator, NoneType)

_WORDS = {NoneType: "None", Tensor: "a Tensor", float: "a float", int: "an int", str: "a str", bool: "a bool"}


def _expected(name: str, value: object, types: tuple[type, ...]) -> TypeError:
    words = " or ".join(_WORDS.get(t, f"a {t.__name__}") for t in types)
    kind = type(value)
    is_namesake = hasattr(builtins, kind.__name__) and kind.__module__ != "builtins"  # numpy has a bool too
    got = f"{kind.__module__}.{kind.__name__}" if is_namesake else kind.__name__
    return TypeError(f"{name} must be {words}, but got {got}")


def _too_large(name: str, number: Any) -> ValueError:
    return ValueError(f"{name} must fit in 64 bits, but got one of {int(number).bit_length() + 1}")


def is_type(value: object, types: tuple[type, ...]) -> bool:
    """Whether it has one of the types. NumPy's scalars are ints and floats here, as in torch; a bool is no int."""
    if isinstance(value, types):
        return not isinstance(value, bool) or bool in types
    if isinstance(value, bool) or int not in types:
        return False
    return isinstance(value, Real if float in types else Integral)


def check_type(name: str, value: object, types: tuple[type, ...]) -> None:
    """Raises unless ``value`` has one of the types, beforehand: for what a kernel would convert."""
    # The first is what a call of a small layer, with fourteen arguments to ask about, has time for.
    if type(value) not in types and not is_type(value, types):
        raise _expected(name, value, types)


def plain(number: Any) -> Any:
    """A number of NumPy's as Python's: what is computed with it would be rounded to its type, float16 even."""
    if isinstance(number, (float, int, torch.SymFloat)):
        return number
    return int(number) if isinstance(number, Integral) else float(number)


def check_finite(name: str, number: float, types: tuple[type, ...] = OPTIONAL_NUMBER) -> None:
    """Raises unless it is a number and finite; an int may be larger than any float. A symbolic one has no value yet:
    the op looks at it when it has."""
    if torch.compiler.is_compiling() or isinstance(number, torch.SymFloat):
        return
    check_type(name, number, types)
    try:
        finite = math.isfinite(number)
    except OverflowError:
        finite = False
    if not finite:
        raise ValueError(f"{name} must be finite, but got {number}")


def check_sizes(**sizes: int) -> None:
    """Raises unless they are sizes: of a module, whose tensors would only say that some size was negative."""
    for name, size in sizes.items():
        check_type(name, size, (int,))
        check_range(name, size)
        if size < 0:
            raise ValueError(f"{name} must be nonnegative, but got {size}")


def check_range(name: str, number: Any) -> None:
    """Raises where it is an int that no kernel's int64 holds."""
    if number is not None and isinstance(number, (int, Integral)) and not -(2**63) <= int(number) < 2**63:
        raise _too_large(name, number)


def check_device(name: str, tensor: Tensor, other: Tensor, other_name: str = "query") -> None:
    """In the words of the ops, and of torch."""
    if tensor.device != other.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {tensor.device} and {other_name} on "
            f"{other.device}"
        )


def wrong_type(error: Exception, **arguments: tuple[object, tuple[type, ...]]) -> Exception:
    """An error that names the first argument of another type or out of range; ``error`` itself where there is none.

    For what kernels refuse: it costs nothing until a call has failed.
    """
    for name, (value, types) in arguments.items():
        if not isinstance(value, types) and not is_type(value, types):  # pybind11 takes a bool for a number
            return _expected(name, value, types)
        if isinstance(value, Integral) and not -(2**63) <= int(value) < 2**63:
            return _too_large(name, value)
    return error
