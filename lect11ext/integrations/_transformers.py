"""lect11ext's attention among the attention implementations of Hugging Face transformers."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..functional._attention import dropout_key_for
from ..functional._attention_weights import attention_weights
from ..functional.attention import scaled_dot_product_attention

NAME = "lect11ext"


def transformers() -> str:
    """Registers ``attn_implementation="lect11ext"`` with Hugging Face transformers (5.24 or newer).

    Every model of transformers that goes through its attention interface then takes the name, at construction
    (``from_pretrained(…, attn_implementation="lect11ext")``, ``from_config``) or later
    (``model.set_attn_implementation("lect11ext")``). Calling it again changes nothing.

    What an implementation is asked for is fused: grouped queries without repeating keys, causality and padding, the
    learned position bias of T5 **with its gradient**, soft-capping (Gemma 2), attention sinks (GPT-OSS), dropout, and
    decoding from a cache. Rows of which every key is masked (left padding) give zero. Attention weights
    (``output_attentions=True`` in the call) come out of a second pass; a model that keeps the argument to itself, as
    GPT-2's does, gets none. Sliding windows and chunks come as a boolean mask, whose empty tiles are skipped, as
    transformers' own "sdpa" makes it.

    Returns:
        The name, ``"lect11ext"``.

    Raises:
        ImportError: where transformers is not installed.

    Example::

        >>> import torch, transformers, lect11ext.integrations
        >>> config = transformers.GPT2Config(
        ...     vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        ... )
        >>> name = lect11ext.integrations.transformers()
        >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name)
        >>> model(torch.arange(5)[None]).logits.shape
        torch.Size([1, 5, 64])
    """
    try:
        modeling, masking = import_module("transformers.modeling_utils"), import_module("transformers.masking_utils")
        functions, masks = modeling.AttentionInterface, masking.AttentionMaskInterface
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"transformers must be installed, 5.24 or newer, with its attention interface, but: {error}; "
            "pip install 'transformers>=5.24'"
        ) from error
    functions.register(NAME, _attention)
    masks.register(NAME, masking.sdpa_mask)  # a boolean mask, or None where is_causal says all
    return NAME


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As transformers calls an implementation: [B, H, L, D] in, [B, L, H, Dv] and the weights or None out."""
    queries, keys = query.size(2), key.size(2)
    # No mask means causal for a module that is causal, but for a single query, which is the last.
    causal = attention_mask is None and queries > 1
    causal = causal and bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if causal and keys > queries:  # a static cache, empty behind the queries; the mask begins in its upper left corner
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    mask = _joined(attention_mask, position_bias)
    want_weights, sinks = bool(kwargs.get("output_attentions")), s_aux is not None
    drop = dropout_key_for(query, key.size(2), dropout, None, None) if want_weights else None
    result = scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scaling, enable_gqa=True, softcap=softcap,
        return_lse=want_weights or sinks, dropout_key=drop,
    )  # fmt: skip
    if not (want_weights or sinks):
        return result.transpose(1, 2), None
    output, lse = result
    if s_aux is not None:  # a key more, with the score s_aux and the value 0
        sink = s_aux.to(lse.dtype).reshape(1, -1, 1)
        output = (output * torch.sigmoid(lse - sink)[..., None]).to(output.dtype)
        lse = torch.logaddexp(lse, sink)
    weights = None
    if want_weights:
        weights = attention_weights(
            query, key, lse, mask, dropout, causal, scaling, enable_gqa=True, softcap=softcap, average_heads=False,
            dropout_key=drop,
        )  # fmt: skip
        weights = pad(weights, (0, keys - weights.size(-1)))  # of the keys that were left out
    return output.transpose(1, 2), weights


def _joined(attention_mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    if position_bias is None or attention_mask is None:
        return attention_mask if position_bias is None else position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -math.inf)
    return position_bias + attention_mask
