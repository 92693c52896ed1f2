"""Mirrors of the structs of csrc/autoencoder/penalties.h and reconstruction.h."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_int8, c_int64, c_void_p

from view_structs import RowTiles, Shape, View

ACTIVATIONS = ["identity", "relu", "sigmoid", "softplus", "tanh"]
PENALTIES = ["l1", "contractive", "mean"]
LIKELIHOODS = ["bernoulli", "continuous_bernoulli", "gaussian", "squared_error"]


class ColumnBlocks(Structure):
    _fields_ = [
        (name, c_int64) for name in ("rows", "cols", "rows_per_run", "runs", "cols_per_piece", "pieces", "count")
    ]


class PenalizedActivation(Structure):
    _fields_ = [
        ("shape", Shape),
        ("input", View),
        ("scale", View),
        ("compute_double", c_bool),
        ("activation", c_int8),
        ("penalty", c_int8),
        ("streams", c_bool),
    ]


class PenaltyForward(PenalizedActivation):
    _fields_ = [
        ("tiles", RowTiles),
        ("blocks", ColumnBlocks),
        ("output", c_void_p),
        ("output_dtype", c_int8),
        ("sums", c_void_p),
    ]


class PenaltyBackward(PenalizedActivation):
    _fields_ = [
        ("blocks", ColumnBlocks),
        ("grad_output", View),
        ("grad_penalty", View),
        ("grad_penalty_scale", c_double),
        ("grad_input", c_void_p),
        ("grad_input_dtype", c_int8),
        ("grad_scale", c_void_p),
    ]


class Reconstruction(Structure):
    _fields_ = [
        ("shape", Shape),
        *[(name, View) for name in ("input", "target", "logvar", "weight")],
        ("compute_double", c_bool),
        ("likelihood", c_int8),
        ("streams", c_bool),
    ]


class ReconstructionForward(Reconstruction):
    _fields_ = [("tiles", RowTiles), ("loss", c_void_p), ("loss_elements", c_bool)]


class ReconstructionBackward(Reconstruction):
    _fields_ = [
        ("tiles", RowTiles),
        ("grad", View),
        ("grad_scale", c_double),
        *[(f"grad_{name}", c_void_p) for name in ("input", "target", "logvar", "weight")],
        ("grad_input_dtype", c_int8),
        ("grad_target_dtype", c_int8),
    ]
