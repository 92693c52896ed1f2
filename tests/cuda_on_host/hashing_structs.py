"""Mirrors of the structs of csrc/autoencoder/hashing.h."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_int32, c_int64, c_uint64, c_void_p

from view_structs import MAX_DIMS, Shape, View


class Binarize(Structure):
    _fields_ = [("shape", Shape), ("input", View), ("threshold", c_double), ("out", c_void_p)]


class PackBits(Structure):
    _fields_ = [
        ("rows", c_int64),
        ("columns", c_int64),
        ("shape", Shape),
        ("input", View),
        ("bits", c_void_p),
        ("threshold", c_double),
        ("codes", c_void_p),
    ]


class UnpackBits(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "columns", "bytes")],
        ("codes", c_void_p),
        ("one", c_uint64),
        ("item_size", c_int64),
        ("out", c_void_p),
    ]


class CodeRows(Structure):
    _fields_ = [("data", c_void_p), ("count", c_int64), ("stride", c_int64)]


class HammingDistance(Structure):
    _fields_ = [
        ("instruction", c_bool),
        ("bytes", c_int64),
        ("batches", Shape),
        ("query", CodeRows),
        ("codes", CodeRows),
        ("query_steps", c_int64 * MAX_DIMS),
        ("codes_steps", c_int64 * MAX_DIMS),
        ("out", c_void_p),
    ]


class HammingCudaSearch(Structure):
    _fields_ = [
        ("bytes", c_int64),
        ("query", CodeRows),
        ("codes", CodeRows),
        ("segment", c_int64),
        ("segments", c_int64),
    ]


class HammingHistogram(HammingCudaSearch):
    _fields_ = [("k", c_int64), ("counts", c_void_p), ("totals", c_void_p)]


class HammingPlan(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("queries", "segments", "bins", "k")],
        *[(name, c_void_p) for name in ("counts", "totals", "limits", "starts", "ties")],
    ]


class HammingCount(HammingCudaSearch):
    _fields_ = [("limit", c_int32), ("counts", c_void_p)]


class HammingFill(HammingCudaSearch):
    _fields_ = [
        ("limit", c_int32),
        *[(name, c_void_p) for name in ("limits", "starts", "ties", "distances", "indices")],
    ]
