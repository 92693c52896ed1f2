"""Exchanges torch.nn's modules for lect11ext's in a whole model, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from . import nn
from ._load import _C

__all__ = ["Report", "convert", "revert"]

Model = TypeVar("Model", bound=Module)
Classes = Mapping[type[Module], type[Module]]

# What a pair must have in common: parameters, buffers and attributes of the same names. What lect11ext's constructor
# takes beyond torch.nn's is keyword-only, and kept under the argument's name.
_OURS: Classes = {
    torch.nn.LSTM: nn.LSTM,
    torch.nn.GRU: nn.GRU,
    torch.nn.LSTMCell: nn.LSTMCell,
    torch.nn.GRUCell: nn.GRUCell,
    torch.nn.MultiheadAttention: nn.MultiheadAttention,
}
_TORCHS: Classes = {ours: torchs for torchs, ours in _OURS.items()}

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Report:
    """What :func:`convert` and :func:`revert` did, by the modules' names as ``model.named_modules()`` gives them.

    The name of the model itself is the empty string; a module that is registered in two places has its first name.

    Attributes:
        replaced: the new class of every module that was exchanged.
        left: why a module was not, for every module that might have been expected to be.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for title, modules in (("replaced", self.replaced), ("left", self.left)):
            lines.append(f"{title}: {len(modules)}")
            lines += [f"  {name or '(the model itself)'}: {text}" for name, text in modules.items()]
        return "\n".join(lines)


def convert(model: Model) -> tuple[Model, Report]:
    """Exchanges every torch.nn module of a model that lect11ext has too for lect11ext's, in place.

    These are LSTM, GRU, LSTMCell, GRUCell and MultiheadAttention, wherever they are: in a TransformerEncoderLayer too.
    Each stays the object that it is and changes its class alone: parameters (and with them optimizers), buffers, hooks,
    parametrizations, the training flag, the ``state_dict`` and every place that refers to the module are as before;
    ``isinstance(module, torch.nn.LSTM)`` no longer holds. What a model computes differs by rounding, and by dropout's
    random numbers.

    Left as they are, with the reason in the report: subclasses, quantized and scripted modules, modules on which a
    method was replaced, types and devices for which lect11ext has no kernels, several types in one module. It knows
    modules by their class: what code makes of an LSTM later, such as quantization, is to be done on torch.nn's, before
    or after :func:`revert`. A ``torch.nn.TransformerEncoder`` that is made of a converted layer warns about
    ``enable_nested_tensor``: say ``enable_nested_tensor=False``, or convert the whole encoder.

    Args:
        model: any module; it may itself be an LSTM. Not one that ``torch.compile`` returned: convert first, then
            compile. (Parts of it may be compiled; they compile again at their next call.)

    Returns:
        ``(model, report)``: the same object, and which modules were replaced and which left, for what reason.

    Raises:
        TypeError: if model is not a Module, or is compiled or scripted.

    Example::

        >>> import torch, lect11ext
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(5, 4), "head": torch.nn.Linear(4, 2)})
        >>> model, report = lect11ext.convert(model)
        >>> print(report)
        replaced: 1
          encoder: lect11ext.nn.LSTM
        left: 0
        >>> type(model["encoder"]) is lect11ext.nn.LSTM
        True
    """
    return model, _exchange(model, _OURS, _needs_ours)


def revert(model: Model) -> tuple[Model, Report]:
    """Exchanges every lect11ext module of a model that torch.nn has too for torch.nn's, in place.

    What :func:`convert` did is undone, in the same way; prepacked weights are dropped.

    Left as they are, with the reason in the report: modules that were made with an option that torch.nn lacks (a
    sigmoid ``candidate``, a ``grad_clip``, …), subclasses, modules on which a method was replaced, and those that
    torch.nn does not have. Calls with arguments that torch.nn lacks (``lengths``, ``reset``) fail from then on.

    Args:
        model: any module; it may itself be a lect11ext.nn.LSTM. Not one that ``torch.compile`` returned.

    Returns:
        ``(model, report)``: the same object, and which modules were replaced and which left, for what reason.

    Raises:
        TypeError: if model is not a Module, or is compiled or scripted.

    Example::

        >>> import torch, lect11ext
        >>> cells = torch.nn.ModuleList([lect11ext.nn.GRUCell(5, 4), lect11ext.nn.GRUCell(4, 4, reset_after=False)])
        >>> cells, report = lect11ext.revert(cells)
        >>> print(report)
        replaced: 1
          0: torch.nn.GRUCell
        left: 1
          1: torch.nn.GRUCell has no reset_after=False
        >>> cells[0]
        GRUCell(5, 4)
    """
    return model, _exchange(model, _TORCHS, _needs_torchs)


def _exchange(model: Module, targets: Classes, obstacle: Callable[[Module, type[Module]], str | None]) -> Report:
    """Gives the modules whose class is a key of ``targets`` the class that stands there, if no obstacle is found."""
    _check(model)
    report = Report()
    for name, module in list(model.named_modules()):
        source = type_before_parametrizations(module)
        target = targets.get(source)
        if target is None:
            reason = _stranger(module, source, targets)
        else:
            reason = _own_attributes(module, target) or obstacle(module, target)
        if reason is not None:
            report.left[name] = reason
        elif target is not None:
            _become(module, source, target)
            report.replaced[name] = _name(target)
    return report


def _check(model: Module) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {_given(model)}")
    if isinstance(getattr(model, "_orig_mod", None), Module):
        raise TypeError("model must be as it was before torch.compile, but got a compiled one: compile it afterwards")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be as it was before torch.jit, but got a {type(model).__name__}")


def _become(module: Module, source: type[Module], target: type[Module]) -> None:
    """What torch's lazy modules and torch.nn.utils.parametrize do too: the object stays, and its class is another."""
    # What only the source's class knows: its options, and state that shadows the class's own defaults. (A property
    # shadows the state, which stays.)
    for name in [n for n in vars(module) if n in _options(source) or _is_default(n, source, target)]:
        delattr(module, name)
    vars(module).update(_options(target))
    if is_parametrized(module):
        # torch.nn.utils.parametrize gives each module a class of its own, derived from the module's, with a property
        # for each parametrized tensor.
        target = type(f"Parametrized{target.__name__}", (target,), dict(vars(type(module))))
    module.__class__ = target


def _is_default(name: str, source: type[Module], target: type[Module]) -> bool:
    own = getattr(source, name, target)
    return own is not target and not isinstance(own, property) and not hasattr(target, name)


def _options(cls: type[Module]) -> dict[str, Any]:
    """What a constructor of lect11ext takes and torch.nn's does not, with the defaults. Of torch.nn's: nothing."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _stranger(module: Module, source: type[Module], targets: Classes) -> str | None:
    """Why a module of another class is left; None where nobody would expect it to be exchanged."""
    for cls in source.__mro__:
        if cls in targets:
            return f"{_name(source)} derives from {_name(cls)}, and what it adds would be lost"
    if targets is _TORCHS:
        kin = any(cls.__module__.startswith("lect11ext.") for cls in source.__mro__)
        return f"torch.nn has nothing like {_name(source)}" if kin else None
    names = {cls.__name__ for cls in targets}
    if isinstance(module, torch.jit.ScriptModule):
        return f"a scripted {module.original_name} keeps its code" if module.original_name in names else None
    # torch.ao.nn has quantized modules of the same names; and torch.nn kinds of recurrent modules that are not here.
    names |= {"RNN", "RNNCell"}
    kin = any(cls.__name__ in names and cls.__module__.startswith("torch.") for cls in source.__mro__)
    return f"lect11ext has nothing like {_name(source)}" if kin else None


def _own_attributes(module: Module, target: type[Module]) -> str | None:
    """Attributes of the object itself that hide its class's methods, or stand where the other class keeps an option."""
    options = _options(target)
    names = [n for n in vars(module) if n in options or callable(getattr(type(module), n, None))]
    return f"{', '.join(names)} was set on this module itself, from outside its class" if names else None


def _needs_ours(module: Module, target: type[Module]) -> str | None:
    for parameter in module.parameters():
        if parameter.dtype not in _DTYPES:
            return f"{_name(target)} does not take {parameter.dtype}"
        device = parameter.device.type
        if device == "cuda" and not _C.build_info()["cuda"]:
            return "this build of lect11ext has no CUDA kernels"
        if device not in ("cpu", "cuda", "meta"):
            return f"lect11ext has no kernels for device {device}"
    types = sorted({str(parameter.dtype) for parameter in module.parameters()})
    return f"{_name(target)} takes parameters of one type, not of {' and '.join(types)}" if len(types) > 1 else None


def _needs_torchs(module: Module, target: type[Module]) -> str | None:
    options = _options(type_before_parametrizations(module))
    own = {name: getattr(module, name) for name in options}
    # A pair of defaults, as an LSTM's zoneout may be, is the default too.
    given = [f"{n}={own[n]!r}" for n, default in options.items() if own[n] not in (default, (default, default))]
    return f"{_name(target)} has no {', '.join(given)}" if given else None


def _name(cls: type) -> str:
    """A class as users know it: torch.nn and lect11ext.nn export what their submodules define."""
    for package in ("torch.nn", "lect11ext.nn"):
        if cls.__module__.startswith(f"{package}."):
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _given(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
