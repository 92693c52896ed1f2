"""Mirrors of the structs of csrc/attention/dot_product.h."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_int8, c_int64, c_void_p
from typing import Any


class Strides(Structure):
    _fields_ = [("batch", c_int64), ("head", c_int64), ("position", c_int64)]


class Operand(Structure):
    _fields_ = [("data", c_void_p), ("strides", Strides)]


class Mask(Structure):
    _fields_ = [("data", c_void_p), ("type", c_int8), ("strides", c_int64 * 4)]


def _operands(*names: str) -> list[tuple[str, Any]]:
    return [(name, Operand) for name in names]


class Attention(Structure):
    _fields_ = [
        *[(name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim")],
        ("dtype", c_int8),
        *_operands("query", "key", "value"),
        ("mask", Mask),
        ("alibi_slopes", c_void_p),
        ("alibi_strides", c_int64 * 2),
        ("query_starts", c_void_p),
        ("key_starts", c_void_p),
        ("sequences", c_int64),
        ("scale", c_double),
        ("softcap", c_double),
        ("window_left", c_int64),
        ("window_right", c_int64),
        ("bottom_right", c_bool),
        ("dropout_p", c_double),
        ("dropout_key", c_void_p),
    ]


class AttentionForward(Attention):
    _fields_ = [("out", c_void_p), ("out_strides", Strides), ("lse", c_void_p)]


class AttentionSaved(Attention):
    _fields_ = [("out", Operand), ("lse", c_void_p)]


class AttentionBackward(AttentionSaved):
    _fields_ = [
        ("grad_out", Operand),
        *[(name, c_void_p) for name in ("grad_lse", "grad_query", "grad_key", "grad_value")],
        *[(f"grad_{name}_strides", Strides) for name in ("query", "key", "value")],
        ("grad_mask", c_void_p),
        ("grad_mask_strides", c_int64 * 4),
    ]


class AttentionTangent(AttentionSaved):
    _fields_ = [
        *_operands("query_t", "key_t", "value_t"),
        ("mask_t", Mask),
        ("out_t", c_void_p),
        ("out_t_strides", Strides),
        ("lse_t", c_void_p),
    ]


class AttentionBackwardTangent(AttentionBackward):
    _fields_ = [
        *_operands("query_t", "key_t", "value_t", "out_t", "grad_out_t"),
        ("mask_t", Mask),
        ("lse_t", c_void_p),
        ("grad_lse_t", c_void_p),
    ]


class DropoutMask(Structure):
    _fields_ = [("kept", c_void_p), ("key", c_void_p), ("rows", c_int64), ("columns", c_int64), ("p", c_double)]
