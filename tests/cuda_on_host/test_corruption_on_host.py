"""The corruptions of denoising autoencoders against the reference; what is replaced, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from host_kernels import Kernels, Output, assert_near, make_views
from torch import Tensor

from lect11ext import reference

KEY = torch.tensor([987654321, 2**32 - 2])  # the blocks cross 2^32
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(1,), (3, 7), (34, 30), (2, 64), (300, 2), (1, 1024), (3, 1025), (5, 4, 36)]


def drawn(*size: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*size, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)


def common(x: Tensor, out: Output) -> dict[str, Any]:
    shape, (view,) = make_views(x.shape, x)
    return dict(shape=shape, input=view, key=KEY, out=out, streams=False)


def check_drift(kernels: Kernels, x: Tensor, deviation: float, shift: int = 0) -> None:
    out = Output(*x.shape, dtype=x.dtype, shift=shift)
    kernels.corruption_drift(**common(x, out), deviation=deviation)
    compute = torch.promote_types(x.dtype, F32)
    noise = reference.philox_normal(x.shape, KEY, dtype=compute, exact=True)
    expected = reference.corrupt(x.double(), "gaussian", deviation, noise=noise)
    assert isinstance(expected, Tensor)
    assert_near(out.checked(), expected, units=2, atol=deviation * (1e-14 if compute == F64 else 4e-6))


def replace(
    kernels: Kernels, x: Tensor, kind: str, amount: float, low: float, high: float, shift: int = 0, mask: bool = True
) -> tuple[Tensor, Tensor]:
    band, sentinel = 64, 77
    out = Output(*x.shape, dtype=x.dtype, shift=shift)
    bytes_ = torch.full((x.numel() + 2 * band + shift,), sentinel, dtype=torch.uint8)
    begin, end = band + shift, band + shift + x.numel()
    threshold = round(amount * 2**32)
    kernels.corruption_replace(
        **common(x, out), last=threshold - 1, pepper=threshold // 2 if kind == "salt_and_pepper" else 0,
        low=low, high=high, mask=bytes_[begin:] if mask else None,
    )  # fmt: skip
    assert (bytes_[:begin] == sentinel).all() and (bytes_[end:] == sentinel).all()
    written = bytes_[begin:end].view(x.shape)
    assert not mask or (written <= 1).all()
    return out.checked(), written.bool()


def check_replace(kernels: Kernels, x: Tensor, kind: str, amount: float, shift: int = 0) -> None:
    low, high = (0.0, 0.0) if kind == "masking" else (2.7, -1.3)
    expected = reference.corrupt(x, kind, amount, low=low, high=high, key=KEY, return_mask=True)
    for mask in (True, False):
        got = replace(kernels, x, kind, amount, low, high, shift, mask)
        assert torch.equal(got[0], expected[0])
        assert not mask or torch.equal(got[1], expected[1])


def check_all(kernels: Kernels, x: Tensor, shift: int = 0) -> None:
    check_drift(kernels, x, 0.7, shift)
    check_replace(kernels, x, "masking", 0.3, shift)
    check_replace(kernels, x, "salt_and_pepper", 0.6, shift)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_sizes_and_types(kernels: Kernels, size: tuple[int, ...], dtype: torch.dtype) -> None:
    check_all(kernels, drawn(*size, dtype=dtype))


STRIDED = {
    "half of a matrix": lambda t: drawn(12, 40, dtype=t)[:, 20:],
    "unaligned half": lambda t: drawn(12, 40, dtype=t)[:, 1:17],
    "rows of odd length apart": lambda t: drawn(6, 19, dtype=t)[:, :16],
    "transposed": lambda t: drawn(9, 33, dtype=t).t(),
    "transposed in front": lambda t: drawn(3, 5, 24, dtype=t).transpose(0, 1),
    "one row for all": lambda t: drawn(1, 40, dtype=t).expand(6, 40),
    "one column for all": lambda t: drawn(6, 1, dtype=t).expand(6, 40),
    "one value for all": lambda t: drawn(1, dtype=t).expand(7, 8),
    "channels last": lambda t: drawn(2, 4, 3, 5, dtype=t).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_strided_views(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    check_all(kernels, STRIDED[name](dtype))


@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_unaligned_outputs(kernels: Kernels, shift: int, dtype: torch.dtype) -> None:
    check_all(kernels, drawn(5, 24, dtype=dtype), shift)


@pytest.mark.parametrize("kind", ["masking", "salt_and_pepper"])
@pytest.mark.parametrize("amount", [2.0**-32, 0.5, 1 - 2.0**-32, 1.0])
def test_amounts_up_to_1(kernels: Kernels, kind: str, amount: float) -> None:
    x = drawn(40, 50)
    check_replace(kernels, x, kind, amount)
    if amount == 1:
        assert replace(kernels, x, kind, amount, 0.0, 0.0)[1].all()


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_nan_and_infinity(kernels: Kernels, dtype: torch.dtype) -> None:
    """They survive where they are kept and do not show where they are replaced; salt may be either."""
    for special in (math.nan, math.inf, -math.inf):
        x = torch.full((40, 10), special, dtype=dtype)
        out, mask = replace(kernels, x, "masking", 0.5, 0.0, 0.0)
        assert torch.equal(out == 0, mask) and torch.equal(out.isfinite(), mask) and mask.any()
        out, mask = replace(kernels, torch.zeros_like(x), "salt_and_pepper", 0.5, special, special)
        assert torch.equal(out.isfinite(), ~mask)
    x = drawn(4, 10, dtype=dtype)
    x[1, 3], x[2, 2] = math.nan, math.inf
    check_drift(kernels, x, 0.3)


def test_nothing_to_do(kernels: Kernels) -> None:
    out = Output(0, dtype=F32)
    x = torch.empty(3, 0)
    kernels.corruption_drift(**common(x, out), deviation=1.0)
    kernels.corruption_replace(**common(x, out), last=5, pepper=0, low=0.0, high=0.0)
    out.checked()
