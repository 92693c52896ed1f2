"""Attention over several processes: sharding rules for DTensor, and a ring over which keys and values travel.

:func:`register_sharding` is for tensor parallelism (heads) and data parallelism (batch), :func:`ring_attention` for
sequences that are too long for one device. Importing this changes nothing.
"""

from ._ring import gather_sequence, ring_attention, shard_sequence
from ._sharding import register_sharding

__all__ = ["gather_sequence", "register_sharding", "ring_attention", "shard_sequence"]
