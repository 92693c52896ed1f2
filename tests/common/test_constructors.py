"""Arguments of constructors and functions that are of no use are refused by name, beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lect11ext import functional as F
from lect11ext import nn

X, KEY = torch.ones(1, 2, 4, 8), torch.tensor([7, 0])
GRU = (torch.ones(2, 3), torch.ones(2, 4), torch.ones(12, 3), torch.ones(12, 4))

CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.LSTM(5, 4, num_layers=None), TypeError, "num_layers must be an int, but got NoneType"),
    (lambda: nn.GRU(5, 4, num_layers=10**30), ValueError, "num_layers must fit in 64 bits"),
    (lambda: nn.LSTM(5, 4, proj_size=None), TypeError, "proj_size must be an int, but got NoneType"),
    (lambda: nn.GRU(5, 4, dropout=None), TypeError, "dropout must be a float or an int, but got NoneType"),
    (lambda: nn.LSTM(5, 4, dropout="half"), TypeError, "dropout must be a float or an int, but got str"),
    (lambda: nn.LSTM(5, 4, bidirectional="no"), TypeError, "bidirectional must be a bool, but got str"),
    (lambda: nn.GRU(5, 2**63), ValueError, "hidden_size must fit in 64 bits"),
    (lambda: nn.LSTM(5, 4, dropout=1j), TypeError, "dropout must be a float or an int, but got complex"),
    (lambda: nn.LSTM(5, 4, dropout=10**400), ValueError, "dropout must fit in 64 bits"),
    (lambda: nn.LSTMCell(5, 4, bias="no"), TypeError, "bias must be a bool, but got str"),
    (lambda: nn.MultiheadAttention(8, 2, bias="no"), TypeError, "bias must be a bool, but got str"),
    (lambda: nn.MultiheadAttention(2**63, 2), ValueError, "embed_dim must fit in 64 bits"),
    (lambda: nn.TopKAutoencoder(4, 7, 2, tied_init="no"), TypeError, "tied_init must be a bool, but got str"),
    (lambda: nn.LSTM(5, 4, truncate=2**70), ValueError, "truncate must fit in 64 bits"),
    (lambda: nn.LSTMCell(5, -1), ValueError, "hidden_size must be nonnegative, but got -1"),
    (lambda: nn.GRUCell(2.5, 3), TypeError, "input_size must be an int, but got float"),
    (lambda: nn.GaussianLatent(5, -1), ValueError, "latent_features must be nonnegative, but got -1"),
    (lambda: nn.ConditionalGaussianLatent(-1, 3, 2), ValueError, "in_features must be nonnegative, but got -1"),
    (lambda: nn.ContractiveLinear(-1, 2), ValueError, "in_features must be nonnegative, but got -1"),
    (lambda: nn.TopKAutoencoder(-1, 7, 2), ValueError, "in_features must be nonnegative, but got -1"),
    (lambda: nn.TopKAutoencoder(4, 7, 2, bias="no"), TypeError, "bias must be a bool, but got str"),
    (lambda: nn.GaussianLatent(3, 2, bias="no"), TypeError, "bias must be a bool, but got str"),
    (lambda: nn.ConditionalGaussianLatent(3, 2, 2, bias="no"), TypeError, "bias must be a bool, but got str"),
    (lambda: nn.MultiheadAttention(8, 2, kdim=-1), ValueError, "kdim must be nonnegative, but got -1"),
    (lambda: nn.SparseActivation(target="a"), TypeError, "target must be a float or an int, but got str"),
    (lambda: F.gru_cell(*GRU, reset_after=None), TypeError, "reset_after must be a bool, but got NoneType"),
    (lambda: F.gru_cell(*GRU, reset_after=0.5), TypeError, "reset_after must be a bool, but got float"),
    (lambda: F.lstm_cell(X[0, 0, 0], (None, None), X, X), TypeError, "h must be a Tensor, but got NoneType"),
    (lambda: F.gru_cell(X[0, 0, 0], "h", X, X), TypeError, "h must be a Tensor, but got str"),
    (
        lambda: F.gru(X[0], None, [GRU[2:]], layer_norms=[(X, X)], reset_after=False),
        ValueError,
        "layer_norms must be None where reset_after is False",
    ),
    (
        lambda: F.lstm(
            X[0], (torch.ones(1, 4, 4),) * 2, [(torch.ones(16, 8), torch.ones(16, 4))], peepholes=[torch.ones(4, 4)]
        ),
        ValueError,
        r"peepholes\[0\] must have shape \[3, 4\] .* but got \[4, 4\]",
    ),
    (lambda: F.philox_key(X, 7.9), TypeError, "numel must be an int, but got float"),
    (lambda: F.philox_key(X, torch.tensor(7.9)), TypeError, "numel must be an int, but got Tensor"),
    (lambda: F.philox_normal((2**70,), KEY), ValueError, "size must fit in 64 bits"),
    (
        lambda: F.scaled_dot_product_attention(X, X, X, return_lse="no"),
        TypeError,
        "return_lse must be a bool, but got str",
    ),
    (lambda: F.kernel_attention(X, X, X, 1.0, return_lse=1), TypeError, "return_lse must be a bool, but got int"),
    (
        lambda: F.varlen_attention(X[0], X[0], X[0], torch.tensor([0, 2]), torch.tensor([0, 2]), return_lse=None),
        TypeError,
        "return_lse must be a bool, but got NoneType",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_what_is_of_no_use_is_named(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
