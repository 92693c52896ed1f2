"""A layer's recurrence for the emulated kernels, and what the CPU's op gives for it in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from cell_operands import BF16, F16, F32, F64, Draw
from host_kernels import Kernels, Output, TimeStrides, Zoneout
from torch import Tensor

CHUNK, TILE = 64, 8  # as in layer_cuda.h
CELLS = {"lstm": 0, "gru": 1, "gru_reset_first": 2}


def over_time(t: Tensor, batch_first: bool) -> TimeStrides:
    return TimeStrides(t.stride(1), t.stride(0)) if batch_first else TimeStrides(t.stride(0), t.stride(1))


@dataclass
class Layer:
    cell: str
    dtype: torch.dtype = F32
    steps: int = 4
    batch: int = 3
    hidden: int = 20
    tf32: bool = False
    lengths: list[int] | None = None
    reset: bool = False
    reverse: bool = False
    batch_first: bool = False
    sigma: bool = False
    peephole: bool = False
    norm: bool = False
    hidden_mask: bool = False
    zoneout: str | None = None  # "mask" or "rate"
    clip: float = math.inf
    truncate: int = 0
    kept_grads: bool = True  # gradients to what a forward keeps for its backward

    def __post_init__(self) -> None:
        draw, T, B, H = Draw(self.dtype, seed=1), self.steps, self.batch, self.hidden
        self.gates, self.lstm = (4, True) if self.cell == "lstm" else (3, False)
        self.kept_gates = 3 if self.cell == "gru_reset_first" else 4
        G, ordered = self.gates, self.ordered
        weight = draw(G * H, H + 3, spread=1 / math.sqrt(H))
        weight[:, H:] = math.nan
        self.weight = weight[:, :H]
        self.pre, self.h = draw(*ordered(T, B), G * H), draw(B, H, spread=0.7)
        self.c = draw(B, H) if self.lstm else None
        self.bias = draw(G * H)
        self.p = draw(3, H) if self.peephole else None
        self.scale = draw(G * H) if self.norm else None
        self.mask = draw(B, H) if self.hidden_mask else None
        flip = torch.Generator().manual_seed(2)

        def coins(*size: int) -> Tensor:
            return torch.rand(size, generator=flip) < 0.3

        self.length = None if self.lengths is None else torch.tensor(self.lengths)
        self.restart = coins(*ordered(T, B)) if self.reset else None
        masks = self.zoneout == "mask"
        self.keep_h = coins(*ordered(T, B), H) if masks else None
        self.keep_c = coins(*ordered(T, B), H) if masks and self.lstm else None
        self.rate_h, self.rate_c = (0.25, 0.5 if self.lstm else 0.0) if self.zoneout == "rate" else (0.0, 0.0)
        # What a backward starts from.
        self.grads = {
            "out": draw(*ordered(T, B), H),
            "h": draw(B, H),
            "gates": draw(*ordered(T, B), self.kept_gates * H),
        }
        if self.lstm:
            self.grads |= {"c": draw(B, H), "cells": draw(*ordered(T, B), H)}
        if not self.kept_grads:
            for name in {"gates", "cells"} & self.grads.keys():
                self.grads[name].zero_()

    def ordered(self, steps: int, batch: int) -> tuple[int, int]:
        return (batch, steps) if self.batch_first else (steps, batch)

    # --- the oracle

    def arguments(self) -> list[Any]:
        """Of the op, in float64, from input to batch_first."""

        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double()

        masks, clip = [self.length, self.restart, self.keep_h], None if self.clip == math.inf else self.clip
        last = [clip, self.truncate, 0, self.reverse, self.batch_first]
        if self.lstm:
            return [
                wide(self.pre), wide(self.h), wide(self.c), None, wide(self.weight), None, wide(self.bias), None,
                wide(self.p),
                wide(self.scale), wide(self.mask), *masks, self.keep_c, "sigmoid" if self.sigma else "tanh",
                self.rate_h, self.rate_c, *last,
            ]  # fmt: skip
        return [
            wide(self.pre), wide(self.h), None, wide(self.weight), None, wide(self.bias), wide(self.scale),
            wide(self.mask), *masks, self.cell == "gru", self.rate_h, *last,
        ]  # fmt: skip

    def expected(self) -> dict[str, Tensor]:
        op = torch.ops.lect11ext.lstm_layer if self.lstm else torch.ops.lect11ext.gru_layer
        names = (
            ("out", "h", "c", "gates", "cells", "normed", "rstd")
            if self.lstm
            else ("out", "h", "gates", "normed", "rstd")
        )
        found = dict(zip(names, op(*self.arguments(), True), strict=True))
        return {name: t for name, t in found.items() if t is not None and t.numel() > 0}

    def expected_gradients(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the sums, the states, the weights, the norm and the mask."""
        grads = {name: t.double() for name, t in self.grads.items()}
        if self.lstm:
            found = torch.ops.lect11ext.lstm_layer_backward(
                *(grads[n] for n in ("out", "h", "c", "gates", "cells")), *self.arguments(),
                *(kept.get(n) for n in ("out", "gates", "cells", "normed", "rstd")), [True] * 10,
            )  # fmt: skip
            names = ("pre", "h", "c", None, "weight", None, None, None, "norm", "mask")
        else:
            found = torch.ops.lect11ext.gru_layer_backward(
                *(grads[n] for n in ("out", "h", "gates")), *self.arguments(),
                *(kept.get(n) for n in ("out", "gates", "normed", "rstd")), [True] * 8,
            )  # fmt: skip
            names = ("pre", "h", None, "weight", None, None, "norm", "mask")
        return {n: t for n, t in zip(names, found, strict=True) if n is not None and t is not None and t.numel() > 0}

    # --- the kernels

    def common(self) -> dict[str, Any]:
        def zoneout(mask: Tensor | None, rate: float) -> Zoneout:
            return Zoneout(
                None if mask is None else mask.data_ptr(),
                TimeStrides(0, 0) if mask is None else over_time(mask, self.batch_first),
                rate,
            )

        return dict(
            cell=CELLS[self.cell], steps=self.steps, batch=self.batch, hidden=self.hidden, dtype=self.dtype,
            sigmoid_candidate=self.sigma, reverse=self.reverse, weight_hh=self.weight,
            weight_hh_stride=self.weight.stride(0), h=self.h, c=self.c, peephole=self.p, norm=self.scale,
            hidden_mask=self.mask, lengths=self.length, reset=self.restart,
            reset_strides=None if self.restart is None else over_time(self.restart, self.batch_first),
            zoneout_h=zoneout(self.keep_h, self.rate_h), zoneout_c=zoneout(self.keep_c, self.rate_c),
            tensor_cores=self.tf32, arrivals=torch.zeros(-(-self.batch // 8) * 16, dtype=torch.int64),
        )  # fmt: skip

    @property
    def depth(self) -> int:
        chunk = CHUNK // self.dtype.itemsize
        return -(-self.hidden // chunk) * chunk

    @property
    def wide(self) -> torch.dtype:
        return F64 if self.dtype == F64 else F32

    def run_forward(self, kernels: Kernels, *, save: bool = True, every: int = 0) -> dict[str, Output]:
        T, B, H, G, tiles = self.steps, self.batch, self.hidden, self.gates, -(-self.hidden // TILE)

        def time(parts: int) -> Output:
            return Output(*self.ordered(T, B), parts * H, dtype=self.dtype)

        out = {"out": time(1), "h": Output(B, H, dtype=self.dtype)}
        if self.lstm:
            out["c"] = Output(B, H, dtype=self.dtype)
        if save and every == 0:
            out["gates"] = time(self.kept_gates)
            if self.norm:
                out["normed"], out["rstd"] = time(G), Output(*self.ordered(T, B), dtype=self.wide)
        if save and self.lstm:
            out["cells"] = Output((T - 1) // every, B, H, dtype=self.dtype) if every else time(1)

        def strides(t: Output | None) -> TimeStrides | None:
            return None if t is None else over_time(t.tensor, self.batch_first)

        kernels.layer_forward(
            **self.common(), out=out["out"], out_strides=strides(out["out"]), h_out=out["h"], c_out=out.get("c"),
            gates=out.get("gates"), cells=out.get("cells"), gates_strides=strides(out.get("gates")),
            cells_every=every, normed=out.get("normed"), normed_strides=strides(out.get("normed")),
            rstd=out.get("rstd"), rstd_strides=strides(out.get("rstd")), pre=self.pre,
            pre_strides=over_time(self.pre, self.batch_first), bias_hh=self.bias,
            panels=aligned(tiles * G * TILE, self.depth, dtype=self.dtype),
            exchange_0=aligned(B, self.depth, dtype=self.dtype, zero=True),
            exchange_1=aligned(B, self.depth, dtype=self.dtype, zero=True),
            reset_state=aligned(B, self.depth, dtype=self.dtype, zero=True),
            state_h=aligned(B, H, dtype=self.dtype), state_c=aligned(B, H, dtype=self.wide),
            sums=aligned(B, G, H, dtype=self.wide), moments=aligned(tiles, B, 2, dtype=self.wide),
        )  # fmt: skip
        return out

    def run_backward(self, kernels: Kernels, kept: dict[str, Tensor]) -> dict[str, Output]:
        T, B, H, G, tiles = self.steps, self.batch, self.hidden, self.gates, -(-self.hidden // TILE)

        def time() -> Output:
            return Output(*self.ordered(T, B), G * H, dtype=self.dtype)

        given = {name: t.to(self.wide if name == "rstd" else self.dtype) for name, t in kept.items()}

        def strides(t: Tensor | None) -> TimeStrides | None:
            return None if t is None else over_time(t, self.batch_first)

        out = {"pre": time(), "h": Output(B, H, dtype=self.dtype)}
        if self.lstm:
            out["c"] = Output(B, H, dtype=self.dtype)
        if self.cell == "gru" or self.norm:
            out["hidden"] = time()
        if self.cell == "gru" and self.norm:
            out["normed"] = time()
        if self.hidden_mask:
            out["mask"] = Output(B, H, dtype=self.dtype)

        def carry() -> Tensor:
            return aligned(B, H, dtype=self.wide)

        kept_grads = self.grads if self.kept_grads else {}
        kernels.layer_backward(
            **self.common(), clip=self.clip, truncate=self.truncate, grad_out=self.grads["out"],
            grad_h_out=self.grads["h"], grad_c_out=self.grads.get("c"), grad_gates=kept_grads.get("gates"),
            grad_cells=kept_grads.get("cells"), out=given["out"], gates=given["gates"], cells=given.get("cells"),
            normed=given.get("normed"), rstd=given.get("rstd"), out_strides=strides(given["out"]),
            gates_strides=strides(given["gates"]), normed_strides=strides(given.get("normed")),
            rstd_strides=strides(given.get("rstd")), grad_pre=out["pre"], grad_hidden=out.get("hidden"),
            grad_normed=out.get("normed"), grad_pre_strides=strides(out["pre"].tensor), grad_h=out["h"],
            grad_c=out.get("c"), grad_mask=out.get("mask"),
            panels=aligned(tiles * TILE, G * self.depth, dtype=self.dtype),
            exchange_0=aligned(B, G * self.depth, dtype=self.dtype, zero=True),
            exchange_1=aligned(B, G * self.depth, dtype=self.dtype, zero=True),
            carry_h=carry(), carry_c=carry() if self.lstm else None,
            product=carry() if self.cell == "gru_reset_first" else None,
            carry_mask=carry() if self.hidden_mask else None, moments=aligned(tiles, B, 2, dtype=self.wide),
        )  # fmt: skip
        return out

    @property
    def epsilon(self) -> float:
        """Of the coarsest rounding on the way."""
        return 2.0**-11 if self.tf32 and self.dtype == F32 else torch.finfo(self.dtype).eps


def aligned(*size: int, dtype: torch.dtype, zero: bool = False) -> Tensor:
    """As an allocator of a device gives it, NaN or zero."""
    return torch.full(size, 0.0 if zero else math.nan, dtype=dtype)


TYPES = [(F32, False), (F32, True), (F64, False), (BF16, False), (F16, False)]
