"""Recurrent steps. They derive from torch's base class, which brings parameters, initialisation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..._errors import check_sizes, check_type
from ..._load import _C
from ...functional import gru_cell, lstm_cell
from ...functional._dispatch import is_overridden
from ...functional.random import in_functorch
from ...functional.recurrent.checks import check_clip

if TYPE_CHECKING:
    from typing_extensions import Self

_UNITS = 16  # hidden units of a packed block, as the kernels take them


class _Cell(nn.RNNCellBase):
    """What the two cells share: the look-up of their weights, and prepacking."""

    _gates: int
    _packed: _Packed | None = None

    def prepack(self) -> Self:
        """Lays the weights out for inference on the CPU, and returns the module.

        Steps taken while grad is off then read the packed copy, which for a batch of one is faster. A step with grad on
        that a weight is to have a gradient of drops it, and so do ``train()``, ``load_state_dict()``,
        ``reset_parameters()``, ``.to()`` and the like, ``deepcopy`` and pickling; it is passed by under
        ``torch.compile``, autocast, ``torch.func``, forward-mode AD, modes and subclasses, and once a weight was
        changed or replaced. **Writes that PyTorch does not count go unnoticed**, and leave it stale: through ``p.data``
        or a NumPy view, of another process, and of a fused optimizer whose gradients came by another module. Call
        ``prepack()`` again after one.

        Only float32 and float64 weights on the CPU are packed. Rows of the 16-bit types are already in the order that
        their instructions want, and on CUDA the products are cuBLAS's; there it does nothing, nor for inference
        tensors, whose changes nothing counts.
        """
        ih, hh, *_ = _weights(self)
        counted = not (ih.is_inference() or hh.is_inference())
        packs = counted and ih.device.type == "cpu" and ih.dtype in (torch.float32, torch.float64)
        self._packed = _Packed(ih, hh, self._gates) if packs else None
        return self

    def _unpack(self) -> None:
        self._packed = None

    def _packed_for(self, input: Tensor, ih: Tensor, hh: Tensor) -> tuple[Tensor, Tensor] | None:
        """The packed weights, if this step may use them."""
        packed = self._packed  # another thread may drop it meanwhile
        if packed is None or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            if ih.requires_grad or hh.requires_grad:
                self._unpack()  # for an optimizer's step, which may be one that PyTorch does not count
            return None
        if forward_ad._current_level >= 0 or in_functorch() or is_in_torch_dispatch_mode():
            return None  # the packed copy has no derivatives and no batching rule, and tangents flow while grad is off
        if torch.is_autocast_enabled("cpu") or is_overridden(input, ih, hh) or not isinstance(input, Tensor):
            return None
        if input.shape != (1, self.input_size) or input.dtype != ih.dtype or input.device != ih.device:
            return None
        if not (packed.ih.is_still(ih) and packed.hh.is_still(hh)):
            return None  # torch.func.functional_call, an assignment, an optimizer's step
        return packed.weights

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._unpack()
        return super().train(mode)

    def reset_parameters(self) -> None:
        self._unpack()
        super().reset_parameters()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _pack(weight: Tensor, gates: int) -> Tensor:
    """``[gates · H, K] → [blocks, gates, K, 16]``: what 16 hidden units need of a gate is one stream."""
    rows, size = weight.shape
    hidden = rows // gates
    padding = -hidden % _UNITS
    padded = nn.functional.pad(weight.view(gates, hidden, size), (0, 0, 0, padding))
    return padded.view(gates, (hidden + padding) // _UNITS, _UNITS, size).permute(1, 0, 3, 2).contiguous()


class LSTMCell(_Cell):
    r"""Drop-in for :class:`torch.nn.LSTMCell`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.lstm_cell`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn's.
        candidate: ``"tanh"``, or ``"sigmoid"`` for Goodfellow et al.'s eq. 10.41.
        grad_clip: clamps the incoming gradients of h' and c' element by element.

    Inputs: ``input`` ``[B, I]`` or ``[I]``, and ``(h, c)``, zeros where missing. Outputs: ``(h', c')``.

    Example::

        >>> import torch, lect11ext
        >>> cell = lect11ext.nn.LSTMCell(5, 4)
        >>> h, c = cell(torch.randn(3, 5))
        >>> h.shape
        torch.Size([3, 4])
    """

    _gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        candidate: str = "tanh",
        grad_clip: float | None = None,
    ) -> None:
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        check_type("bias", bias, (bool,))
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        if candidate not in ("tanh", "sigmoid"):
            raise ValueError(f"candidate must be 'tanh' or 'sigmoid', but got {candidate!r}")
        self.candidate = candidate
        check_clip(grad_clip)
        self.grad_clip = grad_clip

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step; ``hx`` is ``(h, c)``."""
        if hx is None:
            zeros = _zero_state(self, input)
            hx = (zeros, zeros)
        ih, hh, b_ih, b_hh = _weights(self)
        packed = None if self._packed is None else self._packed_for(input, ih, hh)
        if packed is not None and isinstance(hx, (tuple, list)) and len(hx) == 2 and _are_rows(*hx):
            return _C.lstm_cell_packed(input, *hx, *packed, b_ih, b_hh, self.candidate)
        return lstm_cell(input, hx, ih, hh, b_ih, b_hh, candidate=self.candidate, grad_clip=self.grad_clip)

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra(candidate=(self.candidate, "tanh"), grad_clip=(self.grad_clip, None))


class GRUCell(_Cell):
    r"""Drop-in for :class:`torch.nn.GRUCell`: same arguments, parameters, initialisation and ``state_dict``.

    The equations stand in :func:`lect11ext.functional.gru_cell`.

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn's.
        reset_after: False for the form of Cho et al. 2014, whose reset gate acts before the state's product.
        grad_clip: clamps the incoming gradient of h' element by element.

    Inputs: ``input`` ``[B, I]`` or ``[I]``, and ``h``, zeros where missing. Output: h'.

    Example::

        >>> import torch, lect11ext
        >>> lect11ext.nn.GRUCell(5, 4)(torch.randn(3, 5)).shape
        torch.Size([3, 4])
    """

    _gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        grad_clip: float | None = None,
    ) -> None:
        check_sizes(input_size=input_size, hidden_size=hidden_size)
        check_type("bias", bias, (bool,))
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        check_type("reset_after", reset_after, (bool,))
        self.reset_after = reset_after
        check_clip(grad_clip)
        self.grad_clip = grad_clip

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step; ``hx`` is h."""
        if hx is None:
            hx = _zero_state(self, input)
        ih, hh, b_ih, b_hh = _weights(self)
        packed = None if self._packed is None else self._packed_for(input, ih, hh)
        if packed is not None and _are_rows(hx):
            return _C.gru_cell_packed(input, hx, *packed, b_ih, b_hh, self.reset_after)
        return gru_cell(input, hx, ih, hh, b_ih, b_hh, reset_after=self.reset_after, grad_clip=self.grad_clip)

    def extra_repr(self) -> str:
        return super().extra_repr() + _extra(reset_after=(self.reset_after, True), grad_clip=(self.grad_clip, None))


def _weights(cell: nn.RNNCellBase) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    # From the dictionary: four look-ups through Module.__getattr__ take longer than a small step.
    p = cell._parameters
    try:
        return p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]  # type: ignore[return-value]
    except KeyError:  # weight_norm, pruning, …: the attribute is computed
        return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


class _Source:
    """A weight as it was: its memory, kept, so that no other gets its address, and how often it had been written."""

    def __init__(self, weight: Tensor) -> None:
        self.memory = weight.detach()
        self.address, self.stride, self.version = weight.data_ptr(), weight.stride(), weight._version

    def is_still(self, weight: Tensor) -> bool:
        if weight.data_ptr() != self.address or weight.is_inference():
            return False
        return weight._version == self.version and weight.stride() == self.stride


class _Packed:
    """Weights, packed, and what they were packed from."""

    def __init__(self, ih: Tensor, hh: Tensor, gates: int) -> None:
        self.ih, self.hh = _Source(ih), _Source(hh)
        with torch.no_grad():
            self.weights = (_pack(ih, gates), _pack(hh, gates))


def _are_rows(*states: Tensor) -> bool:
    return all(isinstance(state, Tensor) and state.dim() == 2 for state in states)


def _zero_state(cell: nn.RNNCellBase, input: Tensor) -> Tensor:
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, but got {type(input).__name__}")
    return torch.zeros(*input.shape[:-1], cell.hidden_size, dtype=input.dtype, device=input.device)


def _extra(**arguments: tuple[object, object]) -> str:
    """The arguments that differ from their defaults, as extra_repr shows them."""
    return "".join(f", {name}={value!r}" for name, (value, default) in arguments.items() if value != default)
