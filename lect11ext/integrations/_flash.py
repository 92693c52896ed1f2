"""lect11ext's attention as one of torch's flash attention implementations, on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from .._load import _C
from ..functional._attention import dropout_key_for

try:  # from torch 2.13 on
    from torch.nn.attention import _registry
except ImportError:
    _registry = None  # type: ignore[assignment]

NAME = "lect11ext"


def flash() -> str:
    """Registers our kernels with ``torch.nn.attention`` as a flash attention implementation; it activates nothing.

    Once it is activated, what ``torch.nn.functional.scaled_dot_product_attention`` decides to give to its flash
    attention on CUDA is computed by lect11ext, in the whole process and for callers in C++ too: torch's context
    parallelism, nested tensors aside. What torch gives elsewhere (float32, masks, its math path), and forward-mode AD
    and double backward, which torch has not for its flash attention, it does not reach; :func:`sdpa` does.

    Returns:
        The name to activate it by, ``"lect11ext"``.

    Raises:
        RuntimeError: where torch has no such registry (before 2.13).

    Example::

        >>> import torch, lect11ext.integrations
        >>> name = lect11ext.integrations.flash()
        >>> name in torch.nn.attention.list_flash_attention_impls()
        True
        >>> torch.nn.attention.activate_flash_attention_impl(name)
        >>> torch.nn.attention.restore_flash_attention_impl()
    """
    if _registry is None:
        raise RuntimeError(
            f"torch must have torch.nn.attention.register_flash_attention_impl (2.13 or newer), but is "
            f"{torch.__version__}; lect11ext.integrations.sdpa() needs none"
        )
    _registry.register_flash_attention_impl(NAME, register_fn=lambda: _Handle("CUDA"))
    return NAME


@contextmanager
def activated() -> Iterator[None]:
    """Our kernels as CUDA's flash attention, where there are any, and then what was active before."""
    if _registry is None or not (_C.build_info()["cuda"] and torch.cuda.is_available()):
        yield
        return
    before = _registry.current_flash_attention_impl()
    _registry.activate_flash_attention_impl(flash())
    try:
        yield
    finally:
        if _registry.current_flash_attention_impl() == NAME:  # nobody has activated another since
            _registry.restore_flash_attention_impl()
            if before is not None:
                _registry.activate_flash_attention_impl(before)


class _Handle:
    """Our kernels under torch's ops of a dispatch key, until it is removed."""

    def __init__(self, dispatch_key: str) -> None:
        self.library: Library | None = Library("aten", "IMPL", dispatch_key)
        self.library.impl("_scaled_dot_product_flash_attention", _forward)
        self.library.impl("_scaled_dot_product_flash_attention_backward", _backward)

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None


def _options(dropout_p: float, is_causal: bool, scale: float | None) -> tuple[Any, ...]:
    """dropout_p to softcap. This op's causality starts in the lower right corner, says torch.nn.attention.bias."""
    return dropout_p, scale, None, 0 if is_causal else None, True, None


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if return_debug_mask:
        raise ValueError("return_debug_mask must be False, but got True")
    queries = query.size(2)
    keys = key.size(2)
    drop = dropout_key_for(query, keys, dropout_p, None, None)
    options = _options(dropout_p, is_causal, scale)
    output, lse = _C.attention(query, key, value, None, None, None, None, drop, *options)
    nothing = query.new_empty(0)
    state = query.new_empty(2, dtype=torch.int64) if drop is None else drop
    return output, lse, None, None, queries, keys, state, nothing.to(torch.int64), nothing


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    drop = philox_seed if dropout_p > 0 else None  # as _forward left it
    gradients = torch.ops.lect11ext.attention_backward(
        grad_out, None, query, key, value, None, None, None, None, drop, *_options(dropout_p, is_causal, scale), out,
        logsumexp, (True, True, True, False),
    )  # fmt: skip
    return gradients[:3]
