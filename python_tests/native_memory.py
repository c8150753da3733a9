"""Memory that tests make by hand: between fences, and as the structures of DLPack."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np


class Fenced:
    """Copies of arrays, each between two pages of memory that nobody may touch: against the first or the second."""

    def __init__(self, against_end: bool) -> None:
        self.against_end = against_end
        self.maps: list[mmap.mmap] = []

    def __call__(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if array.nbytes == 0:
            return array.copy()
        end = (array.nbytes // mmap.PAGESIZE + 2) * mmap.PAGESIZE
        memory = mmap.mmap(-1, end + mmap.PAGESIZE)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for fence in (0, end):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + fence), mmap.PAGESIZE, 0) == 0
        begin = end - array.nbytes if self.against_end else mmap.PAGESIZE
        copy = np.frombuffer(memory, dtype=array.dtype, count=array.size, offset=begin).reshape(array.shape)
        copy[...] = array
        return copy


def misaligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same numbers at an address that is no multiple of their size."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    moved = memory[1:].view(array.dtype)
    moved[:] = array.ravel()
    return moved.reshape(array.shape)


class DLTensor(ctypes.Structure):
    """The C structure of DLPack's tensor, to make one that torch and NumPy would not."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def foreign_capsule(pointer: int, capsule_name: bytes) -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(pointer, capsule_name, None)


class Exporter:
    """Something with ``__dlpack__`` that returns what it was given, or raises it."""

    def __init__(self, capsule: object) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: object) -> object:
        if isinstance(self.capsule, Exception):
            raise self.capsule
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def consumed(array: np.ndarray[Any, Any]) -> object:
    """A capsule whose tensor another has taken over."""
    capsule = array.__dlpack__()
    np.from_dlpack(Exporter(capsule))
    return capsule


def tensor_of(capsule: object) -> DLTensor:
    """What a DLPack capsule says of its tensor, to be changed."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return DLTensor.from_address(get(capsule, b"dltensor"))
