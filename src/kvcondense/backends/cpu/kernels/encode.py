"""Stage 7 in Numba: a row to the bytes of its slot, for every cache format, by integer arithmetic on fp32 bits.

A format is a block of integers (``params``), made from its descriptor: which channels, which element, which scale rule,
which addresses. Codes and scales are those of ``formats.CacheFormat.encode``, bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import int64

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import fields, functions, simd
from kvcondense.backends.cpu.kernels.bf16 import bf16_code, round_bf16
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.integers import larger
from kvcondense.backends.cpu.kernels.lanes import Lanes, Operand, expression
from kvcondense.backends.cpu.kernels.simd import BYTES, F32, I32, LANES, load, splat, store

_call_at = fields.view(params.Call)
_MAGNITUDE, _INFINITY, _MANTISSA = 0x7FFFFFFF, 0x7F800000, 0x7FFFFF
_NAN = 0x7FC00000
_E4M3 = (8, 3, 7, 0x7E, 0x7F)
"""bits, mantissa, bias, max_code, nan_code of scales that are e4m3 bytes."""


def _magnitude(x: Lanes) -> Lanes:
    """Bits of |x|, those of infinity for NaN."""
    return (x.bits() & _MAGNITUDE).at_most(_INFINITY)


def _round_shift(n: Lanes, shift: Lanes, ties_to_even: Operand) -> Lanes:
    """n / 2^shift to the nearest integer, ties to the even one, or down."""
    odd = (n >> shift) & 1 & ties_to_even
    return (n + (1 << (shift - 1)) - 1 + odd) >> shift


def _scaled_integer(magnitude: Lanes, exponent: Operand, ties_to_even: Operand) -> Lanes:
    """round(|x| 2^exponent) from the bits of |x|; from 2^22 on something larger than that."""
    biased = magnitude >> 23
    full = (magnitude & _MANTISSA) | biased.if_less(1, 0, 1 << 23)
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
    return magnitude.if_less(_INFINITY, code | sign, nan_code.at_least(0))


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
    return magnitude.if_less(_INFINITY, code | sign, nan_code.at_least(0))


@expression(F32, I32, *[int64] * 4)
def small_float_value(code, size, mantissa, bias, nan_code):
    """The value of each code."""
    minus_zero = 1 << (size - 1)
    magnitude = code & (minus_zero - 1)
    normal = (magnitude << (23 - mantissa)) + ((127 - bias) << 23)
    step = ((128 - bias - mantissa) << 23).floats()
    value = magnitude.if_less(1 << mantissa, (magnitude.numbers() * step).bits(), normal)
    above = nan_code.if_less(0, value, magnitude.if_less(nan_code, value, _NAN))
    value = nan_code.if_equal(minus_zero, code.if_equal(nan_code, _NAN, value), above)
    return (value | ((code >> (size - 1)) << 31)).floats()


@expression(I32, F32)
def _whole(x):
    """Codes of ``formats.elements.Int8``."""
    magnitude = _magnitude(x)
    number = magnitude.if_less(_INFINITY, _scaled_integer(magnitude, 0, 1).at_most(127), 0)
    return x.bits().if_less(0, 0 - number, number)


@expression(I32, F32)
def _bits(x):
    """Bits of |x|."""
    return x.bits() & _MAGNITUDE


@expression(I32, F32)
def _finite_bits(x):
    """Bits of |x| where it is finite, else 0."""
    magnitude = x.bits() & _MAGNITUDE
    return magnitude.if_less(_INFINITY, magnitude, 0)


@expression(I32, I32, I32)
def _larger(x, y):
    """The larger of both."""
    return x.at_least(y)


@expression(F32, F32, int64)
def _clean(x, clean):
    """x, or 0 where it is NaN and nothing stored may be."""
    b = x.bits()
    return clean.if_equal(0, b, (b & _MAGNITUDE).if_less(_INFINITY + 1, b, 0)).floats()


@expression(F32, F32, int64)
def _finite(x, clean):
    """x, or the largest number of its sign where it is infinite and nothing stored may be."""
    b = x.bits()
    return clean.if_equal(0, b, (b & _MAGNITUDE).if_less(_INFINITY, b, b - 1)).floats()


@expression(F32, F32)
def _one_nan(x):
    """x with one NaN for all of them."""
    b = x.bits()
    return (b & _MAGNITUDE).if_less(_INFINITY + 1, b, _NAN).floats()


@kernel
def _power_of_two(amax_bits, part):
    """ceil(log2(amax / largest)), at least -127: it changes where the mantissa of amax passes that of largest."""
    largest = part.largest
    above = 1 if (amax_bits & _MANTISSA) > (largest & _MANTISSA) else 0
    exponent = (amax_bits >> 23) - (largest >> 23) + above
    return larger(exponent, larger(-127, part.floor_exponent))


@inlined
def _ue8m0(code):
    """Byte b as fp32: 2^(b - 127)."""
    return simd.float_of((1 << 22) if code == 0 else code << 23)


@inlined
def _small_float_codes(x, part):
    """``small_float`` as the part has it."""
    return small_float(
        x,
        part.bits,
        part.mantissa,
        part.bias,
        part.max_code,
        part.nan_code,
        part.ties_to_even,
    )


@kernel
def _plain_codes(begin, end, code, part, factor):
    """Codes of fp32 begin .. end, times or divided by ``factor``, of a part that ``_is_plain``."""
    size, mantissa, bias, divides = part.bits, part.mantissa, part.bias, part.divides
    top, nan, times = part.max_code, part.nan_code, splat(factor)
    i = begin
    while size == 8 and not divides and i + 4 * BYTES <= end:
        a = plain_small_float(load(i) * times, 8, mantissa, bias, top, nan)
        b = plain_small_float(load(i + BYTES) * times, 8, mantissa, bias, top, nan)
        c = plain_small_float(load(i + 2 * BYTES) * times, 8, mantissa, bias, top, nan)
        d = plain_small_float(load(i + 3 * BYTES) * times, 8, mantissa, bias, top, nan)
        simd.store_8s(code, a, b, c, d)
        i += 4 * BYTES
        code += 4 * LANES
    while i < end:
        x = load(i) / times if divides else load(i) * times
        value = plain_small_float(x, size, mantissa, bias, top, nan)
        if size == 4:
            simd.store_4(code, value)
            code += LANES // 2
        else:
            simd.store_8(code, value)
            code += LANES
        i += BYTES


@inlined
def _is_plain(part):
    """Whether ``_plain_codes`` takes the part: whose codes lie side by side, and whose values need no more care."""
    minus_zero = 1 << (part.bits - 1)
    usual = part.element == params.SMALL_FLOAT and part.ties_to_even and part.nan_code != minus_zero
    return usual and not part.clean and part.tile == 1 and part.scale >= 0


@kernel
def _store_codes(x, part, address):
    """Codes of a vector to ``address``; returns the bytes written."""
    element = part.element
    if element == params.SMALL_FLOAT:
        code = _small_float_codes(x, part)
        if part.bits == 4:
            simd.store_4(address, code)
            return LANES // 2
        simd.store_8(address, code)
        return LANES
    if element == params.WHOLE:
        simd.store_8(address, _whole(x))
        return LANES
    if element == params.PLAIN16:
        simd.store_16(address, bf16_code(x))
        return 2 * LANES
    store(address, _one_nan(x))
    return 4 * LANES


@inlined
def _code_value(x, part):
    """What a small float of the part gives back for x."""
    size, mantissa = part.bits, part.mantissa
    bias, nan_code = part.bias, part.nan_code
    return small_float_value(_small_float_codes(x, part), size, mantissa, bias, nan_code)


@kernel
def _scale_of(amax_bits, part):
    """(stored scale as fp32, multiplier or divisor of the values, byte of the scale) of a block."""
    rule = part.scale
    largest = simd.float_of(part.largest)
    amax = simd.float_of(amax_bits)
    if rule == params.POW2:
        exponent = _power_of_two(amax_bits, part)
        return _ue8m0(exponent + 127), _ue8m0(127 - exponent), exponent + 127
    if rule == params.PLAIN_FP32:
        scale = amax / largest
        return scale, np.float32(1) / scale, 0
    if rule == params.E4M3_BYTE or rule == params.E4M3_TIMES or rule == params.E4M3_INVERSE:
        size, mantissa, bias, max_code, nan_code = _E4M3
        quotient = amax / largest
        if rule == params.E4M3_TIMES:
            quotient = amax * (np.float32(1) / largest)
        code = small_float(splat(quotient), size, mantissa, bias, max_code, nan_code, 1)
        value = simd.first_lane(small_float_value(code, size, mantissa, bias, nan_code))
        factor = value
        if rule == params.E4M3_INVERSE and value > np.float32(0):
            factor = np.float32(1) / value
        return value, factor, simd.largest_lane(code)
    multiplier = largest / amax
    return np.float32(1) / multiplier, multiplier, 0


@inlined
def _store_scale(address, stored, byte, part):
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
def _largest(begin, end, finite):
    """The largest of the bits of |x| for fp32 begin .. end, infinity's or more if one is; of ``finite`` ones alone."""
    largest = _counted(load(begin), finite)
    for i in range(begin + BYTES, end, BYTES):
        largest = _larger(largest, _counted(load(i), finite))
    return simd.largest_lane(largest)


@kernel
def _part(row, part, code, scales, inner):
    """Encode the channels of one part: codes to ``code``, scales to ``scales``; ``inner``: bf16(q s) into the row."""
    rule = part.scale
    first, last = part.first, part.last
    block = part.block if rule >= 0 else last - first
    divides, clean, tile = part.divides, part.clean, part.tile
    plain = _is_plain(part) and not inner
    for at in range(first, last, block):
        begin, end = row + 4 * at, row + 4 * (at + block)
        stored, factor, byte = np.float32(1), np.float32(1), 0
        poisoned = False
        if rule == params.TENSOR:
            factor = part.tensor_scale
        elif rule >= 0:
            amax = _largest(begin, end, False)
            infinite = amax >= _INFINITY
            if infinite:
                amax = _largest(begin, end, True)
            amax = larger(amax, part.floor)
            stored, factor, byte = _scale_of(amax, part)
            if infinite and part.nan_code < 0 and not clean:
                poisoned = True
                stored = simd.float_of(_NAN)
                byte = part.scale_nan
        if plain and not poisoned:
            _plain_codes(begin, end, code, part, factor)
            code += block * part.bits // 8
        for i in range(end if plain and not poisoned else begin, end, BYTES):
            x = splat(np.float32(0)) if poisoned else _clean(load(i), clean)
            if divides:
                x = _finite(x / splat(factor), clean)
            elif rule >= 0:
                x = _finite(x * splat(factor), clean)
            if inner:
                if rule >= 0:
                    store(i, round_bf16(_code_value(x, part) * splat(stored)))
            elif tile > 1:  # a line of a tile, then the same line of the next one
                channel = (i - row) // 4 - first
                _store_codes(x, part, code + channel // tile * tile * tile + channel % tile)
            else:
                code += _store_codes(x, part, code)
        if rule >= 0 and rule != params.TENSOR and not inner:
            scales += _store_scale(scales, stored, byte, part)


@functions.entry
def entry(row, slot, block, work):
    """Encode the fp32 row at ``row`` and write it to cache slot ``slot`` of the call; ``work``: fp32 [d]."""
    call = _call_at(block)
    form = call.layer.format
    page_rows = form.page_rows
    page, at = slot // page_rows, slot % page_rows
    base = call.layer.cache + page * call.layer.page_stride
    outside = call.layer.scales
    inner = form.inner_count
    spec = call.layer.spec
    rounding = not spec.rounded and (form.round_row == 2 or (form.round_row and spec.round_row))
    if rounding or inner:
        last = form.parts[form.part_count - 1].last
        for i in range(0, 4 * last, BYTES):
            x = load(row + i)
            store(work + i, round_bf16(x) if rounding else x)
        row = work
    for k in range(inner):
        _part(row, form.parts[k], 0, 0, True)
    for k in range(inner, form.part_count):
        part = form.parts[k]
        code = (call.layer.second + page * call.layer.second_stride) if part.second else base
        code += part.code_base + part.code_stride * at
        if part.tile > 1:
            lane = at % part.tile
            code += (part.tile - part.code_stride) * lane
        scales = base + part.scale_base + part.scale_stride * at
        if outside:
            scales = outside + page * call.layer.scales_stride + 4 * at
        _part(row, part, code, scales, False)
    pad = base + form.pad_base + form.pad_stride * at
    for i in range(form.pad_bytes):
        simd.store_byte(pad + i, 0)
