"""Attention for the emulated kernels, and what plain PyTorch gives for it in float64."""

from __future__ import annotations

import math
from ctypes import c_int64
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_structs import Mask, Operand, Strides
from cell_operands import F32, Draw
from host_kernels import Kernels, Output
from torch import Tensor

from lect11ext.reference.random import philox_words

OPEN = (2**63 - 1) // 4  # as in dot_product.h
MASK_TYPES = {"bool": 1, "storage": 2, "float": 3}
BAND = 3  # elements between rows that no kernel may touch


@dataclass
class Attention:
    dtype: torch.dtype = F32
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 20
    keys: int = 37
    dim: int = 16
    value_dim: int = 16
    mask: str | None = None  # one of MASK_TYPES
    mask_size: tuple[int, int, int, int] | None = None  # 1 where it is broadcast; else all
    alibi: bool = False
    window: tuple[int, int] = (OPEN, OPEN)
    bottom_right: bool = False
    softcap: float = 0.0
    dropout: float = 0.0
    scale: float | None = None
    lengths: list[tuple[int, int]] | None = None  # queries and keys of sequences that lie one behind the other
    aligned: bool = True
    spread: float = 1.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = Draw(self.dtype, seed=2)
        if self.lengths is not None:
            self.queries, self.keys = (sum(lengths) for lengths in zip(*self.lengths, strict=True))
        self.factor = self.dim**-0.5 if self.scale is None else self.scale
        B, H, G, L, S = self.batch, self.heads, self.kv_heads, self.queries, self.keys
        for suffix in ("", "_t"):
            self.tensors |= {
                f"query{suffix}": self.spaced(draw(B, H, L, self.dim, spread=self.spread)),
                f"key{suffix}": self.spaced(draw(B, G, S, self.dim, spread=self.spread)),
                f"value{suffix}": self.spaced(draw(B, G, S, self.value_dim, spread=self.spread)),
            }
        for name in ("grad_out", "grad_out_t"):
            self.tensors[name] = self.spaced(draw(B, H, L, self.value_dim, spread=1.0))
        wide = Draw(self.compute, seed=3)
        self.tensors |= {name: wide(B, H, L, spread=1.0) for name in ("grad_lse", "grad_lse_t")}
        self.slopes = wide(B, H, spread=0.3).abs().float() if self.alibi else None
        self.key = torch.tensor([1234567890123456789, 77])
        if self.mask is not None:
            self.make_mask(self.mask_size or (B, H, L, S))

    def make_mask(self, size: tuple[int, int, int, int]) -> None:
        kind = torch.float32 if self.mask == "float" else self.dtype
        draw = Draw(kind, seed=4)
        barred = draw(*size, spread=1.0) > 0.8
        if self.mask == "bool":
            self.tensors["mask"] = ~barred
            return
        # Any strides, in the last dimension too.
        mask = draw(*size, spread=1.0).masked_fill(barred, -math.inf)
        self.tensors["mask"] = mask.transpose(2, 3).contiguous().transpose(2, 3)
        self.tensors["mask_t"] = draw(*size, spread=1.0)

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def spaced(self, t: Tensor) -> Tensor:
        """The same with a gap between rows, and heads between positions: [batch, positions, heads, columns]."""
        B, H, L, D = t.shape
        vector = 16 // t.itemsize
        gap = -D % vector + vector if self.aligned else BAND
        memory = torch.full((B, L, H, D + gap), math.nan, dtype=t.dtype)
        memory[..., :D] = t.transpose(1, 2)
        return memory[..., :D].transpose(1, 2)

    # --- the oracle

    def parts(self) -> list[tuple[int, slice, slice]]:
        """Batch index, queries and keys of every sequence."""
        if self.lengths is None:
            return [(b, slice(0, self.queries), slice(0, self.keys)) for b in range(self.batch)]
        found, i, j = [], 0, 0
        for queries, keys in self.lengths:
            found.append((0, slice(i, i + queries), slice(j, j + keys)))
            i, j = i + queries, j + keys
        return found

    def wide(self) -> dict[str, Tensor]:
        return {name: t.double() if t.is_floating_point() else t for name, t in self.tensors.items()}

    def diagonal(self, queries: slice, keys: slice) -> int:
        return (keys.stop - keys.start) - (queries.stop - queries.start) if self.bottom_right else 0

    def visible(self, mask: Tensor | None) -> list[Tensor]:
        """[heads, queries, keys] of every sequence: who sees whom."""
        found = []
        for b, rows, columns in self.parts():
            L, S = rows.stop - rows.start, columns.stop - columns.start
            ahead = torch.arange(S) - torch.arange(L).unsqueeze(1) - self.diagonal(rows, columns)
            seen = ((ahead <= self.window[1]) & (-ahead <= self.window[0])).expand(self.heads, L, S)
            if mask is not None:
                full = mask.expand(self.batch, self.heads, L, S)[b]
                seen = seen & (full if self.mask == "bool" else full > -math.inf)
            found.append(seen)
        return found

    def kept(self, b: int, rows: slice, keys: int) -> Tensor:
        """What dropout multiplies weights by, [heads, queries, keys]."""
        L = rows.stop - rows.start
        if self.dropout == 0:
            return torch.ones(self.heads, L, keys, dtype=torch.float64)
        blocks = -(-self.keys // 8)
        seed, offset = self.key.tolist()
        halves = torch.empty(self.heads, L, 8 * blocks, dtype=torch.int64)
        for h in range(self.heads):
            row = (b * self.heads + h) * self.queries + rows.start
            drawn = philox_words(seed, offset + row * blocks, L * blocks)
            halves[h] = torch.from_numpy(drawn.astype("<u4").view("<u2").astype("int64")).view(L, 8 * blocks)
        threshold = math.floor(self.dropout * 2**16 + 0.5)
        scale = 2**16 / (2**16 - threshold) if threshold < 2**16 else 0.0
        return (halves[..., :keys] >= threshold).double() * scale

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and lse, differentiable."""
        group = self.heads // self.kv_heads
        outs, lses = torch.zeros(*query.shape[:3], self.value_dim).double(), torch.zeros(query.shape[:3]).double()
        for (b, rows, columns), seen in zip(self.parts(), self.visible(mask), strict=True):
            q, k, v = (
                query[b, :, rows],
                key[b, :, columns].repeat_interleave(group, 0),
                value[b, :, columns].repeat_interleave(group, 0),
            )
            L, S = q.size(1), k.size(1)
            if L == 0:
                continue
            used = seen.any(1).unsqueeze(2)  # keys that nobody sees may be NaN
            t = self.factor * q @ torch.where(used, k, 0.0).transpose(1, 2)
            if self.softcap:
                t = self.softcap * torch.tanh(t / self.softcap)
            if self.slopes is not None:
                diagonal = self.diagonal(rows, columns)
                distance = (torch.arange(L).unsqueeze(1) + diagonal - torch.arange(S)).abs()
                t = t - self.slopes[b].double().view(-1, 1, 1) * distance
            if mask is not None and self.mask != "bool":
                full = mask.expand(self.batch, self.heads, L, S)[b]
                t = t + torch.where(seen, full, 0.0)
            t = t.masked_fill(~seen, -math.inf)
            largest = t.detach().amax(2, keepdim=True).nan_to_num(neginf=0.0) if S else torch.zeros(self.heads, L, 1)
            weights = torch.where(seen, torch.exp(t - largest), 0.0)
            total = weights.sum(2, keepdim=True)
            some = seen.any(2, keepdim=True)
            safe = torch.where(some, total, 1.0)
            out = (self.kept(b, rows, S) * weights / safe) @ torch.where(used, v, 0.0)
            lse = torch.where(some, safe.log() + largest, -math.inf).squeeze(2)
            outs = outs.index_put((torch.tensor(b), slice_of(self.heads), range_of(rows)), out)
            lses = lses.index_put((torch.tensor(b), slice_of(self.heads), range_of(rows)), lse)
        return outs, lses

    # --- the kernels' arguments

    def arguments(self) -> dict[str, Any]:
        query_starts = key_starts = None
        if self.lengths is not None:
            query_starts, key_starts = (
                torch.tensor([0, *lengths]).cumsum(0) for lengths in zip(*self.lengths, strict=True)
            )
        self.kept_alive = (query_starts, key_starts)
        return {
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "queries": self.queries,
            "keys": self.keys,
            "head_dim": self.dim,
            "value_dim": self.value_dim,
            "dtype": self.dtype,
            **{name: operand(self.tensors[name]) for name in ("query", "key", "value")},
            "mask": self.mask_of("mask"),
            "alibi_slopes": self.slopes,
            "alibi_strides": None if self.slopes is None else (c_int64 * 2)(*self.slopes.stride()),
            "query_starts": query_starts,
            "key_starts": key_starts,
            "sequences": self.batch if self.lengths is None else len(self.lengths),
            "scale": self.factor,
            "softcap": self.softcap,
            "window_left": self.window[0],
            "window_right": self.window[1],
            "bottom_right": self.bottom_right,
            "dropout_p": self.dropout,
            "dropout_key": self.key,
        }

    def mask_of(self, name: str) -> Mask:
        mask = self.tensors.get(name)
        if self.mask is None or mask is None:
            return Mask()
        return Mask(mask.data_ptr(), MASK_TYPES[self.mask], (c_int64 * 4)(*broadcast_strides(mask)))

    # --- runs

    def forward(self, kernels: Kernels) -> tuple[Tensor, Tensor]:
        out = Rows(self.batch, self.heads, self.queries, self.value_dim, dtype=self.dtype, aligned=self.aligned)
        lse = Output(self.batch, self.heads, self.queries, dtype=self.compute)
        kernels.attention_forward(**self.arguments(), out=out.memory, out_strides=strides(out.tensor), lse=lse)
        return out.checked(), lse.checked()

    def saved(self) -> tuple[Tensor, Tensor]:
        """What a forward left: output and lse, rounded as they are stored."""
        wide = self.wide()
        out, lse = self.attend(wide["query"], wide["key"], wide["value"], wide.get("mask"))
        return self.spaced(out.to(self.dtype)), lse.to(self.compute)

    def oracle(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """attend of query, key, value and a mask that has tangents and gradients; −∞ of lse becomes a constant."""
        mask = self.wide().get("mask") if len(inputs) == 3 else inputs[3]
        out, lse = self.attend(inputs[0], inputs[1], inputs[2], mask)
        return out, torch.where(lse == -math.inf, 0.0, lse)

    def inputs(self) -> list[str]:
        return ["query", "key", "value", *(["mask"] if self.mask in ("storage", "float") else [])]

    def gradients(self, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        """A function from the inputs to their gradients, differentiable."""

        def of(*inputs: Tensor) -> tuple[Tensor, ...]:
            def loss(*inputs: Tensor) -> Tensor:
                out, lse = self.oracle(*inputs)
                total = out.sum() * 0
                total = total if grad_out is None else total + (out * grad_out).sum()
                return total if grad_lse is None else total + (lse * grad_lse).sum()

            return torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)

        return of

    def backward(
        self,
        kernels: Kernels,
        *,
        name: str = "attention_backward",
        saved: tuple[Tensor, Tensor] | None = None,
        **fields: Any,
    ) -> dict[str, Tensor]:
        """Gradients of everything; `fields` replace arguments, None leaves one out."""
        out, lse = saved or self.saved()
        outputs: dict[str, Rows | Output] = {}
        for operand_name in ("query", "key", "value"):
            if fields.get(f"grad_{operand_name}", True) is None:
                continue
            size = self.tensors[operand_name].shape
            outputs[operand_name] = Rows(*size, dtype=self.dtype, aligned=self.aligned)
        arguments: dict[str, Any] = {
            "grad_out": operand(self.tensors["grad_out"]),
            "grad_lse": self.tensors["grad_lse"],
            **{f"grad_{n}": rows.memory for n, rows in outputs.items()},
            **{f"grad_{n}_strides": strides(rows.tensor) for n, rows in outputs.items()},
        }
        if "mask" in self.inputs() and fields.get("grad_mask", True) is not None:
            size = self.tensors["mask"].shape
            outputs["mask"] = Output(*size, dtype=self.compute)
            arguments["grad_mask"] = outputs["mask"]
            arguments["grad_mask_strides"] = (c_int64 * 4)(*broadcast_strides(outputs["mask"].tensor))
        arguments |= fields
        getattr(kernels, name)(
            **self.arguments(), out=operand(out), lse=lse, **{n: v for n, v in arguments.items() if v is not None}
        )
        return {name: output.checked() for name, output in outputs.items()}

    def tangents(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        return {
            **{
                f"{name}_t": None if name in without else operand(self.tensors[f"{name}_t"])
                for name in ("query", "key", "value")
            },
            "mask_t": None if "mask" in without else self.mask_of("mask_t"),
        }

    def tangent(self, kernels: Kernels, without: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
        out, lse = self.saved()
        out_t = Rows(self.batch, self.heads, self.queries, self.value_dim, dtype=self.dtype, aligned=self.aligned)
        lse_t = Output(self.batch, self.heads, self.queries, dtype=self.compute)
        given = {name: value for name, value in self.tangents(without).items() if value is not None}
        kernels.attention_tangent(
            **self.arguments(), **given, out=operand(out), lse=lse,
            out_t=out_t.memory, out_t_strides=strides(out_t.tensor), lse_t=lse_t,
        )  # fmt: skip
        return out_t.checked(), lse_t.checked()


def slice_of(size: int) -> Tensor:
    return torch.arange(size).unsqueeze(1)


def range_of(rows: slice) -> Tensor:
    return torch.arange(rows.start, rows.stop).unsqueeze(0)


def strides(t: Tensor) -> Strides:
    assert t.stride(3) == 1 or t.size(3) <= 1
    return Strides(*t.stride()[:3])


def operand(t: Tensor | None) -> Operand:
    return Operand() if t is None else Operand(t.data_ptr(), strides(t))


def broadcast_strides(t: Tensor) -> list[int]:
    return [0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]


class Rows:
    """[batch, heads, positions, columns] to write, laid out [batch, positions, heads, columns], in an Output."""

    def __init__(self, *size: int, dtype: torch.dtype, aligned: bool) -> None:
        B, H, L, D = size
        self.memory = Output(B, L, H, D, dtype=dtype, shift=0 if aligned else 1)
        self.tensor = self.memory.tensor.transpose(1, 2)

    def checked(self) -> Tensor:
        return self.memory.checked().transpose(1, 2)
