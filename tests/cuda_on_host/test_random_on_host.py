"""Keys and normals of the Philox stream."""

from __future__ import annotations

import pytest
import torch
from host_kernels import Kernels, Output, assert_near

from lect11ext import reference

KEYS = [(0, 0), (1234567890123456789, 5), (-1, 2**32 - 3), (42, -2)]  # the counter carries and wraps around


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 2, 3, 4, 7, 1000, 70001])  # the last: more than the grid has threads
def test_normals_are_the_stream(kernels: Kernels, key: tuple[int, int], dtype: torch.dtype, numel: int) -> None:
    key_tensor, out = torch.tensor(key), Output(numel, dtype=dtype)
    kernels.philox_normal(key=key_tensor, out=out, dtype=dtype, numel=numel)
    exact = reference.philox_normal((numel + numel % 2,), key_tensor, dtype=dtype, exact=True)
    if dtype == torch.float64:
        tolerance = torch.full_like(exact, 1e-14)
    else:
        # The uniform is rounded to 24 bits, which moves a radius near zero, √(−2 ln U) with U near one.
        radius = exact.view(-1, 2).norm(dim=1).repeat_interleave(2)
        tolerance = 2e-6 + 2.0**-24 / radius
    tolerance = tolerance + (0 if dtype.itemsize >= 4 else torch.finfo(dtype).eps / 2) * exact.abs()
    error = (out.checked().double() - exact[:numel]).abs()
    assert (error <= tolerance[:numel]).all()


def test_unaligned_output(kernels: Kernels) -> None:
    key = torch.tensor([3, 4])
    aligned, shifted = Output(103, dtype=torch.float32), Output(103, dtype=torch.float32, shift=1)
    for out in (aligned, shifted):
        kernels.philox_normal(key=key, out=out, dtype=torch.float32, numel=103)
    assert torch.equal(aligned.checked(), shifted.checked())


def test_nothing_to_draw(kernels: Kernels) -> None:
    out = Output(0, dtype=torch.float32)
    kernels.philox_normal(key=torch.tensor([0, 0]), out=out, dtype=torch.float32, numel=0)
    out.checked()


def test_key_of_values_and_of_pointers(kernels: Kernels) -> None:
    key = torch.zeros(2, dtype=torch.int64)
    kernels.philox_key(captured=False, seed=2**64 - 1, offset=44, key=key)
    assert key.tolist() == [-1, 11]
    seed, offset = torch.tensor([77]), torch.tensor([40])
    kernels.philox_key(captured=True, seed_ptr=seed, offset_ptr=offset, offset_intragraph=8, key=key)
    assert key.tolist() == [77, 12]


def test_zero_uniform_is_finite(kernels: Kernels) -> None:
    """A word of zero gives the largest radius, not infinity: U is at least 2^-33."""
    out = Output(4_000_000, dtype=torch.float32)
    kernels.philox_normal(key=torch.tensor([0, 0]), out=out, dtype=torch.float32, numel=4_000_000)
    normals = out.checked()
    assert normals.isfinite().all() and normals.abs().max() < 6.77
    assert_near(normals.double().std(), torch.tensor(1.0), units=0, atol=2e-3)
