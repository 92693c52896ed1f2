"""Gaussian sampling and its KL, forward and backward, against float64 PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from host_kernels import Kernels, Output, RowTiles, assert_near, make_views
from torch import Tensor

from lect11ext import reference

KEY = torch.tensor([987654321, 2**32 - 2])
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Call:
    """The arguments of one call; `prior` is None or a pair."""

    mean: Tensor
    logvar: Tensor
    prior: tuple[Tensor, Tensor] | None = None
    samples: int = 1
    free_bits: float = 0.0
    limits: tuple[float, float] | None = None

    @property
    def inputs(self) -> list[Tensor]:
        return [self.mean, self.logvar, *(self.prior or ())]

    @property
    def size(self) -> torch.Size:
        return torch.broadcast_shapes(*(t.shape for t in self.inputs))

    @property
    def compute(self) -> torch.dtype:
        return F64 if F64 in {t.dtype for t in self.inputs} else F32

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.promote_types(self.mean.dtype, self.logvar.dtype)

    def fields(self) -> dict[str, Any]:
        """What forward and backward have in common."""
        shape, views = make_views(self.size, *self.inputs, *[None] * (4 - len(self.inputs)))
        low, high = self.limits or (0.0, 0.0)
        return dict(
            shape=shape, mean=views[0], logvar=views[1], prior_mean=views[2], prior_logvar=views[3],
            compute_double=self.compute == F64, key=KEY, samples=self.samples, free_bits=self.free_bits,
            clamps=self.limits is not None, low=low, high=high, streams=False,
        )  # fmt: skip

    def expected(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The inputs as float64 leaves of the whole size, z with the samples in front, and kl by element."""
        leaves = [t.double().expand(self.size).clone().requires_grad_() for t in self.inputs]
        noise = reference.philox_normal((self.samples, *self.size), KEY, dtype=self.compute, exact=True)
        # Bounds as the kernel has them, in the type of the arithmetic.
        limits = self.limits and tuple(torch.tensor(v, dtype=self.compute).item() for v in self.limits)
        prior = dict(zip(("prior_mean", "prior_logvar"), leaves[2:], strict=False))
        z, kl = reference.gaussian_rsample_kl(
            *leaves[:2], **prior, num_samples=self.samples, noise=noise, free_bits=self.free_bits,
            logvar_range=limits, reduction="none",
        )  # fmt: skip
        return leaves, z, kl


def tiles_for(kernels: Kernels, size: Sequence[int], summed: bool) -> RowTiles:
    numel = math.prod(size)
    return kernels.tiles(1, numel) if summed else kernels.tiles(numel // size[-1], size[-1])


def forward(kernels: Kernels, call: Call, reduction: str, shift: int = 0) -> tuple[Tensor, Tensor]:
    tiles = tiles_for(kernels, call.size, reduction == "sum")
    z = Output(call.samples, *call.size, dtype=call.out_dtype, shift=shift)
    elements = reduction == "none"
    sums = tiles.rows if tiles.tiles_per_row == 1 else tiles.count
    kl = Output(*(call.size if elements else [sums]), dtype=call.compute, shift=shift)
    kernels.gaussian_forward(**call.fields(), tiles=tiles, z=z, z_dtype=call.out_dtype, kl=kl, kl_elements=elements)
    result = kl.checked()
    if reduction == "sum_latent":
        result = result.view(tiles.rows, -1).sum(1).view(call.size[:-1])
    return z.checked(), result.sum() if reduction == "sum" else result


def check_forward(kernels: Kernels, call: Call, reduction: str = "sum_latent", shift: int = 0) -> None:
    _, z, kl = call.expected()
    got_z, got_kl = forward(kernels, call, reduction, shift)
    noise = 1e-14 if call.compute == F64 else 4e-6
    largest_scale = (call.logvar.double() / 2).exp().max().item()
    assert_near(got_z, z.detach(), units=2, atol=noise * max(1.0, largest_scale))
    expected = {"none": kl, "sum_latent": kl.sum(-1), "sum": kl.sum()}[reduction].detach()
    assert_near(got_kl, expected, units=20, atol=1e-15 if call.compute == F64 else 0)


def check_backward(
    kernels: Kernels,
    call: Call,
    *,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    asked: Sequence[bool] = (True, True, True, True),
    scale: float = 1.0,
    shift: int = 0,
) -> None:
    leaves, z, kl = call.expected()
    loss = 0 * (z.sum() + kl.sum())
    if grad_z is not None:
        loss = loss + (z * grad_z.double()).sum()
    if grad_kl is not None:
        loss = loss + (kl * (scale * grad_kl.double())).sum()
    expected = torch.autograd.grad(loss, leaves, materialize_grads=True)

    dtypes = [call.mean.dtype, call.logvar.dtype, call.compute, call.compute]
    names = ["grad_mean", "grad_logvar", "grad_prior_mean", "grad_prior_logvar"][: len(leaves)]
    outputs = {
        name: Output(*call.size, dtype=dtype, shift=shift)
        for name, dtype, wanted in zip(names, dtypes, asked, strict=False)
        if wanted
    }
    z_shape, (z_view,) = make_views((call.samples, *call.size), grad_z)
    # Over the common shape, whose dimensions the operands have merged.
    fields = call.fields()
    shape, views = make_views(call.size, *call.inputs, *[None] * (4 - len(leaves)), grad_kl)
    fields.update(shape=shape, mean=views[0], logvar=views[1], prior_mean=views[2], prior_logvar=views[3])
    kernels.gaussian_backward(
        **fields, tiles=tiles_for(kernels, call.size, False), grad_z_shape=z_shape, grad_z=z_view,
        grad_kl=views[4], grad_kl_scale=scale, grad_mean_dtype=dtypes[0], grad_logvar_dtype=dtypes[1],
        **outputs,
    )  # fmt: skip
    for name, wanted in zip(names, expected, strict=False):
        if name in outputs:
            magnitude = wanted.abs().max().item()
            atol = (1e-14 if call.compute == F64 else 4e-6) * max(magnitude, 1)
            assert_near(outputs[name].checked(), wanted, units=4, atol=atol)


def gaussian(*size: int, dtype: torch.dtype = F32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, *size, dtype=F64, generator=generator).to(dtype)
    return mean, logvar


def gradients(call: Call, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(99)
    grad_z = torch.randn(call.samples, *call.size, dtype=F64, generator=generator).to(dtype or call.out_dtype)
    per_row = torch.randn(*call.size[:-1], 1, dtype=F64, generator=generator).to(call.compute)
    return {"grad_z": grad_z, "grad_kl": per_row.expand(call.size)}


SIZES = [(1, 1), (3, 7), (34, 30), (2, 64), (300, 2), (150, 7), (1, 1024), (3, 1025), (2, 3000), (5, 4, 36)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_sizes_and_types(kernels: Kernels, size: tuple[int, ...], dtype: torch.dtype) -> None:
    call = Call(*gaussian(*size, dtype=dtype))
    for reduction in ("none", "sum_latent", "sum"):
        check_forward(kernels, call, reduction)
    check_backward(kernels, call, **gradients(call))


@pytest.mark.parametrize("size", [(3, 7), (6, 20), (2, 1028), (3, 1025)], ids=str)
@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_samples_and_a_prior(kernels: Kernels, size: tuple[int, ...], samples: int, dtype: torch.dtype) -> None:
    call = Call(*gaussian(*size, dtype=dtype), prior=gaussian(*size, dtype=dtype, seed=1), samples=samples)
    check_forward(kernels, call)
    check_forward(kernels, call, "none")
    check_backward(kernels, call, **gradients(call), scale=0.3)


def halves(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    mean, logvar = torch.cat(gaussian(12, 20, dtype=dtype), 1).chunk(2, 1)
    return mean, logvar


STRIDED = {
    "halves of one matrix": lambda: halves(F32),
    "halves of one bf16 matrix": lambda: halves(BF16),
    "unaligned halves": lambda: tuple(t[:, 1:17] for t in halves(F32)),
    "rows of odd length apart": lambda: tuple(t[:, :16] for t in gaussian(6, 19)),
    "transposed": lambda: tuple(t.t() for t in gaussian(9, 33)),
    "transposed in front": lambda: tuple(t.transpose(0, 1) for t in gaussian(3, 5, 24)),
    "one row for all": lambda: (gaussian(1, 40)[0], gaussian(6, 40)[1]),
    "one column for all": lambda: (gaussian(6, 40)[0], gaussian(6, 1)[1]),
    "channels last": lambda: tuple(t.permute(0, 3, 1, 2) for t in gaussian(2, 4, 3, 5)),
    "mixed types": lambda: (gaussian(7, 12)[0].half(), gaussian(7, 12)[1]),
    "mixed with double": lambda: (gaussian(7, 12)[0], gaussian(7, 12)[1].double()),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strided_views(kernels: Kernels, name: str) -> None:
    mean, logvar = STRIDED[name]()
    for call in (Call(mean, logvar), Call(mean, logvar, samples=3)):
        for reduction in ("none", "sum_latent", "sum"):
            check_forward(kernels, call, reduction)
        check_backward(kernels, call, **gradients(call))
        grads = gradients(call)
        grads["grad_z"] = grads["grad_z"].mT.contiguous().mT
        check_backward(kernels, call, **grads)


@pytest.mark.parametrize("prior_size", [(20,), (6, 1), (1, 1), (6, 20)], ids=str)
@pytest.mark.parametrize("prior_dtype", [F32, F64, BF16])
def test_priors(kernels: Kernels, prior_size: tuple[int, ...], prior_dtype: torch.dtype) -> None:
    for dtype in (F32, BF16):
        call = Call(*gaussian(6, 20, dtype=dtype), prior=gaussian(*prior_size, dtype=prior_dtype, seed=2))
        check_forward(kernels, call)
        check_backward(kernels, call, **gradients(call))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64, F16])
def test_free_bits_and_clamp(kernels: Kernels, prior: bool, dtype: torch.dtype) -> None:
    call = Call(
        *gaussian(9, 20, dtype=dtype),
        prior=gaussian(9, 20, dtype=dtype, seed=3) if prior else None,
        free_bits=0.4,
        limits=(-0.5, 0.75),
        samples=2,
    )
    for reduction in ("none", "sum_latent", "sum"):
        check_forward(kernels, call, reduction)
    check_backward(kernels, call, **gradients(call))
    check_backward(kernels, replace(call, free_bits=0.0), **gradients(call))
    check_backward(kernels, replace(call, limits=None), **gradients(call))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_unaligned_outputs(kernels: Kernels, shift: int) -> None:
    call = Call(*gaussian(5, 24), samples=2)
    check_forward(kernels, call, shift=shift)
    check_forward(kernels, call, "none", shift=shift)
    check_backward(kernels, call, **gradients(call), shift=shift)


@pytest.mark.parametrize("kind", ["neither", "z", "kl"])
@pytest.mark.parametrize("asked", range(16))
def test_undefined_gradients_and_null_outputs(kernels: Kernels, kind: str, asked: int) -> None:
    call = Call(*gaussian(5, 24), prior=gaussian(24, seed=4), samples=2)
    grads: dict[str, Tensor | None] = dict(gradients(call))
    if kind != "z":
        grads["grad_z"] = None
    if kind != "kl":
        grads["grad_kl"] = None
    check_backward(kernels, call, **grads, asked=[bool(asked >> i & 1) for i in range(4)])


def test_gradient_of_every_kl_element(kernels: Kernels) -> None:
    call = Call(*gaussian(6, 25))
    grads = gradients(call)
    for grad_kl in (torch.randn(6, 25), torch.randn(25, 6).t(), torch.ones(()).expand(6, 25)):
        check_backward(kernels, call, grad_z=grads["grad_z"], grad_kl=grad_kl, scale=-2.0)


def test_no_digits_are_lost_near_the_prior(kernels: Kernels) -> None:
    logvar = torch.cat([torch.logspace(-18, 1, 200), -torch.logspace(-18, 1, 200)]).view(4, 100)
    v = logvar.double()
    series = v.square() / 4 * (1 + v / 3 + v.square() / 12)  # float64 would lose digits there too
    expected = torch.where(v.abs() < 1e-3, series, (v.expm1() - v) / 2)
    for prior in (None, (torch.zeros(100), torch.zeros(100))):
        _, kl = forward(kernels, Call(torch.zeros(4, 100), logvar, prior=prior), "none")
        assert_near(kl, expected, units=4)


@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_nan_and_infinity_survive(kernels: Kernels, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0, 300.0, -300.0, 1e-40], dtype=dtype)
    mean, logvar = (t.flatten() for t in torch.meshgrid(special, special, indexing="ij"))
    for limits in (None, (-30.0, 20.0)):
        call = Call(mean.view(8, 8), logvar.view(8, 8), limits=limits)
        _, kl = forward(kernels, call, "none")
        expected = call.expected()[2].detach().to(call.compute)
        assert torch.equal(kl.isnan(), expected.isnan())
        assert torch.equal(kl.isinf(), expected.isinf())
        z, _ = forward(kernels, call, "sum_latent")
        assert z[0, mean.view(8, 8).isnan()].isnan().all() and z[0, logvar.view(8, 8).isnan()].isnan().all()


def test_the_tiling_does_not_change_the_noise(kernels: Kernels) -> None:
    mean, logvar = gaussian(6, 30)
    by_row, _ = forward(kernels, Call(mean, logvar), "sum_latent")
    flat, _ = forward(kernels, Call(mean.reshape(1, -1), logvar.reshape(1, -1)), "sum")
    assert torch.equal(by_row.view(-1), flat.view(-1))


def test_nothing_to_do(kernels: Kernels) -> None:
    call = Call(torch.empty(3, 0), torch.empty(3, 0))
    tiles = kernels.tiles(3, 0)
    out = Output(0, dtype=F32)
    kernels.gaussian_forward(**call.fields(), tiles=tiles, z=out, z_dtype=F32, kl=out, kl_elements=True)
    kernels.gaussian_backward(**call.fields(), tiles=tiles, grad_mean=out, grad_logvar=out)
    out.checked()
