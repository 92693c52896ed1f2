"""Additive attention, forward and backward, against float64 PyTorch."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from host_kernels import DTYPE_CODES, AdditiveBackward, Kernels, Matrices, Output, PairMask, Shape, assert_near
from torch import Tensor

from lect11ext import reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Call:
    """Operands of one call, of any batch shape and strides, and what the kernels make of them."""

    def __init__(self, *operands: Tensor, mask: Tensor | None = None) -> None:
        self.query, self.key, self.value, self.weight = operands
        self.mask, self.dtype = mask, self.query.dtype
        self.batch = torch.broadcast_shapes(*(t.shape[:-2] for t in operands[:3]))
        self.compute = F64 if self.dtype == F64 else F32
        self.pairs = (*self.batch, self.query.size(-2), self.key.size(-2))
        generator = torch.Generator().manual_seed(3)
        size = (*self.batch, self.query.size(-2), self.value.size(-1))
        self.grad = torch.randn(size, dtype=F64, generator=generator).to(self.dtype)

    def _matrices(self, tensor: Tensor) -> Matrices:
        wide = tensor.expand(*self.batch, *tensor.shape[-2:])
        out = Matrices(tensor.data_ptr(), tensor.stride(-2))
        out.strides[: len(self.batch)] = wide.stride()[:-2]
        return out

    def fields(self) -> dict[str, Any]:
        sizes = list(self.batch) or [1]
        fields: dict[str, Any] = dict(
            queries=self.pairs[-2], keys=self.pairs[-1], hidden=self.weight.numel(), columns=self.value.size(-1),
            dtype=self.dtype, batches=Shape(math.prod(sizes), len(sizes), (ctypes.c_int64 * 8)(*sizes)),
            query=self._matrices(self.query), key=self._matrices(self.key), value=self._matrices(self.value),
            score_weight=self.weight,
        )  # fmt: skip
        if self.mask is not None:
            wide = self.mask.expand(self.pairs)
            boolean = self.mask.dtype == torch.bool
            code = 0 if boolean else DTYPE_CODES[self.mask.dtype]
            mask = PairMask(1 if boolean else 2, code, self.mask.data_ptr(), wide.stride(-2), wide.stride(-1))
            mask.strides[: len(self.batch)] = wide.stride()[:-2]
            fields["mask"] = mask
        return fields

    def leaves(self) -> list[Tensor]:
        given = [self.query, self.key, self.value, self.weight]
        if self.mask is not None:
            given.append(self.mask)
        return [t if t.dtype == torch.bool else t.detach().double().requires_grad_() for t in given]

    def forward(self, kernels: Kernels) -> tuple[Tensor, Tensor]:
        weights, output = Output(*self.pairs, dtype=self.compute), Output(*self.grad.shape, dtype=self.dtype)
        kernels.additive_forward(**self.fields(), weights=weights, output=output)
        return weights.checked(), output.checked()

    def backward(self, kernels: Kernels, weights: Tensor, asked: str = "qkvw") -> dict[str, Tensor]:
        rows = kernels.library.additive_weight_rows
        rows.restype = ctypes.c_int64
        plain = {k: DTYPE_CODES[v] if isinstance(v, torch.dtype) else v for k, v in self.fields().items()}
        plain["score_weight"] = self.weight.data_ptr()
        count = rows(ctypes.byref(AdditiveBackward(**plain)))
        L, S = self.pairs[-2:]
        H, D = self.weight.numel(), self.value.size(-1)
        sizes = {"query": (L, H), "key": (S, H), "value": (S, D)}
        outputs = {
            f"grad_{name}": Output(*self.batch, *size, dtype=self.dtype)
            for name, size in sizes.items()
            if name[0] in asked
        }
        if "w" in asked:
            outputs["grad_score_weight"] = Output(count, H, dtype=self.compute)
        outputs["grad_scores"] = Output(*self.pairs, dtype=self.compute)
        codes = {f"grad_{name}_dtype": self.dtype for name in sizes}
        kernels.additive_backward(
            **self.fields(), **codes, **outputs, parts=1, part_rows=1, weights=weights,
            grad_output=self._matrices(self.grad),
        )  # fmt: skip
        return {name: out.checked() for name, out in outputs.items()}

    def check(self, kernels: Kernels, asked: str = "qkvw") -> None:
        leaves = self.leaves()
        expected = reference.additive_attention(*leaves)
        weights, output = self.forward(kernels)
        relative = 1e-12 if self.dtype == F64 else 4e-6
        assert_near(output, expected.detach(), units=2, atol=relative * max(1.0, expected.abs().max().item()))
        got = self.backward(kernels, weights, asked)
        # Gradients before they are summed over what was broadcast.
        wide = [t.detach().expand(*self.batch, *t.shape[-2:]).requires_grad_() for t in leaves[:3]]
        bias = torch.zeros(self.pairs, dtype=F64, requires_grad=True)
        mask = leaves[4] if self.mask is not None else None
        score = (
            bias if mask is None else (mask + bias if mask.dtype != torch.bool else bias.masked_fill(~mask, -torch.inf))
        )
        out = reference.additive_attention(*wide, leaves[3], score)
        grads = torch.autograd.grad(out, [*wide, leaves[3], bias], self.grad.double())
        names = ["grad_query", "grad_key", "grad_value", "grad_score_weight", "grad_scores"]
        for name, want in zip(names, grads, strict=True):
            if name not in got:
                continue
            value = got[name].double().sum(0).to(self.compute) if name == "grad_score_weight" else got[name]
            terms = self.grad.double().abs().max().item() * max(1.0, self.weight.double().abs().max().item())
            assert_near(value, want, units=4, atol=relative * max(terms, want.abs().max().item()))


def operands(*sizes: int, batch: tuple[int, ...] = (), dtype: torch.dtype = F32, spread: float = 1.0) -> list[Tensor]:
    L, S, H, D = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = [(*batch, L, H), (*batch, S, H), (*batch, S, D), (H,)]
    scales = [spread, spread, 1.0, H**-0.5]
    return [(s * torch.randn(n, dtype=F64, generator=generator)).to(dtype) for n, s in zip(shapes, scales, strict=True)]


SIZES = [(1, 1, 1, 1), (3, 5, 7, 4), (33, 65, 33, 66), (9, 130, 130, 5), (70, 8, 16, 1)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_sizes_and_types(kernels: Kernels, sizes: Any, dtype: torch.dtype) -> None:
    Call(*operands(*sizes, batch=(2,), dtype=dtype)).check(kernels)


@pytest.mark.parametrize("spread", [1e-3, 0.1, 4.0, 15.0, 100.0])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_small_and_large_sums(kernels: Kernels, spread: float, dtype: torch.dtype) -> None:
    args = operands(5, 70, 40, 3, dtype=dtype)
    args[0][2] *= spread
    args[1][20:] *= spread
    Call(*args).check(kernels)


MASKS = {
    "bool": lambda: torch.rand(2, 9, 70) < 0.5,
    "of keys": lambda: torch.rand(70) < 0.5,
    "of queries": lambda: torch.rand(9, 1) < 0.5,
    "transposed": lambda: (torch.rand(70, 9) < 0.5).t(),
    "none": lambda: torch.zeros(9, 70, dtype=torch.bool),
    "additive": lambda: torch.randn(2, 9, 70),
    "additive of keys": lambda: torch.randn(2, 1, 70),
    "infinite": lambda: torch.randn(9, 70).masked_fill(torch.rand(9, 70) < 0.5, -torch.inf),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_masks(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Call(*operands(9, 70, 16, 5, batch=(2,), dtype=dtype), mask=MASKS[name]()).check(kernels)


def test_what_is_barred_may_be_nan(kernels: Kernels) -> None:
    args = operands(9, 70, 16, 5)
    mask = torch.ones(9, 70, dtype=torch.bool)
    mask[:, 60:] = mask[4] = False
    mask[:5, 7] = False
    clean = Call(*args, mask=mask).forward(kernels)[1]
    args[1][60:] = args[2][60:] = math.nan
    call = Call(*args, mask=mask)
    weights, output = call.forward(kernels)
    torch.testing.assert_close(output, clean, rtol=1e-5, atol=1e-5)
    assert (output[4] == 0).all()
    grads = call.backward(kernels, weights)
    assert all(g.isfinite().all() for g in grads.values())
    assert (grads["grad_key"][60:] == 0).all() and (grads["grad_query"][4] == 0).all()
    args[2][7] = math.nan  # which only some queries see
    output = Call(*args, mask=mask).forward(kernels)[1]
    torch.testing.assert_close(output[:5], clean[:5], rtol=1e-5, atol=1e-5)
    assert output[5:].isnan().all()


def test_strides_and_broadcasts(kernels: Kernels) -> None:
    query, key, value, weight = operands(6, 9, 8, 5, batch=(3, 2))
    call = Call(
        query.transpose(0, 1), key[:1].transpose(0, 1).expand(2, 3, 9, 8)[:, :, ::2], value[0, :1][:, ::2], weight
    )
    assert call.batch == (2, 3)
    call.check(kernels)
    packed = torch.randn(3, 6, 24)
    Call(packed[..., 3:11], packed[..., 11:19], packed[..., 19:], weight).check(kernels)


@pytest.mark.parametrize("asked", ["", "q", "k", "v", "w", "qv", "kw"])
def test_only_what_is_asked_for(kernels: Kernels, asked: str) -> None:
    Call(*operands(5, 7, 8, 3)).check(kernels, asked)


def test_nothing_to_do(kernels: Kernels) -> None:
    for sizes in ((0, 4, 5, 3), (3, 4, 5, 0)):
        Call(*operands(*sizes)).forward(kernels)
    _, output = Call(*operands(3, 0, 5, 2)).forward(kernels)
    assert (output == 0).all()
