"""Multi-head attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import Parameter

from .._errors import NUMBER, OPTIONAL_INT, TENSOR, check_range, check_sizes, check_type
from ..functional import attention_weights, scaled_dot_product_attention, varlen_attention
from ..functional._attention import Window, check_window, dropout_key_for
from ..functional._attention_weights import attention_with_weights
from ..functional.attention import check_sequences, jagged_parts
from ._attention_inputs import (
    LEAST_BASE,
    MOST_BASE,
    batch_first,
    check_attn_mask,
    merged_masks,
    one_sequence,
    padded,
    positions_first,
    positions_of,
    rotate,
)


class MultiheadAttention(nn.Module):
    r"""Drop-in for :class:`torch.nn.MultiheadAttention`: same arguments, parameters, initialisation and ``state_dict``.

    .. math::
        \text{head}_h = \text{attention}(q W_h^Q, k W_h^K, v W_h^V), \qquad
        \text{out} = \text{concat}(\text{head}_1, \dots, \text{head}_H) \, W^{O\top} + b^O

    with attention as :func:`lect11ext.functional.scaled_dot_product_attention` says, in one op.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch.nn's.
        num_kv_heads: heads of keys and values, a divisor of ``num_heads``; neighbouring heads of queries share one
            (grouped queries). ``in_proj_weight`` has E + 2 · num_kv_heads · head_dim rows then. None: as many as heads.
        window: ``(left, right)``, inclusive: query i sees keys i − left to i + right; None is open. What a mask bars is
            barred too.
        rope: rotary position embedding of projected queries and keys (Su et al. 2021), with the base 10000 if True, or
            with the number given, from 1e-20 to 1e+38. Columns m and m + head_dim / 2 of position i are a pair, turned
            by the angle :math:`i \cdot \text{base}^{-2m / \text{head\_dim}}`.

    Inputs: ``query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True,
    is_causal=False`` as torch.nn's: ``[L, N, E]``, ``[N, L, E]`` with ``batch_first``, or ``[L, E]``; in masks True
    bars. Outputs: ``(output, weights)``, weights None without ``need_weights``.

    What differs from torch.nn's, on purpose:

    - A query whose keys are all masked has output ``out_proj.bias`` and weights 0, with or without ``need_weights``;
      torch.nn's has NaN with them. NaN or inf at padded positions of *projected* keys and values are not used.
    - ``need_weights=True`` is fused too: on the CPU output and weights are one op, in one pass up to 1024 keys, and
      averaged weights never hold ``[N, H, L, S]``.
    - ``is_causal=True`` without ``attn_mask`` is a causal mask. With one it is torch.nn's hint, as there: the mask is
      taken to be causal if neither ``need_weights`` nor ``key_padding_mask`` is given, else the hint is ignored.
    - Keys that ``add_bias_kv`` and ``add_zero_attn`` append are seen by all queries, whatever ``window``, ``rope`` and
      ``is_causal`` without a mask say.
    - Masks of two types go together without a warning; float masks of another type than the input's are converted.
    - In 16 bits a row whose mask is one huge negative number, and not −inf, keeps the weights that float32 gives it;
      torch.nn's, whose scores have 16 bits, become alike.
    - Jagged nested tensors ``[N, j, E]`` are taken, in training too, without masks; weights are padded with zeros to
      ``[N, L, S]`` of the longest, and as they were before dropout.
    - Wrong arguments raise ValueError or TypeError, where torch.nn's raises AssertionError or RuntimeError.
    - Dropout's random numbers are others.
    - ``_qkv_same_embed_dim`` reads False, whatever the dimensions: it is what ``torch.nn.TransformerEncoderLayer`` asks
      before it hands the weights of a layer in ``eval()`` to an op of its own, past this module. Whether the weights
      are packed is whether ``q_proj_weight`` is None. (``torch.nn.TransformerEncoder`` warns of it when it is made;
      ``enable_nested_tensor=False`` says that this is known.)

    Example::

        >>> import torch, lect11ext
        >>> attention = lect11ext.nn.MultiheadAttention(32, 4, batch_first=True, num_kv_heads=2)
        >>> x = torch.randn(3, 7, 32)
        >>> output, weights = attention(x, x, x, is_causal=True)
        >>> output.shape, weights.shape
        (torch.Size([3, 7, 32]), torch.Size([3, 7, 7]))
    """

    __constants__ = ["batch_first"]  # noqa: RUF012

    bias_k: Tensor | None
    bias_v: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: Window | None = None,
        rope: bool | float = False,
    ) -> None:
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            check_type(name, size, (int,))
            check_range(name, size)
        flags = {"bias": bias, "add_bias_kv": add_bias_kv, "add_zero_attn": add_zero_attn, "batch_first": batch_first}
        for name, flag in flags.items():
            check_type(name, flag, (bool,))
        if embed_dim <= 0 or num_heads <= 0:
            raise ValueError(
                f"embed_dim and num_heads must be greater than 0, got embed_dim={embed_dim} and num_heads={num_heads} "
                "instead"
            )
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be divisible by num_heads, {num_heads}, but got {embed_dim}")
        check_type("dropout", dropout, NUMBER)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a probability, from 0 to 1, but got {dropout}")
        for name, optional in (("kdim", kdim), ("vdim", vdim), ("num_kv_heads", num_kv_heads)):
            check_type(name, optional, OPTIONAL_INT)
        check_sizes(kdim=kdim or 0, vdim=vdim or 0)
        if num_kv_heads is not None and (num_kv_heads <= 0 or num_heads % num_kv_heads):
            raise ValueError(f"num_kv_heads must divide num_heads, {num_heads}, but got {num_kv_heads}")
        check_window(window)
        check_type("rope", rope, (bool, float, int))
        if not isinstance(rope, bool) and not LEAST_BASE <= rope <= MOST_BASE:
            raise ValueError(f"rope must be True, False or a base from {LEAST_BASE} to {MOST_BASE}, but got {rope}")
        if rope and embed_dim // num_heads % 2:
            raise ValueError(f"rope needs an even head dimension, but got {embed_dim // num_heads}")
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.kdim = kdim if kdim is not None else embed_dim
        self.vdim = vdim if vdim is not None else embed_dim
        packed = self.kdim == embed_dim and self.vdim == embed_dim
        self._qkv_same_embed_dim = packed
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads
        self.num_kv_heads = num_kv_heads
        self.window = window
        self.rope = rope
        kv_dim = self._kv_heads() * self.head_dim

        if packed:
            self.in_proj_weight = Parameter(torch.empty((embed_dim + 2 * kv_dim, embed_dim), **factory))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = Parameter(torch.empty((embed_dim, embed_dim), **factory))
            self.k_proj_weight = Parameter(torch.empty((kv_dim, self.kdim), **factory))
            self.v_proj_weight = Parameter(torch.empty((kv_dim, self.vdim), **factory))
            self.register_parameter("in_proj_weight", None)
        if bias:
            self.in_proj_bias = Parameter(torch.empty(embed_dim + 2 * kv_dim, **factory))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = NonDynamicallyQuantizableLinear(embed_dim, embed_dim, bias=bias, **factory)
        if add_bias_kv:
            self.bias_k = Parameter(torch.empty((1, 1, kv_dim), **factory))
            self.bias_v = Parameter(torch.empty((1, 1, kv_dim), **factory))
        else:
            self.bias_k = self.bias_v = None
        self.add_zero_attn = add_zero_attn
        self._reset_parameters()

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # A property wins over the instance's own entry, which stays for torch.nn's class (lect11ext.revert).
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, packed: bool) -> None:
        vars(self)["_qkv_same_embed_dim"] = packed

    def _reset_parameters(self) -> None:
        if self.q_proj_weight is None:
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            nn.init.xavier_uniform_(self.q_proj_weight)
            nn.init.xavier_uniform_(self.k_proj_weight)
            nn.init.xavier_uniform_(self.v_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.constant_(self.in_proj_bias, 0.0)
            nn.init.constant_(self.out_proj.bias, 0.0)
        if self.bias_k is not None:
            nn.init.xavier_normal_(self.bias_k)
        if self.bias_v is not None:
            nn.init.xavier_normal_(self.bias_v)

    def _kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``(output, weights)``; weights ``[N, L, S]``, or ``[N, H, L, S]`` without ``average_attn_weights``."""
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_type(name, x, TENSOR)
        if query.is_nested or key.is_nested or value.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
                                is_causal)  # fmt: skip
        batched = query.dim() == 3
        self._check(query, key, value)
        if not batched:
            arrange = one_sequence
        else:
            arrange = batch_first if self.batch_first else positions_first
        q, k, v = self._project(query, key, value, arrange)
        if self.rope:
            q, k = self._rotated(q), self._rotated(k)
        keys = k.size(2)
        k, v = self._appended(k, self.bias_k), self._appended(v, self.bias_v)

        hint = is_causal and attn_mask is not None
        if hint and key_padding_mask is None and not need_weights:
            check_attn_mask(attn_mask, q, keys)
            attn_mask = None
        elif hint:
            is_causal = False
        window, appended = self.window, k.size(2) - keys
        band: Window | None = None
        if appended and (window is not None or (is_causal and not hint)):
            left, right = window or (None, None)
            band, window = (left, 0 if is_causal else right), None
            is_causal = is_causal and hint
        mask = merged_masks(key_padding_mask, attn_mask, band, q, keys, appended, batched)
        dropout_p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "is_causal": bool(is_causal),
            "enable_gqa": self.num_kv_heads is not None,
            "window": window,
        }
        weights = None
        if need_weights:
            options["dropout_key"] = dropout_key_for(q, k.size(2), dropout_p, None, None)
            out, weights = attention_with_weights(q, k, v, mask, **options, average_heads=bool(average_attn_weights))
            weights = weights if batched else weights.squeeze(0)
        else:
            out = scaled_dot_product_attention(q, k, v, mask, **options)
        # [N, H, L, head_dim] lies in memory as [N, L, H, head_dim]: with the batch first this is a view. Else it is
        # copied here: of what is not dense and has a frozen weight, linear makes L small products.
        if batched and not self.batch_first:
            out = out.permute(2, 0, 1, 3).flatten(2).contiguous()
        else:
            out = out.transpose(1, 2).flatten(2)
            out = out if batched else out.squeeze(0)
        return linear(out, self.out_proj.weight, self.out_proj.bias), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        dims = (query.dim(), key.dim(), value.dim())
        if dims not in ((2, 2, 2), (3, 3, 3)):
            raise ValueError(
                "query, key and value must all be 3-D, or 2-D without a batch, but got "
                f"{dims[0]}-D, {dims[1]}-D and {dims[2]}-D"
            )
        for name, x, size in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.size(-1) != size:
                raise ValueError(f"{name} must have {size} columns, but got shape {list(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must have key's batch and positions, {list(key.shape[:-1])}, but got {list(value.shape[:-1])}"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.size(batch) != key.size(batch):
            raise ValueError(f"key must have query's batch, {query.size(batch)}, but got {key.size(batch)}")

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, arrange: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Arranged ``[…, heads, head_dim]``, with the heads in dimension 1; one product for what is one tensor."""
        heads, kv_heads = self.num_heads, self._kv_heads()
        bias = self.in_proj_bias

        def projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            x = linear(x, weight, bias)
            # Not −1 heads: of no elements it might be any number.
            return arrange(torch.unflatten(x, -1, (weight.size(0) // self.head_dim, self.head_dim)))

        if self.q_proj_weight is None:
            weight, rows = self.in_proj_weight, self.embed_dim
            if query is key and key is value:
                q, k, v = projected(query, weight, bias).split_with_sizes([heads, kv_heads, kv_heads], 1)
                return q, k, v
            if key is value:
                q = projected(query, weight[:rows], None if bias is None else bias[:rows])
                both = projected(key, weight[rows:], None if bias is None else bias[rows:])
                return q, both[:, :kv_heads], both[:, kv_heads:]
        sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        if self.q_proj_weight is None:
            weights = self.in_proj_weight.split(sizes)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.split(sizes)
        q, k, v = (projected(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _rotated(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is None:
            positions = torch.arange(x.size(-2), device=x.device)
        return rotate(x, positions, 10000.0 if self.rope is True else float(self.rope))

    def _appended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``[N, heads, S, head_dim]`` with the keys or values that ``add_bias_kv`` and ``add_zero_attn`` add."""
        if bias is not None:
            bias = bias.to(x.dtype).view(1, -1, 1, self.head_dim).expand(x.size(0), -1, -1, -1)
            x = torch.cat([x, bias], 2)
        return pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Sequences of several lengths, nested: projected and attended to one behind the other."""
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                raise ValueError(f"{name} must be None with nested tensors")
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("nested tensors do not go with add_bias_kv or add_zero_attn")
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.is_nested and x.dim() != 3:
                raise ValueError(f"{name} must be 3-D ([N, j, E]) where it is nested, but got {x.dim()}-D")
        strided = query.layout == torch.strided
        given = {id(x): x for x in (query, key, value)}
        flat = {i: jagged_parts("query, key and value", x) for i, x in given.items()}
        (x_q, starts_q), (x_k, starts_k), (x_v, starts_v) = (flat[id(x)] for x in (query, key, value))
        check_sequences(starts_q, starts_k, starts_v)
        self._check(x_q, x_k, x_v)
        q, k, v = self._project(x_q, x_k, x_v, lambda x: x)
        if self.rope:
            q, k = (
                self._rotated(x.transpose(0, 1), positions_of(starts, x.size(0))).transpose(0, 1)
                for x, starts in ((q, starts_q), (k, starts_k))
            )
        options: dict[str, Any] = {
            "is_causal": bool(is_causal),
            "enable_gqa": self.num_kv_heads is not None,
            "window": self.window,
        }
        out, lse = varlen_attention(
            q, k, v, starts_q, starts_k, self.dropout if self.training else 0.0, return_lse=True, **options
        )
        out = linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)
        weights = None
        if need_weights:
            q, seen_q = padded(q, starts_q)
            k, seen_k = padded(k, starts_k)
            lse = padded(lse.transpose(0, 1), starts_q)[0].masked_fill(~seen_q[..., None], -float("inf"))
            weights = attention_weights(
                q.transpose(1, 2), k.transpose(1, 2), lse.transpose(1, 2), seen_k[:, None, None],
                average_heads=bool(average_attn_weights), **options,
            )  # fmt: skip
        if strided:
            return torch.nested.as_nested_tensor(list(out.split(starts_q.diff().tolist()))), weights
        return torch.nested.nested_tensor_from_jagged(out, starts_q), weights

    def extra_repr(self) -> str:
        options = {
            "dropout": (self.dropout, 0.0),
            "bias": (self.in_proj_bias is not None, True),
            "add_bias_kv": (self.bias_k is not None, False),
            "add_zero_attn": (self.add_zero_attn, False),
            "kdim": (self.kdim, self.embed_dim),
            "vdim": (self.vdim, self.embed_dim),
            "batch_first": (self.batch_first, False),
            "num_kv_heads": (self.num_kv_heads, None),
            "window": (self.window, None),
            "rope": (self.rope, False),
        }
        given = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join([f"embed_dim={self.embed_dim}, num_heads={self.num_heads}", *given])
