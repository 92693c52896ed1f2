"""Attention over several processes: sharding rules for DTensor, and a ring over which keys and values travel.

:func:`register_sharding` is for tensor parallelism (heads) and data parallelism (batch), :func:`ring_attention` for
sequences that are too long for one device. Importing this changes nothing.

Once the rules are registered, DTensors are taken by ``scaled_dot_product_attention`` and what is made of it
(``varlen_attention``, ``kernel_attention``, ``nn.MultiheadAttention``), by ``attention_weights``, which is plain
PyTorch for them, and by ``merge_attention``, which always is. ``additive_attention``, the recurrent functions and
modules and ``gaussian_rsample_kl`` have no rules: give them what ``DTensor.to_local`` returns.
"""

from ._ring import gather_sequence, ring_attention, shard_sequence
from ._sharding import register_sharding

__all__ = ["gather_sequence", "register_sharding", "ring_attention", "shard_sequence"]
