"""Triton kernels of the bench: one without work, one that compares ways to cast."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.bits import bf16_bits, from_bits
from kvcondense.backends.triton.kernels.encode import small_float


@triton.jit
def empty_kernel(operand):
    """Nothing."""


@triton.jit
def cast_kernel(first, wrong, part: tl.constexpr, BLOCK: tl.constexpr):
    """Adds to ``wrong`` how many of the floats with the bits from ``first`` on the chip's cast encodes differently.

    part: of a small float; None: bf16.
    """
    at = first + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = from_bits(at.to(tl.int32))
    if part is None:
        differs = bf16_bits(x, False) != bf16_bits(x, True)
    else:
        differs = small_float(x, part, False) != small_float(x, part, True)
    tl.atomic_add(wrong, tl.sum(differs.to(tl.int32), axis=0))
