"""The code of semantic hashing, and an index of such codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..._errors import NUMBER, TENSOR, check_finite, check_type, plain
from ...functional import binarize, hamming_radius, hamming_topk, pack_bits, philox_normal

MOST_BYTES = 8191  # of a code that is searched


class BinaryCode(nn.Module):
    r"""A layer of codes that learns to be binary: a sigmoid with noise before it in training, a step afterwards.

    .. math::
        \text{training: } h = \sigma(a + s\,\varepsilon), \qquad \text{eval(): } h = [a > 0]

    Noise before the sigmoid drives the logits a to where the sigmoid is saturated, so that rounding the code, as
    ``eval()`` does, changes it little.

    Args:
        noise: the noise's standard deviation s; Salakhutdinov & Hinton take one that is large beside the weights, and
            the same noise for a row every time (a ``key`` for each batch, where a batch keeps its rows in order).
        straight_through: round the code in training too; its gradient is that of the sigmoid.

    Shape: ``[*, bits]`` in and out, in the input's type. In ``eval()`` the code is exactly 1 where the logit is above
    0, else 0, and its gradient is the sigmoid's too; NaN stays NaN.

    Source: Salakhutdinov & Hinton 2009.

    Example::

        >>> import torch, lect11ext
        >>> code = lect11ext.nn.BinaryCode(noise=4.0).eval()
        >>> code(torch.tensor([-1.0, 0.0, 3.0]))
        tensor([0., 0., 1.])
    """

    def __init__(self, noise: float = 0.0, straight_through: bool = False) -> None:
        super().__init__()
        check_finite("noise", noise, NUMBER)
        check_type("straight_through", straight_through, (bool,))
        if noise < 0:
            raise ValueError(f"noise must be nonnegative, but got {noise}")
        self.noise = plain(noise)
        self.straight_through = straight_through

    def forward(self, logits: Tensor, *, generator: torch.Generator | None = None, key: Tensor | None = None) -> Tensor:
        """Noise comes from torch.randn with ``generator``, or is ``philox_normal(logits.shape, key)``."""
        check_type("logits", logits, TENSOR)
        if not logits.is_floating_point():
            raise TypeError(f"logits must be of a floating-point type, but got {logits.dtype}")
        if not self.training:
            return self._step(logits)
        if self.noise > 0:
            if key is None:
                # torch.compile takes no generator, not even None.
                options: dict[str, Any] = {} if generator is None else {"generator": generator}
                draw = torch.randn(logits.shape, dtype=logits.dtype, device=logits.device, **options)
            else:
                draw = philox_normal(logits.shape, key, dtype=logits.dtype)
            logits = logits + self.noise * draw
        return self._step(logits) if self.straight_through else logits.sigmoid()

    @staticmethod
    def _step(logits: Tensor) -> Tensor:
        code = binarize(logits.sigmoid())
        # Of a logit just above zero the sigmoid is rounded to one half. The difference is 0 or 1, and the sum exact.
        return code + (binarize(logits, 0.0) - code).detach()

    def extra_repr(self) -> str:
        return f"noise={self.noise}, straight_through={self.straight_through}"


class HammingIndex(nn.Module):
    r"""Packed codes that are searched by Hamming distance, one after the other: exact, and fast up to some millions.

    Args:
        num_bits: of a code, at most 65528.

    Buffer: ``codes``, uint8 ``[len(index), ceil(num_bits / 8)]``. ``load_state_dict`` takes any number of codes.

    Codes are given packed (uint8, ``[n, ceil(num_bits / 8)]``, as :func:`lect11ext.functional.pack_bits` makes them;
    what stands behind the last bit does not count) or as values of any other type, ``[n, num_bits]``, whose bits are
    set where they are above one half.

    Source: Salakhutdinov & Hinton 2009.

    Example::

        >>> import torch, lect11ext
        >>> index = lect11ext.nn.HammingIndex(3)
        >>> index.add(torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
        >>> len(index)
        3
        >>> distances, indices = index.search(torch.tensor([[0.0, 1.0, 0.0]]), k=2)
        >>> distances.tolist(), indices.tolist()
        ([[1, 1]], [[0, 2]])
    """

    codes: Tensor

    def __init__(self, num_bits: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        check_type("num_bits", num_bits, (int,))
        if not 1 <= num_bits <= 8 * MOST_BYTES:
            raise ValueError(f"num_bits must be from 1 to {8 * MOST_BYTES}, but got {num_bits}")
        self.num_bits = num_bits
        self.register_buffer("codes", torch.empty(0, (num_bits + 7) // 8, dtype=torch.uint8, device=device))

    def add(self, codes: Tensor) -> None:
        """Appends codes; they get the next numbers. The whole index is copied: add many at once."""
        self.codes = torch.cat([self.codes, self._packed("codes", codes).to(self.codes.device)])

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest codes: ``(distances, indices)`` of :func:`lect11ext.functional.hamming_topk`."""
        return hamming_topk(self._packed("query", query), self.codes, k)

    def within(self, query: Tensor, radius: int) -> tuple[Tensor, Tensor, Tensor]:
        """All codes within a radius: ``(offsets, distances, indices)`` of
        :func:`lect11ext.functional.hamming_radius`."""
        return hamming_radius(self._packed("query", query), self.codes, radius)

    def __len__(self) -> int:
        return self.codes.size(0)

    def _packed(self, name: str, values: Tensor) -> Tensor:
        check_type(name, values, TENSOR)
        packed = values.dtype == torch.uint8
        columns = self.codes.size(1) if packed else self.num_bits
        if values.dim() != 2 or values.size(1) != columns:
            raise ValueError(
                f"{name} must have shape [n, {columns}] ({'packed codes' if packed else 'one value a bit'}), but got "
                f"{list(values.shape)}"
            )
        return self._without_spare_bits(values) if packed else pack_bits(values)

    def _without_spare_bits(self, codes: Tensor) -> Tensor:
        spare = -self.num_bits % 8
        if not spare:
            return codes
        return torch.cat([codes[:, :-1], codes[:, -1:] & (0xFF << spare & 0xFF)], 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes, metadata, errors = state_dict.get(prefix + "codes"), args[0], args[-1]
        before, count = self.codes, len(errors)
        if isinstance(codes, Tensor):
            if codes.dtype != torch.uint8:
                errors.append(f"codes must be uint8, but the checkpoint has {codes.dtype}.")
                return
            if codes.layout != torch.strided:
                errors.append(f"codes must be strided, but the checkpoint has {codes.layout}.")
                return
            wanted = (*codes.shape[:1], self.codes.size(1))
            is_assigned = metadata.get("assign_to_params_buffers", False)
            if codes.shape == wanted and (is_assigned or codes.is_meta == self.codes.is_meta):
                self.codes = self.codes.new_zeros(wanted)  # which is then filled, or exchanged
        super()._load_from_state_dict(state_dict, prefix, *args)
        if len(errors) > count:
            self.codes = before
        elif codes is not None:
            self.codes = self._without_spare_bits(self.codes)

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, codes={len(self)}"
