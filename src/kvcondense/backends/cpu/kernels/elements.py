"""Elements of cache rows in vectors: codes of small floats and of int8, by integer arithmetic on fp32 bits.

They are those of ``formats.elements``, bit for bit.
"""

from __future__ import annotations

from numba import int64

from kvcondense.backends.cpu.kernels.lanes import Lanes, Operand, expression
from kvcondense.backends.cpu.kernels.simd import F32, I32

MAGNITUDE, INFINITY, MANTISSA = 0x7FFFFFFF, 0x7F800000, 0x7FFFFF
"""Of fp32: all bits but the sign; an infinity's; the mantissa's."""
NAN = 0x7FC00000


def _magnitude(x: Lanes) -> Lanes:
    """Bits of |x|, those of infinity for NaN."""
    return (x.bits() & MAGNITUDE).at_most(INFINITY)


def _round_shift(n: Lanes, shift: Lanes, ties_to_even: Operand) -> Lanes:
    """n / 2^shift to the nearest integer, ties to the even one, or down."""
    odd = (n >> shift) & 1 & ties_to_even
    return (n + (1 << (shift - 1)) - 1 + odd) >> shift


def _scaled_integer(magnitude: Lanes, exponent: Operand, ties_to_even: Operand) -> Lanes:
    """round(|x| 2^exponent) from the bits of |x|; from 2^22 on something larger than that."""
    biased = magnitude >> 23
    full = (magnitude & MANTISSA) | biased.if_less(1, 0, 1 << 23)
    shift = (150 - biased.at_least(1)) - exponent
    return _round_shift(full, shift.at_least(1).at_most(25), ties_to_even)


@expression(I32, F32, *[int64] * 6)
def small_float(x, size, mantissa, bias, max_code, nan_code, ties_to_even):
    """Codes of ``formats.elements.SmallFloat``."""
    magnitude = _magnitude(x)
    normal = _round_shift(magnitude - ((127 - bias) << 23), 23 - mantissa, ties_to_even)
    subnormal = _scaled_integer(magnitude, bias + mantissa - 1, ties_to_even)
    code = magnitude.if_less((128 - bias) << 23, subnormal, normal).at_most(max_code)
    minus_zero = 1 << (size - 1)
    sign = (x.bits() >> (32 - size)) & minus_zero
    sign = nan_code.if_equal(minus_zero, code.if_equal(0, 0, sign), sign)  # NaN stands where -0 would be
    return magnitude.if_less(INFINITY, code | sign, nan_code.at_least(0))


@expression(I32, F32, *[int64] * 5)
def plain_small_float(x, size, mantissa, bias, max_code, nan_code):
    """The same with ties to even and a -0.

    Below the least normal number, a sum with one whose last bit is a code's rounds as a code does.
    """
    magnitude = _magnitude(x)
    normal = _round_shift(magnitude - ((127 - bias) << 23), 23 - mantissa, 1)
    coarse = (151 - bias - mantissa) << 23
    subnormal = (magnitude.floats() + coarse.floats()).bits() - coarse
    code = magnitude.if_less((128 - bias) << 23, subnormal, normal).at_most(max_code)
    sign = (x.bits() >> (32 - size)) & (1 << (size - 1))
    return magnitude.if_less(INFINITY, code | sign, nan_code.at_least(0))


@expression(F32, I32, *[int64] * 4)
def small_float_value(code, size, mantissa, bias, nan_code):
    """The value of each code."""
    minus_zero = 1 << (size - 1)
    magnitude = code & (minus_zero - 1)
    normal = (magnitude << (23 - mantissa)) + ((127 - bias) << 23)
    step = ((128 - bias - mantissa) << 23).floats()
    value = magnitude.if_less(1 << mantissa, (magnitude.numbers() * step).bits(), normal)
    above = nan_code.if_less(0, value, magnitude.if_less(nan_code, value, NAN))
    value = nan_code.if_equal(minus_zero, code.if_equal(nan_code, NAN, value), above)
    return (value | ((code >> (size - 1)) << 31)).floats()


@expression(I32, F32)
def whole(x):
    """Codes of ``formats.elements.Int8``."""
    magnitude = _magnitude(x)
    number = magnitude.if_less(INFINITY, _scaled_integer(magnitude, 0, 1).at_most(127), 0)
    return x.bits().if_less(0, 0 - number, number)


@expression(F32, I32)
def whole_value(code):
    """The value of each code of int8."""
    return code.numbers()


@expression(F32, F32)
def one_nan(x):
    """x with one NaN for all of them."""
    b = x.bits()
    return (b & MAGNITUDE).if_less(INFINITY + 1, b, NAN).floats()
