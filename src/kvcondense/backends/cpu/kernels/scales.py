"""Scales of a cache row's blocks: the largest magnitude of each, and what each format's rule makes of a vector of them.

They are those of ``formats.scales``, bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import int64

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.elements import INFINITY, MAGNITUDE, MANTISSA, small_float, small_float_value
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.integers import larger
from kvcondense.backends.cpu.kernels.lanes import expression
from kvcondense.backends.cpu.kernels.simd import BYTES, F32, I32, load, splat, store

_E4M3 = (8, 3, 7, 0x7E, 0x7F)
"""bits, mantissa, bias, max_code, nan_code of scales that are e4m3 bytes."""


@expression(I32, F32)
def _bits(x):
    """Bits of |x|."""
    return x.bits() & MAGNITUDE


@expression(I32, F32)
def _finite_bits(x):
    """Bits of |x| where it is finite, else 0."""
    magnitude = x.bits() & MAGNITUDE
    return magnitude.if_less(INFINITY, magnitude, 0)


@expression(I32, I32, I32)
def _larger(x, y):
    """The larger of both."""
    return x.at_least(y)


@expression(I32, F32, int64, int64)
def _ue8m0(amax, top, lowest):
    """Byte of the least power of two from amax / top and from 2^lowest on: the next one if amax has more mantissa."""
    above = (top & MANTISSA).if_less(amax.bits() & MANTISSA, 1, 0)
    return ((amax.bits() >> 23) - (top >> 23) + above).at_least(lowest) + 127


@expression(I32, I32)
def _inverse(code):
    """Byte of the inverse of a power of two."""
    return 254 - code


@expression(F32, I32)
def _ue8m0_value(code):
    """Byte b as fp32: 2^(b - 127)."""
    return code.if_equal(0, 1 << 22, code << 23).floats()


@expression(F32, F32, int64)
def _at_least(amax, floor):
    """amax, or the floor's bits as fp32 where it is less. None of them is negative."""
    return amax.bits().at_least(floor).floats()


@expression(F32, I32)
def _held(x):
    """Integers, to be stored."""
    return x.floats()


@kernel
def scales_of(at, away, part):
    """Scales of a vector of blocks, whose largest magnitudes are at ``at``.

    There goes the multiplier or divisor of their values, ``away`` bytes behind it the stored scale as fp32, behind that
    its byte.
    """
    rule = part.scale
    top = splat(simd.float_of(part.largest))
    one = splat(np.float32(1))
    amax = _at_least(load(at), part.floor)
    if rule == params.POW2:
        code = _ue8m0(amax, part.largest, larger(-127, part.floor_exponent))
        store(at, _ue8m0_value(_inverse(code)))
        store(at + away, _ue8m0_value(code))
        store(at + 2 * away, _held(code))
    elif rule == params.PLAIN_FP32:
        scale = amax / top
        store(at, one / scale)
        store(at + away, scale)
    elif rule == params.E4M3_BYTE or rule == params.E4M3_TIMES or rule == params.E4M3_INVERSE:
        size, mantissa, bias, max_code, nan_code = _E4M3
        quotient = amax * (one / top) if rule == params.E4M3_TIMES else amax / top
        code = small_float(quotient, size, mantissa, bias, max_code, nan_code, 1)
        value = small_float_value(code, size, mantissa, bias, nan_code)
        inverse = simd.where_less(splat(np.float32(0)), value, one / value, value)
        store(at, inverse if rule == params.E4M3_INVERSE else value)
        store(at + away, value)
        store(at + 2 * away, _held(code))
    else:
        multiplier = top / amax
        store(at, multiplier)
        store(at + away, one / multiplier)


@inlined
def store_scale(address, stored, byte, part):
    """A scale, as fp32 or as the copies of its byte; returns the bytes written."""
    if part.scale_copies == 0:
        simd.store_scalar(address, stored)
    else:
        for i in range(part.scale_bytes):
            simd.store_byte(address + i, byte)
    return part.scale_bytes


@inlined
def _counted(x, finite):
    return _finite_bits(x) if finite else _bits(x)


@kernel
def largest(begin, end, finite):
    """The largest of the bits of |x| for fp32 begin .. end, infinity's or more if one is; of ``finite`` ones alone."""
    found = _counted(load(begin), finite)
    for i in range(begin + BYTES, end, BYTES):
        found = _larger(found, _counted(load(i), finite))
    return simd.largest_lane(found)
