"""Mirrors of the structs of csrc/common/view.h, and of the tiles of rows."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_int8, c_int32, c_int64, c_void_p

MAX_DIMS = 8


class Shape(Structure):
    _fields_ = [("numel", c_int64), ("ndim", c_int32), ("sizes", c_int64 * MAX_DIMS)]


class View(Structure):
    tensor: object = None  # whose memory it is: kept, since the view may be all that is left of it

    _fields_ = [("data", c_void_p), ("dtype", c_int8), ("dense", c_bool), ("strides", c_int64 * MAX_DIMS)]


class RowTiles(Structure):
    _fields_ = [(name, c_int64) for name in ("rows", "cols", "rows_per_tile", "tiles_per_row", "count")]
