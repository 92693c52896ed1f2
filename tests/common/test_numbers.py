"""NumPy's scalars are numbers wherever Python's are, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import lect11ext
from lect11ext import functional as F

X = torch.arange(48.0).view(6, 2, 4).sin()
KEY = torch.tensor([7, 0])


def attend(**options: Any) -> Any:
    return F.scaled_dot_product_attention(X, X, X, dropout_key=KEY, **options)


def layer(make: Callable[..., torch.nn.Module], **options: Any) -> Any:
    torch.manual_seed(0)
    module = make(4, 3, **options)
    return module(X, X, X)[0] if isinstance(module, lect11ext.nn.MultiheadAttention) else module(X)[0]


# Results must be those of Python's numbers to the bit.
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "attention": lambda rate, two: attend(dropout_p=rate, scale=rate, softcap=rate, window=(two, None)),
    "sdpa": lambda rate, two: attend(dropout_p=rate, scale=rate),
    "multihead": lambda rate, two: layer(
        lambda *_, **options: lect11ext.nn.MultiheadAttention(4, two, num_kv_heads=two, **options), dropout=rate
    ),
    "LSTM": lambda rate, two: layer(
        lect11ext.nn.LSTM,
        num_layers=2,
        dropout=rate,
        grad_clip=rate,
        zoneout=rate,
        recurrent_dropout=rate,
        truncate=two,
    ),
    "GRU": lambda rate, two: layer(lect11ext.nn.GRU, num_layers=2, dropout=rate, zoneout=rate, recompute=two),
    "corrupt": lambda rate, two: F.corrupt(X, "gaussian", rate, key=KEY),
    "gaussian_rsample_kl": lambda rate, two: F.gaussian_rsample_kl(
        X, X, num_samples=two, free_bits=rate, logvar_range=(-rate, rate), key=KEY
    ),
    "binary code": lambda rate, two: lect11ext.nn.BinaryCode(noise=rate)(X, key=KEY),
    "sparse_code": lambda rate, two: F.topk_code(X, two),
    "kl penalty": lambda rate, two: F.sparse_activation(X, penalty="kl", activation="sigmoid", target=rate),
}


def flat(x: Any) -> list[Any]:
    return [item for part in x for item in flat(part)] if isinstance(x, tuple) else [x]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("types", [(np.float16, np.int8), (np.float32, np.int64), (np.float64, np.uint16)])
def test_numbers_of_numpy(name: str, types: tuple[Any, Any]) -> None:
    number, integer = types
    rate = number(0.3)  # not Python's 0.3
    expected, got = CALLS[name](float(rate), 2), CALLS[name](rate, integer(2))
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize("name", CALLS)
def test_fractions_are_numbers_too(name: str) -> None:
    expected, got = CALLS[name](0.25, 2), CALLS[name](Fraction(1, 4), 2)
    for a, b in zip(flat(got), flat(expected), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize("options", [{"window": (np.float32(2), None)}, {"dropout_p": np.bool_(False)}])
def test_no_others(options: Any) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))}.* must be .*, but got "):
        attend(**options)
