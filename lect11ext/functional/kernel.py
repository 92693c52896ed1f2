"""Regression with a Gaussian kernel, as an attention."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .._errors import NUMBER, TENSOR, check_device, check_type, plain
from . import _attention as common
from ._attention import Window
from ._dispatch import is_autocast
from .attention import scaled_dot_product_attention
from .random import in_functorch


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: float | Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    *,
    window: Window | None = None,
    causal_alignment: str = "top_left",
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    dropout_key: Tensor | None = None,
) -> Any:
    r"""Nadaraya–Watson regression with a Gaussian kernel, as a case of :func:`scaled_dot_product_attention`.

    .. math::
        \text{out}_i = \frac{\sum_j e^{-\|q_i - k_j\|^2 / 2 w^2} \, v_j}{\sum_j e^{-\|q_i - k_j\|^2 / 2 w^2}}, \qquad
        -\frac{\|q - k\|^2}{2 w^2} = \frac{q \cdot k}{w^2} - \frac{\|k\|^2}{2 w^2} - \frac{\|q\|^2}{2 w^2}

    The last term is the same for all keys of a query, and falls out of the quotient; so this is a dot-product attention
    with the scale 1/w² and an additive mask −‖k_j‖²/2w². The first two may be far larger than their sum: where points
    lie a thousand widths apart, a float32 has one digit of it. So all types are computed in float64, which has seven
    for ten thousand widths, and keys and queries are shifted by the median of the keys, each head's own, which changes
    no distance.

    Args:
        query, key, value: as in :func:`scaled_dot_product_attention`, but not nested; ``[L, D]``, ``[S, D]`` and
            ``[S, Dv]`` for plain regression.
        width: the kernel's, w: a positive number, so large that 1/w² is finite in float64: from 7.5e-155 on.
            Or a floating-point tensor that broadcasts to the leading dimensions ``[*, H]``, with gradient. Whether its
            values are positive and finite is looked at on the CPU, outside of ``vmap`` and of what is traced or
            compiled; elsewhere wrong ones give NaN.
        attn_mask: bool or additive; joined with the mask above in a tensor of its own shape, float64.
        dropout_p, is_causal, enable_gqa, window, causal_alignment, generator, dropout_key: as there.
        return_lse: whether :math:`\ln \sum_j e^{-\|q_i - k_j\|^2 / 2 w^2}` is returned too.

    Returns:
        ``[*, H, L, Dv]`` in the query's type, or ``(output, lse)``.

    Gradients, determinism and errors as in :func:`scaled_dot_product_attention`. Computed in float64, under autocast
    too, which lets the types of the operands differ.

    Source: Nadaraya 1964; Watson 1964.

    Example::

        >>> import torch, lect11ext
        >>> x = torch.linspace(0, 5, 50)[:, None]
        >>> y = lect11ext.functional.kernel_attention(torch.tensor([[2.5]]), x, x.sin(), width=0.2)
        >>> torch.allclose(y, torch.tensor([[2.5]]).sin(), atol=0.02)
        True
    """
    check_type("enable_gqa", enable_gqa, (bool,))
    check_type("return_lse", return_lse, (bool,))
    _, _, _, shape = common.canonical(query, key, value, enable_gqa)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating-point, but got {x.dtype}")
    for name, x in (("key", key), ("value", value)):
        check_device(name, x, query)
        if x.dtype != query.dtype and not is_autocast(query):
            raise TypeError(f"{name} must have the type of query, {query.dtype}, but got {x.dtype}")
    if attn_mask is not None:
        _check_mask(attn_mask, query)
        common.canonical_mask(attn_mask, shape)
    inverse = _inverse_square(width, shape, query)
    dtype = query.dtype
    query, key, value = query.double(), key.double(), value.double()
    centre = _centre(key)
    group = _group(query, key) if enable_gqa else 1
    key = key - centre
    bias = _half_squares(key)
    if group > 1 and key.dim() > 2:
        centre, bias = centre.repeat_interleave(group, -3), bias.repeat_interleave(group, -3)
    query = query - centre
    bias = bias * -inverse
    if attn_mask is not None:
        bias = torch.where(attn_mask, bias, -math.inf) if attn_mask.dtype == torch.bool else bias + attn_mask
    half_squares = _half_squares(query) if return_lse else None
    scale = inverse
    if isinstance(width, Tensor):
        query, scale = query * inverse, 1.0
    out = scaled_dot_product_attention(
        query, key, value, bias, dropout_p, is_causal, scale, enable_gqa, window=window,
        causal_alignment=causal_alignment, return_lse=return_lse, generator=generator, dropout_key=dropout_key,
    )  # fmt: skip
    if not return_lse:
        return out.to(dtype)
    output, lse = out
    lse = lse - (half_squares * inverse).squeeze(-2)
    return output.to(dtype), lse if dtype == torch.float64 else lse.float()


def _group(query: Tensor, key: Tensor) -> int:
    """How many neighbouring heads of query share one of key."""
    if query.dim() < 3:
        return 1
    key_heads = key.size(-3) if key.dim() > 2 else 1
    return query.size(-3) // max(1, key_heads)


def _centre(key: Tensor) -> Tensor:
    """The median of the keys, [*, 1, columns]: few that lie far away, or are barred and NaN, do not move it."""
    if key.size(-2) == 0:
        return key.new_zeros((*key.shape[:-2], 1, key.size(-1)))
    key = key.detach()
    return torch.where(key.isfinite(), key, 0).sort(-2).values.narrow(-2, key.size(-2) // 2, 1)


def _half_squares(x: Tensor) -> Tensor:
    """½‖x‖² of the rows, [*, 1, rows]. What is not finite shows in the product as well, where it is seen; where it is
    not, it must not come in by the mask."""
    return torch.where(x.isfinite(), x, 0).square().sum(-1).div(2).unsqueeze(-2)


def _inverse_square(width: float | Tensor, shape: common.Shape, query: Tensor) -> Any:
    """1/w², a number or [*, H, 1, 1]; raises for a width that has none."""
    if not isinstance(width, Tensor):
        check_type("width", width, (*NUMBER, Tensor))
        least = 1.01 * sys.float_info.max**-0.5
        if not least <= plain(width) <= sys.float_info.max:
            raise ValueError(f"width must be finite and at least {least:.2g}, so that 1/width² is, but got {width}")
        return float(width) ** -2
    check_device("width", width, query)
    if not width.is_floating_point():
        raise TypeError(f"width must be floating-point, but got {width.dtype}")
    lead = (*shape.batch, shape.heads)
    lead = lead[len(lead) - (shape.rank - 2) :]
    sizes = lead[len(lead) - width.dim() :]
    if width.dim() > len(lead) or not all(w == 1 or w == s for w, s in zip(width.shape, sizes, strict=True)):
        raise ValueError(f"width must broadcast to {list(lead)} (…, heads), but got shape {list(width.shape)}")
    if _has_values(width) and not bool(((width > 0) & (width < math.inf)).all()):
        raise ValueError(f"width must be positive and finite, but got {width.min()} to {width.max()}")
    return width.double()[..., None, None] ** -2


def _has_values(x: Tensor) -> bool:
    """Whether they can be looked at, and that at once."""
    if torch.compiler.is_compiling() or in_functorch() or is_in_torch_dispatch_mode() or torch._C._is_tracing():
        return False
    return x.device.type == "cpu" and type(x) in (Tensor, Parameter)


def _check_mask(attn_mask: Tensor, query: Tensor) -> None:
    check_type("attn_mask", attn_mask, TENSOR)
    check_device("attn_mask", attn_mask, query)
    kind, most = attn_mask.dtype, torch.float64 if query.dtype == torch.float64 else torch.float32
    if kind != torch.bool and not (kind.is_floating_point and torch.promote_types(kind, most) == most):
        raise TypeError(f"attn_mask must be bool, or floating-point of at most {most}, but got {kind}")
