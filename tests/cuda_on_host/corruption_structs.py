"""Mirrors of the structs of csrc/autoencoder/corruption.h."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_uint32, c_void_p

from view_structs import Shape, View


class Corruption(Structure):
    _fields_ = [("shape", Shape), ("input", View), ("key", c_void_p), ("out", c_void_p), ("streams", c_bool)]


class CorruptionDrift(Corruption):
    _fields_ = [("deviation", c_double)]


class CorruptionReplace(Corruption):
    _fields_ = [("low", c_double), ("high", c_double), ("mask", c_void_p), ("last", c_uint32), ("pepper", c_uint32)]
