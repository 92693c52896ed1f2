"""lect11ext's attention under torch.nn.functional.scaled_dot_product_attention, while a caller asks for it.

The function is exchanged where it stands, and not by a TorchFunctionMode: a mode costs time at every function of torch,
is not seen by other threads (a checkpoint's recomputation runs in the backward's), and is switched off inside
multi_head_attention_forward, which is the caller that matters most. Dynamo guards on the exchanged name.
"""

from __future__ import annotations

import math
import sys
import threading
from contextlib import ContextDecorator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._errors import NUMBER, is_type
from .._load import _C
from ..functional._dispatch import is_autocast
from ..functional.attention import scaled_dot_product_attention
from ._flash import activated

_NAME = "scaled_dot_product_attention"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "meta") if _C.build_info()["cuda"] else ("cpu", "meta")
_TORCHS: Any = torch._C._nn.scaled_dot_product_attention


class sdpa(ContextDecorator):
    """Puts lect11ext's attention under ``torch.nn.functional.scaled_dot_product_attention`` for a ``with`` block.

    Whatever calls that function, by way of ``torch.nn.MultiheadAttention`` too, then computes the same with
    :func:`lect11ext.functional.scaled_dot_product_attention`, which has what torch's fused kernels have not: gradients
    of additive masks, forward-mode AD, double backward, dropout, 3-D and 5-D inputs and value dimensions of their own,
    all without a tensor of queries × keys. Dropout draws other random numbers than torch's.

    - Names under which a module imported the function before (``from torch.nn.functional import …``) change too; a
      reference kept under another name, in a local variable or in a C++ program does not.
    - ``torch.nn.TransformerEncoderLayer`` takes its slow path (:mod:`torch.backends.mha`), also in eval, since its
      fast path would bypass the function.
    - ``torch.nn.attention.sdpa_kernel`` has no effect on calls that are ours. Inputs for which there are no kernels
      (other devices, other types, strided nested tensors, mixed types), options that are no plain numbers (a tensor as
      ``scale``), and tensor subclasses with a ``__torch_function__`` of their own, go to torch as before.
    - With CUDA kernels, and a torch that has the registry (2.13), our kernels are also activated as its flash attention
      (:func:`flash`), which reaches callers in C++ and torch's context parallelism; what was active comes back after.
    - It holds for the whole process and every thread, until the last block is left. A backward that recomputes its
      forward (``torch.utils.checkpoint``) belongs into the block with it.
    - ``torch.compile``: enter the block outside of what is compiled. Our op then stands in the graph, without a break;
      the same function called outside of a block is compiled again, with torch's. ``torch.export`` keeps what it saw.

    It is a decorator too; and ``lect11ext.integrations.sdpa().__enter__()`` lets it hold for the rest of a program.

    Example::

        >>> import torch, lect11ext.integrations
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        >>> x = torch.randn(3, 5, 16)
        >>> expected = layer(x)
        >>> with lect11ext.integrations.sdpa():
        ...     out = layer(x)
        >>> torch.allclose(out, expected, atol=1e-5)
        True
    """

    def __enter__(self) -> sdpa:
        _state.enter()
        return self

    def __exit__(self, *_: object) -> None:
        _state.exit()


class _State:
    """How many blocks are open, and what was there before the first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.active = False
        self.fast_path = True
        self.flash = activated()

    def enter(self) -> None:
        with self.lock:
            if self.blocks == 0:
                self.flash = activated()
                self.flash.__enter__()
                self.fast_path = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
                _exchange(_TORCHS, _redirected)
                self.active = True
            self.blocks += 1

    def exit(self) -> None:
        with self.lock:
            if self.blocks == 0:
                raise RuntimeError("sdpa()'s block must be entered before it is left, but none is open")
            self.blocks -= 1
            if self.blocks == 0:
                self.active = False
                _exchange(_redirected, _TORCHS)
                torch.backends.mha.set_fastpath_enabled(self.fast_path)
                self.flash.__exit__(None, None, None)


def _exchange(old: Any, new: Any) -> None:
    """In every module that has it under its own name. Its dictionary is asked: a lazy module would import things."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module is not torch._C._nn and vars(module).get(_NAME) is old:
            setattr(module, _NAME, new)


def _redirected(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch.nn.functional.scaled_dot_product_attention, by lect11ext where it has kernels for the inputs."""
    if not _state.active:  # kept beyond the block under a name of somebody's own
        return _TORCHS(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    numbers = _are_ours(dropout_p, is_causal, scale, enable_gqa)
    alignment = "top_left"
    if attn_mask is not None and type(attn_mask).__name__ == "CausalBias":  # torch's way to ask for an alignment
        if is_causal:
            raise ValueError("CausalBias should not be used with causal=True")  # torch's words
        bias, attn_mask, is_causal = attn_mask, None, True
        lower_right = bias.variant.name == "LOWER_RIGHT"
        if lower_right and bias.seq_len_q != bias.seq_len_kv:  # else torch takes it for is_causal, whatever its size
            if numbers and _is_ours(query, key, value, None) and _has_size(query, key, bias):
                alignment = "bottom_right"
            else:  # the bias knows torch's function by its present name only
                bias = bias._materialize(query.device)
                return _TORCHS(query, key, value, bias, dropout_p, scale=scale, enable_gqa=enable_gqa)
    if not (numbers and _is_ours(query, key, value, attn_mask)):
        return _TORCHS(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment=alignment
    )


def _are_ours(dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> bool:
    """Whether they are of the types that our function takes: torch's converts some, such as tensors of one element."""
    if not (isinstance(is_causal, bool) and isinstance(enable_gqa, bool) and is_type(dropout_p, NUMBER)):
        return False
    return 0 <= dropout_p <= 1 and (scale is None or (is_type(scale, NUMBER) and math.isfinite(scale)))


def _has_size(query: Tensor, key: Tensor, bias: Any) -> bool:
    if query.is_nested or query.dim() < 2 or key.dim() < 2:
        return False
    return query.size(-2) == bias.seq_len_q and key.size(-2) == bias.seq_len_kv


def _is_ours(query: Any, key: Any, value: Any, attn_mask: Any) -> bool:
    for x in (query, key, value):
        if not isinstance(x, Tensor):
            return False
        if x.is_nested:
            if x.layout != torch.jagged or attn_mask is not None:
                return False
        elif not _is_plain(x):
            return False
    if attn_mask is not None and not _is_plain(attn_mask):
        return False
    if attn_mask is not None and query.dtype == torch.float64 and attn_mask.dtype == torch.float32:
        return False  # torch's takes it
    dtype, device = query.dtype, query.device
    kind = device.type
    if dtype not in _DTYPES or kind not in _DEVICES or key.device != device or value.device != device:
        return False
    if key.dtype == dtype and value.dtype == dtype:
        return True
    return is_autocast(query) and key.dtype in _DTYPES and value.dtype in _DTYPES


def _is_plain(x: Any) -> bool:
    """Whether its class leaves torch's functions as they are."""
    if type(x) in (Tensor, Parameter):
        return True
    function = getattr(type(x), "__torch_function__", None)
    return function is torch._C._disabled_torch_function_impl or getattr(function, "__func__", None) is _DEFAULT


_DEFAULT = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_state = _State()
