"""Mirrors of the structs of csrc/autoencoder/sparse_code.h."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_int8, c_int64, c_void_p


class TopkCode(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "length", "k")],
        ("input", c_void_p),
        ("dtype", c_int8),
        ("stride", c_int64),
        ("rectify", c_bool),
        ("values", c_void_p),
        ("indices", c_void_p),
    ]


class ScatterCode(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "length", "k", "element_bytes")],
        *[(name, c_void_p) for name in ("values", "indices", "out")],
    ]


class WeightedRows(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "width", "k", "table_rows")],
        *[(name, c_void_p) for name in ("values", "indices", "order", "starts", "table")],
        ("dtype", c_int8),
        ("stride", c_int64),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_dtype", c_int8),
    ]


class RowDots(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("rows", "width", "k", "table_rows")],
        *[(name, c_void_p) for name in ("indices", "table")],
        ("dtype", c_int8),
        ("stride", c_int64),
        ("dense", c_void_p),
        ("dense_dtype", c_int8),
        ("dense_stride", c_int64),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("out_dtype", c_int8),
    ]
