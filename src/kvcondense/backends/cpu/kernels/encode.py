"""Stage 7 in Numba: a row to the bytes of its slot, for every cache format, by integer arithmetic on fp32 bits.

A format is a block of integers (``params``), made from its descriptor: which channels, which element, which scale rule,
which addresses. Codes and scales are those of ``formats.CacheFormat.encode``, bit for bit.
"""

from __future__ import annotations

import numpy as np

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.pool import inlined, kernel
from kvcondense.backends.cpu.kernels.row import bf16_code, round_bf16
from kvcondense.backends.cpu.kernels.simd import BYTES, LANES, isplat, load, splat, store

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_MANTISSA = np.int32(0x7FFFFF)
_NAN = 0x7FC00000
_E4M3 = (8, 3, 7, 0x7E, 0x7F)
"""bits, mantissa, bias, max_code, nan_code of scales that are e4m3 bytes."""


@inlined
def _magnitude(x):
    """Bits of |x|, those of infinity for NaN."""
    m = simd.bits(x) & isplat(_MAGNITUDE)
    return simd.iwhere_less(isplat(_INFINITY), m, isplat(_INFINITY), m)


@inlined
def _round_shift(n, shift, ties_to_even):
    """n / 2^shift to the nearest integer, ties to the even one, or down."""
    one = isplat(np.int32(1))
    odd = simd.shift_right(n, shift) & one & isplat(np.int32(ties_to_even))
    return simd.shift_right(n + simd.shift_left(one, shift - one) - one + odd, shift)


@inlined
def _scaled_integer(magnitude, exponent, ties_to_even):
    """round(|x| 2^exponent) from the bits of |x|; from 2^22 on something larger than that."""
    one = isplat(np.int32(1))
    biased = simd.shift_right(magnitude, isplat(np.int32(23)))
    normal = simd.iwhere_less(biased, one, isplat(np.int32(0)), isplat(np.int32(1 << 23)))
    full = (magnitude & isplat(_MANTISSA)) | normal
    shift = isplat(np.int32(150 - exponent)) - simd.iwhere_less(biased, one, one, biased)
    shift = simd.iwhere_less(shift, one, one, shift)
    limit = isplat(np.int32(25))
    return _round_shift(full, simd.iwhere_less(limit, shift, limit, shift), ties_to_even)


@inlined
def small_float(x, size, mantissa, bias, max_code, nan_code, ties_to_even):
    """Codes of ``formats.elements.SmallFloat``."""
    b, magnitude = simd.bits(x), _magnitude(x)
    rebiased = magnitude - isplat(np.int32((127 - bias) << 23))
    normal = _round_shift(rebiased, isplat(np.int32(23 - mantissa)), ties_to_even)
    subnormal = _scaled_integer(magnitude, bias + mantissa - 1, ties_to_even)
    code = simd.iwhere_less(magnitude, isplat(np.int32((128 - bias) << 23)), subnormal, normal)
    largest = isplat(np.int32(max_code))
    code = simd.iwhere_less(largest, code, largest, code)
    sign = simd.shift_right(b, isplat(np.int32(32 - size))) & isplat(np.int32(1 << (size - 1)))
    if nan_code == 1 << (size - 1):  # that is where -0 would be
        sign = simd.iwhere_less(isplat(np.int32(0)), code, sign, isplat(np.int32(0)))
    return simd.iwhere_less(magnitude, isplat(_INFINITY), code | sign, isplat(np.int32(max(nan_code, 0))))


@kernel
def small_float_value(code, size, mantissa, bias, nan_code):
    """The value of each code."""
    magnitude = code & isplat(np.int32((1 << (size - 1)) - 1))
    shifted = simd.shift_left(magnitude, isplat(np.int32(23 - mantissa)))
    normal = simd.from_bits(shifted + isplat(np.int32((127 - bias) << 23)))
    step = splat(simd.float_of((128 - bias - mantissa) << 23))
    subnormal = simd.to_float(magnitude) * step
    value = simd.bits(normal)
    value = simd.iwhere_less(magnitude, isplat(np.int32(1 << mantissa)), simd.bits(subnormal), value)
    if nan_code == 1 << (size - 1):
        only = isplat(np.int32(nan_code))
        value = simd.iwhere_less(code, only, value, simd.iwhere_less(only, code, value, isplat(np.int32(_NAN))))
    elif nan_code >= 0:
        value = simd.iwhere_less(isplat(np.int32(nan_code - 1)), magnitude, isplat(np.int32(_NAN)), value)
    sign = simd.shift_left(simd.shift_right(code, isplat(np.int32(size - 1))), isplat(np.int32(31)))
    return simd.from_bits(value | sign)


@inlined
def _whole(x):
    """Codes of ``formats.elements.Int8``."""
    b, magnitude = simd.bits(x), _magnitude(x)
    number = _scaled_integer(magnitude, 0, 1)
    largest, zero = isplat(np.int32(127)), isplat(np.int32(0))
    number = simd.iwhere_less(largest, number, largest, number)
    number = simd.iwhere_less(magnitude, isplat(_INFINITY), number, zero)
    return simd.iwhere_less(b, zero, zero - number, number)


@kernel
def _power_of_two(amax_bits, part):
    """ceil(log2(amax / largest)), at least -127: it changes where the mantissa of amax passes that of largest."""
    largest = part.largest
    above = 1 if (amax_bits & _MANTISSA) > (largest & _MANTISSA) else 0
    exponent = (amax_bits >> 23) - (largest >> 23) + above
    return max(exponent, max(-127, part.floor_exponent))


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
    """Codes of fp32 begin .. end, times ``factor``: ``small_float`` with ties to even, whose NaN is no -0.

    Below the least normal number, a sum with one whose last bit is a code's rounds as a code does.
    """
    mantissa, bias = part.mantissa, part.bias
    one, infinity, sign = isplat(np.int32(1)), isplat(_INFINITY), isplat(np.int32(1 << (part.bits - 1)))
    shift, away = isplat(np.int32(23 - mantissa)), isplat(np.int32(32 - part.bits))
    below, least = isplat(np.int32((1 << (22 - mantissa)) - 1)), isplat(np.int32((128 - bias) << 23))
    rebias, nan = isplat(np.int32((127 - bias) << 23)), isplat(np.int32(max(part.nan_code, 0)))
    sum_of, largest = isplat(np.int32((151 - bias - mantissa) << 23)), isplat(np.int32(part.max_code))
    times = splat(factor)
    for i in range(begin, end, BYTES):
        x = load(i) * times
        b, magnitude = simd.bits(x), _magnitude(x)
        n = magnitude - rebias
        normal = simd.shift_right(n + below + (simd.shift_right(n, shift) & one), shift)
        subnormal = simd.bits(simd.from_bits(magnitude) + simd.from_bits(sum_of)) - sum_of
        value = simd.iwhere_less(magnitude, least, subnormal, normal)
        value = simd.iwhere_less(largest, value, largest, value) | (simd.shift_right(b, away) & sign)
        value = simd.iwhere_less(magnitude, infinity, value, nan)
        if part.bits == 4:
            simd.store_4(code, value)
            code += LANES // 2
        else:
            simd.store_8(code, value)
            code += LANES


@inlined
def _is_plain(part):
    """Whether ``_plain_codes`` takes the part: whose codes lie side by side, and whose values need no more care."""
    minus_zero = 1 << (part.bits - 1)
    usual = part.element == params.SMALL_FLOAT and part.ties_to_even and part.nan_code != minus_zero
    return usual and not part.divides and not part.clean and part.tile == 1 and part.scale >= 0


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
    nan = isplat(np.int32(_NAN))
    bits = simd.bits(x)
    store(address, simd.from_bits(simd.iwhere_less(isplat(_INFINITY), bits & isplat(_MAGNITUDE), nan, bits)))
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
    if rule in (params.E4M3_BYTE, params.E4M3_TIMES, params.E4M3_INVERSE):
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
def _clean(x, clean):
    """x, or 0 where it is NaN and nothing stored may be."""
    if clean:
        zero, b = isplat(np.int32(0)), simd.bits(x)
        return simd.from_bits(simd.iwhere_less(isplat(_INFINITY), b & isplat(_MAGNITUDE), zero, b))
    return x


@inlined
def _finite(x, clean):
    """x, or the largest number of its sign where it is infinite and nothing stored may be."""
    if clean:
        b = simd.bits(x)
        magnitude, least = b & isplat(_MAGNITUDE), isplat(np.int32(_INFINITY - 1))
        return simd.from_bits(simd.iwhere_less(least, magnitude, b - isplat(np.int32(1)), b))
    return x


@inlined
def _store_scale(address, stored, byte, part):
    """A scale, as fp32 or as the copies of its byte; returns the bytes written."""
    if part.scale_copies == 0:
        simd.store_scalar(address, stored)
    else:
        for i in range(part.scale_bytes):
            simd.store_byte(address + i, byte)
    return part.scale_bytes


@kernel
def _largest(begin, end, below):
    """The largest of the bits of |x| that are less than ``below``, for fp32 begin .. end."""
    largest, limit = isplat(np.int32(0)), isplat(np.int32(below))
    for i in range(begin, end, BYTES):
        m = _magnitude(load(i))
        m = simd.iwhere_less(m, limit, m, isplat(np.int32(0)))
        largest = simd.iwhere_less(largest, m, m, largest)
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
            amax = _largest(begin, end, _INFINITY + 1)
            infinite = amax >= _INFINITY
            if infinite:
                amax = _largest(begin, end, _INFINITY)
            amax = max(amax, part.floor)
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


@kernel
def put(row, slot, call, work):
    """Encode the fp32 row at ``row`` and write it to cache slot ``slot`` of the call."""
    form = call.layer.format
    page_rows = form.page_rows
    page, at = slot // page_rows, slot % page_rows
    base = call.layer.cache + page * call.layer.page_stride
    outside = call.layer.scales
    inner = form.inner_count
    rounding = form.round_row == 2 or (form.round_row and call.layer.spec.round_row)
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
