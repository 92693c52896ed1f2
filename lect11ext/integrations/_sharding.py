"""Which shards of attention's operands make which shards of its results: DTensor's rules for the four ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard, experimental

_OPERANDS = 14  # the forward's arguments, which every op is given
_TENSORS = 8  # of which the first are tensors
Placements = list[Any]  # a placement of each result or argument, None where it is no tensor

_registered = False


def register_sharding() -> None:
    """Teaches DTensor attention and its derivatives: batch and heads may be sharded, LSE with them.

    After it :func:`lect11ext.functional.scaled_dot_product_attention`, its backward, tangent and double backward take
    DTensors. Sharded heads stay sharded (``Shard(1)``, tensor parallelism), and so does the batch (``Shard(0)``), on
    meshes of any rank; other placements are redistributed first. With grouped queries the heads of the keys must be a
    multiple of the shards, or they are gathered. A mask that broadcasts over what is sharded gets its gradient as
    ``Partial``. Sequences are not sharded here: :func:`ring_attention`. Calling it again changes nothing.

    Dropout needs ``dropout_key``, a DTensor too: every process draws the noise of its own shard, from 0 on, from the
    key that it holds. Give each its own (``DTensor.from_local(key, mesh, [Replicate()], run_check=False)``), or all
    shards drop alike.

    Example::

        >>> import torch, torch.distributed as dist, lect11ext.integrations.distributed
        >>> from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's are more
        >>> lect11ext.integrations.distributed.register_sharding()
        >>> mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        >>> query, key, value = (distribute_tensor(x, mesh, [Shard(1)]) for x in torch.randn(3, 1, 2, 5, 8))
        >>> lect11ext.functional.scaled_dot_product_attention(query, key, value).placements
        (Shard(dim=1),)
        >>> dist.destroy_process_group()
    """
    global _registered
    if _registered:
        return
    ops = torch.ops.lect11ext
    experimental.register_sharding(ops.attention.default)(_forward)
    experimental.register_sharding(ops.attention_backward.default)(_backward)
    experimental.register_sharding(ops.attention_tangent.default)(_tangent)
    experimental.register_sharding(ops.attention_backward_tangent.default)(_backward_tangent)
    experimental.register_sharding(ops.philox_key.default)(_key)
    _registered = True


def _key(*_: Any) -> Any:
    raise ValueError(
        "a DTensor has no random key that its processes share; where it is for attention's dropout, dropout_key must "
        "be given, a DTensor in which every process has the key of its own shard"
    )


def _forward(*args: Any) -> list[tuple[Placements, Placements]]:
    return [([like, like], _operands(args, like)) for like in _shards(args)]


def _backward(grad_output: Any, grad_lse: Any, *args: Any) -> list[tuple[Placements, Placements]]:
    operands, (output, lse, wanted) = args[:_OPERANDS], args[_OPERANDS:]
    return [
        (
            _gradients(operands, wanted, like),
            [*_all((grad_output, grad_lse), like), *_operands(operands, like), *_all((output, lse), like), None],
        )
        for like in _shards(operands)
    ]


def _tangent(*args: Any) -> list[tuple[Placements, Placements]]:
    operands, saved, (*tangents, mask_t) = args[:_OPERANDS], args[_OPERANDS : _OPERANDS + 2], args[_OPERANDS + 2 :]
    return [
        ([like, like], [*_operands(operands, like), *_all((*saved, *tangents), like), _mask(mask_t, like)])
        for like in _shards(operands)
    ]


def _backward_tangent(grad_output: Any, grad_lse: Any, *args: Any) -> list[tuple[Placements, Placements]]:
    operands, rest = args[:_OPERANDS], args[_OPERANDS:]
    *before, mask_t, output_t, lse_t, wanted = rest  # output, lse, grad_output_t, grad_lse_t, query_t, key_t, value_t
    return [
        (
            _gradients(operands, wanted, like),
            [
                *_all((grad_output, grad_lse), like),
                *_operands(operands, like),
                *_all(before, like),
                _mask(mask_t, like),
                *_all((output_t, lse_t), like),
                None,
            ],
        )
        for like in _shards(operands)
    ]


def _shards(operands: Sequence[Any]) -> list[Any]:
    """What query, key, value and the results may be."""
    query, key, cu_seqlens_q = operands[0], operands[1], operands[5]
    shards: list[Any] = [Replicate()]
    if cu_seqlens_q is None:
        shards.append(Shard(0))
    if query.shape[1] == key.shape[1] or _divides(key.shape[1], query.mesh.shape):
        shards.append(Shard(1))
    return shards


def _divides(heads: int, mesh: Sequence[int]) -> bool:
    """Whether every way to cut the keys' heads along a mesh gives equal chunks: only then do the heads of the queries
    that share one fall on its side. Chunks of less than a head DTensor makes of its own accord never."""
    ways = [math.prod(sizes) for n in range(1, len(mesh) + 1) for sizes in combinations(mesh, n)]
    return all(heads % shards == 0 for shards in ways if shards <= heads)


def _operands(operands: Sequence[Any], like: Any) -> Placements:
    query, key, value, mask, slopes, *others = operands[:_TENSORS]
    of_slopes = None
    if slopes is not None:  # [heads] or [batch, heads]
        dim = like.dim - 2 + len(slopes.shape) if isinstance(like, Shard) else -1
        of_slopes = Shard(dim) if dim >= 0 else Replicate()
    of_others = [None if x is None else Replicate() for x in others]  # starts, and dropout's key
    return [
        *_all((query, key, value), like),
        _mask(mask, like),
        of_slopes,
        *of_others,
        *[None] * (_OPERANDS - _TENSORS),
    ]


def _all(tensors: Sequence[Any], like: Any) -> Placements:
    return [None if x is None else like for x in tensors]


def _mask(mask: Any, like: Any) -> Any:
    if mask is None:
        return None
    return Replicate() if isinstance(like, Shard) and mask.shape[like.dim] == 1 else like


def _gradients(operands: Sequence[Any], wanted: Sequence[bool], like: Any) -> Placements:
    """Of query, key, value and mask; of a mask that broadcasts over what is sharded each shard has a part."""
    mask = operands[3]
    of_mask = None
    if mask is not None and wanted[3]:
        of_mask = Partial() if isinstance(like, Shard) and mask.shape[like.dim] == 1 else like
    return [*(like if w else None for w in wanted[:3]), of_mask]
