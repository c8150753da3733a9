"""Memory of outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.utils.dlpack
from torch import Tensor

from tpext import _C
from tpext.ops._library import PLAIN, are_plain

# Bytes from which on the C library gives every array back to the system, whatever was freed before.
_LARGE = 32 << 20


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """``like.new_empty(shape)``; on the CPU a large one in memory that an earlier one left: csrc/cpu/large_memory.h."""
    # fake tensors, whose sizes may be symbols, are of a type of their own
    plain = type(like) in PLAIN and like.is_cpu and like.dtype in (torch.float32, torch.float64)
    if plain and math.prod(shape) * like.itemsize >= _LARGE:
        capsule = _C.large_array(list(shape), 8 * like.itemsize) if are_plain((like,)) else None
        if capsule is not None:
            return torch.utils.dlpack.from_dlpack(capsule)
    return like.new_empty(shape)
