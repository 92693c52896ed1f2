"""Attention over a sequence of which every process has a part: keys and values go round, queries stay.

Each process has the queries, keys and values of its part. In n steps every part of the keys visits every process;
what is seen of it is merged into the result by the log-sum-exp. The backward goes round once more, with the gradients
of keys and values beside them, and gives each step the whole rows' output and LSE, so that no probability is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._errors import TENSOR, check_finite, check_type
from ..functional._dispatch import is_autocast
from ..functional.attention import merge_attention

_LAYOUTS = ("contiguous", "zigzag")


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    layout: str = "contiguous",
    return_lse: bool = False,
) -> Any:
    """Attention over the whole sequence, for the queries of this process's part of it.

    Every process of the group calls it, with parts of equal shape; :func:`shard_sequence` makes them. What is computed
    stands in :func:`lect11ext.functional.scaled_dot_product_attention`. Memory and traffic are linear in the parts'
    length: a part of keys and values is sent on while attention to it is computed, 2n parts in the forward of n
    processes, and in the backward their gradients too, in float32 (float64 for float64).

    Args:
        query: ``[B, H, L, D]``, this process's queries.
        key, value: ``[B, H, S, D]`` and ``[B, H, S, Dv]``, of this process's part.
        group: the processes, in the order of their parts; None for all.
        is_causal: query i of the whole sequence sees keys j ≤ i of the whole sequence; then S = L.
        scale, enable_gqa: as there.
        layout: ``"contiguous"``: rank r of n has part r of n. ``"zigzag"``: it has parts r and 2n − 1 − r of 2n, one
            behind the other, so that causal work is the same for all; contiguously the last process has the most,
            and sets the time.
        return_lse: whether the log-sum-exp is returned too.

    Returns:
        ``[B, H, L, Dv]`` in the query's type (autocast's, under it), with ``return_lse`` ``(output, lse)``, lse
        ``[B, H, L]``, of this process's queries.

    Gradients: to query, key and value, through output and LSE, but not twice; in the backward all processes of the
        group must take part. Parts are merged and gradients summed in float32 (float64 for float64), in an order that
        does not change from run to run.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: Liu et al. 2023 (ring attention); Brandon et al. 2023 (balance of causal work).

    Example::

        >>> import torch, torch.distributed as dist
        >>> from lect11ext.integrations.distributed import gather_sequence, ring_attention, shard_sequence
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's are more
        >>> query, key, value = torch.randn(3, 1, 2, 8, 16)
        >>> part = [shard_sequence(x, layout="zigzag") for x in (query, key, value)]
        >>> out = ring_attention(*part, is_causal=True, layout="zigzag")
        >>> gather_sequence(out, layout="zigzag").shape
        torch.Size([1, 2, 8, 16])
        >>> dist.destroy_process_group()
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_type(name, x, TENSOR)
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, positions, columns], but got shape {list(x.shape)}")
    check_type("is_causal", is_causal, (bool,))
    check_type("enable_gqa", enable_gqa, (bool,))
    check_type("return_lse", return_lse, (bool,))
    if scale is not None:
        check_finite("scale", scale)
    _check_layout(layout)
    if not enable_gqa and key.size(1) != query.size(1):
        raise ValueError(
            f"key must have as many heads as query, {query.size(1)}, without enable_gqa, but got {key.size(1)}"
        )
    if is_causal and key.size(2) != query.size(2):
        raise ValueError(
            f"key must have as many positions as query, {query.size(2)}, with is_causal, but got {key.size(2)}"
        )
    if is_causal and layout == "zigzag" and query.size(2) % 2:
        raise ValueError(f"query must have an even number of positions with layout 'zigzag', but got {query.size(2)}")
    # Here, since the backward runs outside of autocast.
    query, key, value = (_to_autocast_type(x) for x in (query, key, value))
    ring = _Ring(group, is_causal, layout == "zigzag", None if scale is None else float(scale))
    output, lse = _RingAttention.apply(query, key, value, ring)
    return (output, lse) if return_lse else output


def shard_sequence(
    x: Tensor, dim: int = -2, group: dist.ProcessGroup | None = None, *, layout: str = "contiguous"
) -> Tensor:
    """This process's part of a tensor that every process has, for :func:`ring_attention`: a differentiable view or
    copy.

    Args:
        x: any tensor, the same in all processes.
        dim: of the sequence, whose length must be a multiple of the processes; of twice as many with ``"zigzag"``.
        group: the processes; None for all.
        layout: as in :func:`ring_attention`.

    Example, of the first of two processes; there is one in :func:`ring_attention` that runs in one::

        shard_sequence(torch.arange(8), 0, layout="zigzag")  # tensor([0, 1, 6, 7])
    """
    check_type("x", x, TENSOR)
    _check_layout(layout)
    rank, size = _place(group)
    parts = size * (2 if layout == "zigzag" else 1)
    if x.size(dim) % parts:
        raise ValueError(f"x must have a multiple of {parts} positions along dim {dim}, but got shape {list(x.shape)}")
    chunks = x.tensor_split(parts, dim)
    return torch.cat([chunks[rank], chunks[-1 - rank]], dim) if layout == "zigzag" else chunks[rank]


def gather_sequence(
    x: Tensor, dim: int = -2, group: dist.ProcessGroup | None = None, *, layout: str = "contiguous"
) -> Tensor:
    """The whole of what :func:`shard_sequence` took apart, in every process. Without gradient.

    Args:
        x, dim, group, layout: the parts, and what :func:`shard_sequence` was given. An example stands in
            :func:`ring_attention`.
    """
    check_type("x", x, TENSOR)
    _check_layout(layout)
    x = x.detach().contiguous()
    parts = [torch.empty_like(x) for _ in range(_place(group)[1])]
    dist.all_gather(parts, x, group=group)
    if layout == "zigzag":
        halves = [part.tensor_split(2, dim) for part in parts]
        parts = [first for first, _ in halves] + [second for _, second in reversed(halves)]
    return torch.cat(parts, dim)


def _to_autocast_type(x: Tensor) -> Tensor:
    """As the ops do it: of the type that autocast wants, if it is on, unless x is of float64."""
    if not is_autocast(x) or x.dtype == torch.float64 or not x.is_floating_point():
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check_layout(layout: str) -> None:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be 'contiguous' or 'zigzag', but got {layout!r}")


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank in the group, and how many there are."""
    if not dist.is_initialized():
        raise ValueError("group must be a process group, but torch.distributed is not initialized")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group must have this process in it, but has not")
    return rank, dist.get_world_size(group)


class _Seen(NamedTuple):
    """What this process's queries see of the keys of another's part; rows and keys as slices."""

    rows: slice
    keys: slice
    causal: bool


_ALL = slice(None)


class _Ring:
    """The processes, and who sees what of whom."""

    def __init__(self, group: dist.ProcessGroup | None, is_causal: bool, zigzag: bool, scale: float | None) -> None:
        self.group, self.is_causal, self.zigzag, self.scale = group, is_causal, zigzag, scale
        self.rank, self.size = _place(group)

    def seen(self, owner: int, positions: int) -> _Seen | None:
        """Of the part of rank ``owner``; None for nothing."""
        if not self.is_causal or owner == self.rank:
            return _Seen(_ALL, _ALL, self.is_causal)
        if not self.zigzag:
            return _Seen(_ALL, _ALL, False) if owner < self.rank else None
        half = positions // 2
        # An earlier rank's first half lies before all of ours, its second behind; a later one's lie between our halves.
        return _Seen(_ALL, slice(half), False) if owner < self.rank else _Seen(slice(half, None), _ALL, False)

    def pass_on(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Sends to the next, receives from the previous; what comes is there once the requests are waited for."""
        if self.size == 1:
            return tensors, []
        came = [torch.empty_like(x) for x in tensors]
        group = self.group if self.group is not None else dist.group.WORLD
        assert group is not None
        following, previous = (dist.get_global_rank(group, (self.rank + d) % self.size) for d in (1, -1))
        ops = [dist.P2POp(dist.isend, x, following, group) for x in tensors]
        ops += [dist.P2POp(dist.irecv, x, previous, group) for x in came]
        return came, dist.batch_isend_irecv(ops)


def _options(ring: _Ring, seen: _Seen) -> tuple[Any, ...]:
    """attn_mask to softcap, as the ops take them."""
    return None, None, None, None, None, 0.0, ring.scale, None, 0 if seen.causal else None, False, None


def _wait(requests: list[Any]) -> None:
    for request in requests:
        request.wait()


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
        # As they are sent. What is sent must not change before it is there: in the first step it is the caller's own.
        part = [key.contiguous(), value.contiguous()]
        compute = torch.float64 if query.dtype == torch.float64 else torch.float32
        output = query.new_zeros(*query.shape[:-1], value.size(-1), dtype=compute)
        lse = query.new_full(query.shape[:-1], -torch.inf, dtype=compute)
        for step in range(ring.size):
            coming, requests = ring.pass_on(part) if step + 1 < ring.size else (part, [])
            seen = ring.seen((ring.rank - step) % ring.size, key.size(2))
            if seen is not None:
                k, v = (x[:, :, seen.keys] for x in part)
                new = torch.ops.lect11ext.attention(query[:, :, seen.rows], k, v, *_options(ring, seen))
                rows = (output[:, :, seen.rows], lse[:, :, seen.rows])
                for all_rows, merged in zip(rows, merge_attention(*rows, *new), strict=True):
                    all_rows.copy_(merged)
            _wait(requests)
            part = coming
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        ring = ctx.ring
        if grad_output is None and grad_lse is None:  # this process's result is not used, but others wait for it
            grad_output = torch.zeros_like(output)
        part = [key.contiguous(), value.contiguous()]
        grad_query, *grads = (torch.zeros_like(x, dtype=lse.dtype) for x in (query, *part))
        for step in range(ring.size):
            coming, requests = ring.pass_on(part) if step + 1 < ring.size else (part, [])
            seen = ring.seen((ring.rank - step) % ring.size, key.size(2))
            if seen is not None:
                of_rows = [None if x is None else x[:, :, seen.rows] for x in (grad_output, grad_lse, query)]
                of_keys = [x[:, :, seen.keys] for x in part]
                new = torch.ops.lect11ext.attention_backward(
                    *of_rows, *of_keys, *_options(ring, seen), output[:, :, seen.rows], lse[:, :, seen.rows],
                    (True, True, True, False),
                )  # fmt: skip
                grad_query[:, :, seen.rows] += new[0]
                for grad, g in zip(grads, new[1:3], strict=True):
                    grad[:, :, seen.keys] += g
            # The gradients go with their keys, and one step further: home.
            grads, more = ring.pass_on(grads)
            _wait([*requests, *more])
            part = coming
        return grad_query.to(query.dtype), grads[0].to(key.dtype), grads[1].to(value.dtype), None
