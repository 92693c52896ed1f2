"""The CUDA kernels as Python functions on CPU tensors: mirrors of their structs, outputs that are watched."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import (
    Structure,
    c_bool,
    c_char_p,
    c_double,
    c_int8,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

import attention_structs
import torch
from corruption_structs import CorruptionDrift, CorruptionReplace
from hashing_structs import (
    Binarize,
    HammingCount,
    HammingDistance,
    HammingFill,
    HammingHistogram,
    HammingPlan,
    PackBits,
    UnpackBits,
)
from loss_structs import ColumnBlocks, PenaltyBackward, PenaltyForward, ReconstructionBackward, ReconstructionForward
from sparse_code_structs import RowDots, ScatterCode, TopkCode, WeightedRows
from torch import Tensor
from view_structs import MAX_DIMS, RowTiles, Shape, View

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class PhiloxReservation(Structure):
    _fields_ = [
        ("captured", c_bool),
        ("seed", c_uint64),
        ("offset", c_uint64),
        ("seed_ptr", c_void_p),
        ("offset_ptr", c_void_p),
        ("offset_intragraph", c_uint64),
        ("key", c_void_p),
    ]


class PhiloxNormal(Structure):
    _fields_ = [("key", c_void_p), ("out", c_void_p), ("dtype", c_int8), ("numel", c_int64)]


class Gaussian(Structure):
    _fields_ = [
        ("shape", Shape),
        *[(name, View) for name in ("mean", "logvar", "prior_mean", "prior_logvar")],
        ("compute_double", c_bool),
        ("key", c_void_p),
        ("samples", c_int64),
        ("free_bits", c_double),
        ("clamps", c_bool),
        ("low", c_double),
        ("high", c_double),
        ("streams", c_bool),
    ]


class GaussianForward(Gaussian):
    _fields_ = [
        ("tiles", RowTiles),
        ("z", c_void_p),
        ("z_dtype", c_int8),
        ("kl", c_void_p),
        ("kl_elements", c_bool),
    ]


class GaussianBackward(Gaussian):
    _fields_ = [
        ("tiles", RowTiles),
        ("grad_z_shape", Shape),
        ("grad_z", View),
        ("grad_kl", View),
        ("grad_kl_scale", c_double),
        *[(f"grad_{name}", c_void_p) for name in ("mean", "logvar", "prior_mean", "prior_logvar")],
        ("grad_mean_dtype", c_int8),
        ("grad_logvar_dtype", c_int8),
    ]


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names]


class Matrices(Structure):
    _fields_ = [("data", c_void_p), ("row", c_int64), ("strides", c_int64 * MAX_DIMS)]


class PairMask(Structure):
    _fields_ = [
        ("kind", c_int8),
        ("dtype", c_int8),
        ("data", c_void_p),
        ("row", c_int64),
        ("column", c_int64),
        ("strides", c_int64 * MAX_DIMS),
    ]


class Additive(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("queries", "keys", "hidden", "columns")],
        ("dtype", c_int8),
        ("batches", Shape),
        *[(name, Matrices) for name in ("query", "key", "value")],
        ("score_weight", c_void_p),
        ("mask", PairMask),
        ("first", c_int64),
        ("count", c_int64),
        *_pointers("key_panels", "forms", "value_rows"),
    ]


class AdditiveForward(Additive):
    _fields_ = _pointers("weights", "output")


class AdditiveBackward(Additive):
    _fields_ = [
        ("parts", c_int64),
        ("part_rows", c_int64),
        ("weights", c_void_p),
        ("grad_output", Matrices),
        *_pointers("grad_query", "grad_key", "grad_value"),
        *[(f"grad_{name}_dtype", c_int8) for name in ("query", "key", "value")],
        *_pointers("grad_scores", "grad_score_weight", "key_sums", "value_sums"),
    ]


_STEP = [("batch", c_int64), ("hidden", c_int64), ("dtype", c_int8)]


class LstmGates(Structure):
    _fields_ = [
        *_STEP,
        ("sigmoid_candidate", c_bool),
        *_pointers("pre", "bias_ih", "bias_hh", "c"),
        ("c_stride", c_int64),
        *_pointers("h_out", "c_out", "gates"),
    ]


class LstmGatesBackward(Structure):
    _fields_ = [
        *_STEP,
        ("sigmoid_candidate", c_bool),
        *_pointers("grad_h", "grad_c"),
        ("clip", c_double),
        *_pointers("gates", "c"),
        ("c_stride", c_int64),
        *_pointers("c_out", "grad_pre"),
        ("grad_c_in", c_void_p),
    ]


class GruGates(Structure):
    _fields_ = [
        *_STEP,
        ("stage", c_int8),
        *_pointers("pre_input", "pre_hidden", "bias_ih", "bias_hh", "h"),
        ("h_stride", c_int64),
        *_pointers("reset_h", "h_out", "gates"),
    ]


class GruGatesBackward(Structure):
    _fields_ = [
        *_STEP,
        ("stage", c_int8),
        ("grad_h", c_void_p),
        ("clip", c_double),
        *_pointers("gates", "h"),
        ("h_stride", c_int64),
        *_pointers("grad_reset_h", "grad_pre_input", "grad_pre_hidden"),
        ("grad_h_in", c_void_p),
    ]


class TimeStrides(Structure):
    _fields_ = [("step", c_int64), ("row", c_int64)]


class Zoneout(Structure):
    _fields_ = [("mask", c_void_p), ("strides", TimeStrides), ("rate", c_double)]


class LayerCommon(Structure):
    _fields_ = [
        ("cell", c_int8),
        *[(name, c_int64) for name in ("steps", "batch", "hidden")],
        ("dtype", c_int8),
        ("sigmoid_candidate", c_bool),
        ("reverse", c_bool),
        ("weight_hh", c_void_p),
        ("weight_hh_stride", c_int64),
        *_pointers("h", "c", "peephole", "norm", "hidden_mask", "lengths", "reset"),
        ("reset_strides", TimeStrides),
        ("zoneout_h", Zoneout),
        ("zoneout_c", Zoneout),
    ]


class LayerCuda(LayerCommon):
    _fields_ = [
        ("out", c_void_p),
        ("out_strides", TimeStrides),
        *_pointers("h_out", "c_out", "gates", "cells"),
        ("gates_strides", TimeStrides),
        ("cells_every", c_int64),
        ("normed", c_void_p),
        ("normed_strides", TimeStrides),
        ("rstd", c_void_p),
        ("rstd_strides", TimeStrides),
        ("pre", c_void_p),
        ("pre_strides", TimeStrides),
        ("bias_hh", c_void_p),
        ("tensor_cores", c_bool),
        *_pointers("panels", "exchange_0", "exchange_1", "reset_state", "state_h", "state_c"),
        *_pointers("sums", "moments", "arrivals"),
    ]


class LayerCudaBackward(LayerCommon):
    _fields_ = [
        ("clip", c_double),
        ("truncate", c_int64),
        ("first_step", c_int64),
        *_pointers("grad_out", "grad_h_out", "grad_c_out", "grad_gates", "grad_cells"),
        *_pointers("out", "gates", "cells", "normed", "rstd"),
        *[(f"{name}_strides", TimeStrides) for name in ("out", "gates", "normed", "rstd")],
        ("rounds", c_bool),
        *_pointers("grad_pre", "grad_hidden", "grad_normed"),
        ("grad_pre_strides", TimeStrides),
        *_pointers("grad_h", "grad_c", "grad_mask"),
        ("tensor_cores", c_bool),
        *_pointers("panels", "exchange_0", "exchange_1", "carry_h", "carry_c", "product"),
        *_pointers("carry_mask", "moments", "arrivals"),
    ]


ENTRIES = {
    "philox_key": PhiloxReservation,
    "philox_normal": PhiloxNormal,
    "corruption_drift": CorruptionDrift,
    "corruption_replace": CorruptionReplace,
    "gaussian_forward": GaussianForward,
    "gaussian_backward": GaussianBackward,
    "penalty_forward": PenaltyForward,
    "penalty_backward": PenaltyBackward,
    "reconstruction_forward": ReconstructionForward,
    "reconstruction_backward": ReconstructionBackward,
    "binarize": Binarize,
    "pack_bits": PackBits,
    "unpack_bits": UnpackBits,
    "hamming_distance": HammingDistance,
    "hamming_histogram": HammingHistogram,
    "hamming_plan": HammingPlan,
    "hamming_count": HammingCount,
    "hamming_fill": HammingFill,
    "topk_code": TopkCode,
    "scatter_code": ScatterCode,
    "weighted_rows": WeightedRows,
    "row_dots": RowDots,
    "additive_forward": AdditiveForward,
    "additive_backward": AdditiveBackward,
    "lstm_gates_forward": LstmGates,
    "lstm_gates_backward": LstmGatesBackward,
    "gru_gates_forward": GruGates,
    "gru_gates_backward": GruGatesBackward,
    "layer_forward": LayerCuda,
    "layer_backward": LayerCudaBackward,
    "attention_forward": attention_structs.AttentionForward,
    "attention_backward": attention_structs.AttentionBackward,
    "attention_tangent": attention_structs.AttentionTangent,
    "attention_backward_tangent": attention_structs.AttentionBackwardTangent,
    "attention_dropout_mask": attention_structs.DropoutMask,
}


class Kernels:
    """``kernels.lstm_gates_forward(batch=…, pre=tensor, …)``: tensors become pointers, dtypes their codes."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name, struct in ENTRIES.items():
            getattr(self.library, name).restype = c_char_p
            size = getattr(self.library, f"sizeof_{struct.__name__}")
            size.restype = c_size_t
            assert size() == ctypes.sizeof(struct), f"{struct.__name__} differs from its C++ struct"

    def __getattr__(self, name: str) -> Any:
        struct = ENTRIES[name]

        def call(**fields: Any) -> None:
            args = struct(**{k: _plain(v) for k, v in fields.items() if v is not None})
            error = getattr(self.library, name)(ctypes.byref(args))
            if error is not None:
                raise RuntimeError(error.decode())

        return call

    def tiles(self, rows: int, cols: int) -> RowTiles:
        out = RowTiles()
        self.library.row_tiles(c_int64(rows), c_int64(cols), ctypes.byref(out))
        return out

    def column_blocks(self, rows: int, cols: int, most_runs: int) -> ColumnBlocks:
        out = ColumnBlocks()
        self.library.column_blocks(c_int64(rows), c_int64(cols), c_int64(most_runs), ctypes.byref(out))
        return out


def _plain(value: Any) -> Any:
    if isinstance(value, Output):
        return value.tensor.data_ptr()
    if isinstance(value, Tensor):
        return value.data_ptr()
    return DTYPE_CODES[value] if isinstance(value, torch.dtype) else value


def make_views(size: Sequence[int], *tensors: Tensor | None) -> tuple[Shape, list[View]]:
    """A shape whose dimensions are merged as far as all tensors allow, and a view for each."""
    expanded = [None if t is None else t.expand(size) for t in tensors]
    strides = [t.stride() for t in expanded if t is not None]
    dims: list[int] = []  # the last of the original dimensions in each merged one
    sizes: list[int] = []
    for d, n in enumerate(size):
        if n == 1:
            continue
        if dims and all(s[dims[-1]] == s[d] * n for s in strides):
            dims[-1], sizes[-1] = d, sizes[-1] * n
        else:
            dims.append(d)
            sizes.append(n)
    sizes = sizes or [1]
    shape = Shape(torch.Size(size).numel(), len(sizes), (c_int64 * MAX_DIMS)(*sizes))
    views = []
    for t in expanded:
        view = View()
        if t is not None:
            view.data, view.dtype, view.dense = t.data_ptr(), DTYPE_CODES[t.dtype], t.is_contiguous()
            view.tensor = t
            view.strides[: len(dims)] = [t.stride(d) for d in dims]
        views.append(view)
    return shape, views


class Output:
    """Memory for a kernel to write: NaN at first, between two bands that must stay as they are."""

    BAND, SENTINEL = 64, 1234.0

    def __init__(self, *size: int, dtype: torch.dtype, shift: int = 0, like: Tensor | None = None) -> None:
        numel = torch.Size(size).numel()
        begin = self.BAND + shift  # a shift takes the alignment away
        self.memory = torch.full((begin + numel + self.BAND,), self.SENTINEL, dtype=dtype)
        self.begin, self.end = begin, begin + numel
        self.tensor = self.memory[self.begin : self.end].view(size)
        self.tensor.copy_(torch.tensor(torch.nan) if like is None else like)

    def checked(self) -> Tensor:
        """What was written."""
        assert (self.memory[: self.begin] == self.SENTINEL).all(), "written before the output's begin"
        assert (self.memory[self.end :] == self.SENTINEL).all(), "written beyond the output's end"
        return self.tensor


class Integers(Output):
    """The same for types that have no NaN: 77 everywhere at first."""

    SENTINEL = 77

    def __init__(self, *size: int, dtype: torch.dtype, shift: int = 0) -> None:
        super().__init__(*size, dtype=dtype, shift=shift, like=torch.tensor(self.SENTINEL))


def assert_near(actual: Tensor, expected: Tensor, *, units: float, atol: float = 0.0) -> None:
    """Within ``units`` times the type's epsilon of the expected magnitude, and NaN where it is NaN."""
    epsilon = torch.finfo(actual.dtype).eps
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in different places"
    same = (actual == expected) | actual.isnan()  # infinities
    excess = (actual - expected).abs() - units * epsilon * expected.abs() - atol
    worst = torch.where(same, 0.0, excess).nan_to_num(torch.inf).max().item() if excess.numel() else 0.0
    assert worst <= 0, f"largest excess over the tolerance: {worst:.3g}"
