"""The k-sparse autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._errors import TENSOR, check_sizes, check_type
from ...functional import sparse_decode, topk_code, topk_encode


class TopKAutoencoder(nn.Module):
    r"""A k-sparse autoencoder: an overcomplete code of which each row keeps its k largest activations.

    .. math::
        a = (x - \beta) W^\top + b, \quad (v, i) = \mathrm{top}_k(a), \quad
        \hat x = \sum_j \max(v_j, 0) \, D_{i_j} + \beta

    with the encoder's :math:`W` and :math:`b`, the dictionary :math:`D` and the pre-bias :math:`\beta`. The dense
    :math:`a` is formed once, to find the k; the backward works on the k alone
    (:func:`lect11ext.functional.topk_encode`), so that a training step costs about a third of the dense one's products.

    Args:
        in_features: size of the input, the columns of the dictionary.
        hidden_features: size of the code, the rows of the dictionary.
        k: activations kept in each row.
        bias: whether the encoder has a bias.
        activation: ``"relu"``, or ``"identity"`` to keep negative values.
        tied_init: whether atoms begin as the encoder's rows, else as a draw of their own. In either case with unit
            norm.

    Shape: ``[*, in_features]`` in; ``(reconstruction, values, indices)`` out, ``[*, in_features]`` and twice
    ``[*, k]``.

    Parameters: ``encoder.weight`` ``[hidden_features, in_features]`` and ``encoder.bias`` as torch.nn.Linear's,
    ``dictionary`` ``[hidden_features, in_features]``, ``pre_bias`` ``[in_features]``, zero at first.

    Source: Makhzani & Frey 2013, "k-Sparse Autoencoders"; Gao et al. 2024, "Scaling and evaluating sparse
    autoencoders".

    Example::

        >>> import torch, lect11ext
        >>> model = lect11ext.nn.TopKAutoencoder(16, 64, k=4)
        >>> reconstruction, values, indices = model(torch.randn(8, 16))
        >>> reconstruction.shape, values.shape, indices.shape
        (torch.Size([8, 16]), torch.Size([8, 4]), torch.Size([8, 4]))
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        k: int,
        *,
        bias: bool = True,
        activation: str = "relu",
        tied_init: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features=in_features, hidden_features=hidden_features, k=k)
        if not 1 <= k <= hidden_features:
            raise ValueError(f"k must be in [1, {hidden_features}], the hidden features, but got {k}")
        topk_code(torch.zeros(0, hidden_features, device="cpu"), k, activation=activation)  # checks
        self.k = k
        self.activation = activation
        self.tied_init = tied_init
        check_type("bias", bias, (bool,))
        check_type("tied_init", tied_init, (bool,))
        self.encoder = nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.dictionary = nn.Parameter(torch.empty_like(self.encoder.weight))
        self.pre_bias = nn.Parameter(self.encoder.weight.new_empty(in_features))
        self._reset_dictionary()

    def _reset_dictionary(self) -> None:
        with torch.no_grad():
            if self.tied_init:
                self.dictionary.copy_(self.encoder.weight)
            else:
                nn.init.normal_(self.dictionary)
            self.pre_bias.zero_()
        self.normalize_decoder_()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        self.encoder.reset_parameters()
        self._reset_dictionary()

    def normalize_decoder_(self) -> TopKAutoencoder:
        """Sets every atom to unit norm in place (one of zeros stays), as is done after a step; returns the module."""
        with torch.no_grad():
            norms = torch.linalg.vector_norm(self.dictionary, dim=1, keepdim=True)
            self.dictionary.div_(torch.where(norms > 0, norms, 1.0))
        return self

    def encode(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the code ``(values, indices)``."""
        check_type("input", input, TENSOR)
        if input.dim() == 0 or input.size(-1) != self.pre_bias.size(0):  # which would broadcast
            raise ValueError(f"input must have shape [*, {self.pre_bias.size(0)}], but got {list(input.shape)}")
        return topk_encode(
            input - self.pre_bias, self.encoder.weight, self.encoder.bias, k=self.k, activation=self.activation
        )

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        """Returns the reconstruction from a code."""
        return sparse_decode(values, indices, self.dictionary, self.pre_bias)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``(reconstruction, values, indices)``."""
        values, indices = self.encode(input)
        return self.decode(values, indices), values, indices

    def extra_repr(self) -> str:
        hidden_features, in_features = self.dictionary.shape
        return (
            f"in_features={in_features}, hidden_features={hidden_features}, k={self.k}, "
            f"activation={self.activation!r}, tied_init={self.tied_init}"
        )
