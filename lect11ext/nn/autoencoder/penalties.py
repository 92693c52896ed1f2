"""Codes with a penalty: the layers of sparse and contractive autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._errors import check_sizes, check_type
from ...functional import contractive_linear, sparse_activation


class ContractiveLinear(nn.Linear):
    r"""A linear layer, its activation, and the squared norm of its Jacobian: the encoder of Rifai et al. 2011.

    .. math::
        h = \varphi(x W^\top + b), \qquad p_b = \lVert \partial h_b / \partial x_b \rVert_F^2

    Args:
        in_features, out_features, bias: as torch.nn.Linear's, and so are the parameters and their initialisation.
        activation: "identity", "relu", "sigmoid", "softplus" or "tanh".

    Shape: ``[*, in_features]`` in; ``(code, penalty)`` out, ``[*, out_features]`` and ``[*]``. A loss adds λ times the
    penalty's mean.

    Example::

        >>> import torch, lect11ext
        >>> code, penalty = lect11ext.nn.ContractiveLinear(16, 4)(torch.randn(8, 16))
        >>> code.shape, penalty.shape
        (torch.Size([8, 4]), torch.Size([8]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features)
        check_type("bias", bias, (bool,))  # activation comes next
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        contractive_linear(torch.zeros(0, 1, device="cpu"), torch.zeros(1, 1, device="cpu"), None, activation)  # checks

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Returns ``(code, penalty)``."""
        return contractive_linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class SparseActivation(nn.Module):
    r"""An activation that also returns what the code costs for not being sparse.

    Args:
        activation, penalty, target: as in :func:`lect11ext.functional.sparse_activation`.

    Shape: ``[*, units]`` in; ``(code, penalty)`` out, ``[*, units]`` and ``[*]`` for "l1", ``[]`` for "kl".

    Example::

        >>> import torch, lect11ext
        >>> code, penalty = lect11ext.nn.SparseActivation("sigmoid", penalty="kl")(torch.randn(8, 16))
        >>> code.shape, penalty.shape
        (torch.Size([8, 16]), torch.Size([]))
    """

    def __init__(self, activation: str = "relu", *, penalty: str = "l1", target: float = 0.05) -> None:
        super().__init__()
        self.activation, self.penalty, self.target = activation, penalty, target
        self(torch.zeros(0, 1, device="cpu"))  # checks

    def forward(self, input: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ``(code, penalty)``; ``scale`` weighs the units of the L1 penalty."""
        return sparse_activation(input, self.activation, penalty=self.penalty, scale=scale, target=self.target)

    def extra_repr(self) -> str:
        target = f", target={self.target}" if self.penalty == "kl" else ""
        return f"{self.activation!r}, penalty={self.penalty!r}{target}"
