"""lect11ext's attention under the programs that people already have. Nothing here is active until it is called.

* :func:`sdpa`: under ``torch.nn.functional.scaled_dot_product_attention``, within a ``with`` block.
* :func:`flash`: as an implementation that ``torch.nn.attention.activate_flash_attention_impl`` can activate.
* :func:`transformers`: as ``attn_implementation="lect11ext"`` of Hugging Face transformers.
* :mod:`lect11ext.integrations.distributed`: sharding rules for DTensor, and ring attention. It is imported by its own
  name, since it imports ``torch.distributed``.
"""

from ._flash import flash
from ._sdpa import sdpa
from ._transformers import transformers

__all__ = ["flash", "sdpa", "transformers"]
