"""Stage 7 in Triton: a row to the bytes of its slot, for every cache format, by integer arithmetic on fp32 bits.

Codes and scales are those of ``formats.CacheFormat.encode``, bit for bit, on every architecture: divisions are rounded
as IEEE has it, everything else is integers. HARDWARE lets the chip's own cast find codes, which is for a device where
a test has shown that all of them are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.bits import bf16_bits, from_bits, round_bf16, store_bytes, to_bits


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, those of infinity for NaN."""
    return tl.minimum(to_bits(x) & 0x7FFFFFFF, 0x7F800000)


@triton.jit
def round_shift(n, shift, TIES_TO_EVEN: tl.constexpr):
    """n / 2^shift to the nearest integer, ties to the even one, or down."""
    if TIES_TO_EVEN:
        n += (n >> shift) & 1
    return (n + (1 << (shift - 1)) - 1) >> shift


@triton.jit
def scaled_integer(magnitude, EXPONENT: tl.constexpr, TIES_TO_EVEN: tl.constexpr):
    """round(|x| 2^EXPONENT) from the bits of |x|; from 2^22 on something larger than that."""
    biased = magnitude >> 23
    full = (magnitude & 0x7FFFFF) | tl.where(biased > 0, 0x800000, 0)
    shift = tl.minimum(tl.maximum(150 - EXPONENT - tl.maximum(biased, 1), 1), 25)
    return round_shift(full, shift, TIES_TO_EVEN)


@triton.jit
def small_float(x, part: tl.constexpr, HARDWARE: tl.constexpr):
    """Codes of ``formats.elements.SmallFloat``, as int32. HARDWARE: for e4m3, and for e2m1 with ties to even."""
    BITS: tl.constexpr = part.value.bits
    MANTISSA: tl.constexpr = part.value.mantissa
    BIAS: tl.constexpr = part.value.bias
    MAX_CODE: tl.constexpr = part.value.max_code
    NAN_CODE: tl.constexpr = part.value.nan_code
    TIES_TO_EVEN: tl.constexpr = part.value.ties_to_even
    b, magnitude = to_bits(x), magnitude_bits(x)
    if HARDWARE and BITS == 4:  # of two floats, the second one in the low nibble
        code = tl.inline_asm_elementwise(
            "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, 0f00000000, $1; cvt.u32.u8 $0, t; }",
            "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif HARDWARE:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        rebiased = magnitude - ((127 - BIAS) << 23)
        normal = round_shift(rebiased, 23 - MANTISSA, TIES_TO_EVEN)
        if TIES_TO_EVEN:  # a sum with a number whose last bit is a code's rounds as a code does
            COARSE: tl.constexpr = (151 - BIAS - MANTISSA) << 23
            subnormal = to_bits(from_bits(magnitude) + from_bits(magnitude * 0 + COARSE)) - COARSE
        else:
            subnormal = scaled_integer(magnitude, BIAS + MANTISSA - 1, TIES_TO_EVEN)
        code = tl.where(magnitude >= ((128 - BIAS) << 23), normal, subnormal)
        code = tl.minimum(code, MAX_CODE)
        sign = (b >> (32 - BITS)) & (1 << (BITS - 1))
        if NAN_CODE == 1 << (BITS - 1):  # that is where -0 would be
            sign = tl.where(code > 0, sign, 0)
        code = code | sign
    NAN: tl.constexpr = NAN_CODE if NAN_CODE > 0 else 0
    return tl.where(magnitude >= 0x7F800000, NAN, code)


@triton.jit
def small_float_value(code, part: tl.constexpr):
    """The value of each code."""
    BITS: tl.constexpr = part.value.bits
    MANTISSA: tl.constexpr = part.value.mantissa
    BIAS: tl.constexpr = part.value.bias
    NAN_CODE: tl.constexpr = part.value.nan_code
    magnitude = code & ((1 << (BITS - 1)) - 1)
    normal = (magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)
    step = from_bits(magnitude * 0 + ((128 - BIAS - MANTISSA) << 23))
    subnormal = to_bits(magnitude.to(tl.float32) * step)
    value = tl.where(magnitude < (1 << MANTISSA), subnormal, normal)
    if NAN_CODE == 1 << (BITS - 1):
        value = tl.where(code == NAN_CODE, 0x7FC00000, value)
    elif NAN_CODE > 0:
        value = tl.where(magnitude >= NAN_CODE, 0x7FC00000, value)
    return from_bits(value | ((code >> (BITS - 1)) << 31))


@triton.jit
def whole(x):
    """Codes of ``formats.elements.Int8``, as int32."""
    magnitude = magnitude_bits(x)
    number = tl.minimum(scaled_integer(magnitude, 0, 1), 127)
    number = tl.where(magnitude >= 0x7F800000, 0, number)
    return tl.where(to_bits(x) < 0, -number, number)


@triton.jit
def plain32(x):
    """fp32 bits, one NaN."""
    b = to_bits(x)
    return tl.where((b & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, b)


@triton.jit
def power_of_two(exponent):
    """2^exponent, -127 .. 127, as fp32."""
    return from_bits(tl.where(exponent == -127, 0x400000, (exponent + 127) << 23))


@triton.jit
def scale_of(amax_bits, part: tl.constexpr, scale_part: tl.constexpr):
    """(bits as they are stored, value, what the channels are multiplied with or divided by) of each block's scale."""
    SCALE: tl.constexpr = part.value.scale
    LARGEST: tl.constexpr = part.value.largest
    LEAST: tl.constexpr = part.value.floor_exponent
    COPIES: tl.constexpr = part.value.scale_copies
    POW2: tl.constexpr = part.value.pow2
    E4M3_SCALE: tl.constexpr = part.value.e4m3_scale
    amax = from_bits(amax_bits)
    largest = from_bits(amax_bits * 0 + LARGEST)
    if POW2:
        # ceil(log2(amax / largest)) changes where the mantissa of amax passes that of largest.
        above = tl.where((amax_bits & 0x7FFFFF) > (LARGEST & 0x7FFFFF), 1, 0)
        exponent = (amax_bits >> 23) - (LARGEST >> 23) + above
        exponent = tl.maximum(tl.maximum(exponent, -127), LEAST)
        value = power_of_two(exponent)
        factor = power_of_two(-exponent)
        stored = to_bits(value)
        if COPIES > 0:
            stored = (exponent + 127) * COPIES
    elif SCALE == "PLAIN_FP32":
        value = tl.div_rn(amax, largest)
        factor = tl.div_rn(from_bits(amax_bits * 0 + 0x3F800000), value)
        stored = to_bits(value)
    elif E4M3_SCALE:
        quotient = tl.div_rn(amax, largest)
        if SCALE == "E4M3_TIMES":
            INVERSE: tl.constexpr = part.value.inverse
            quotient = amax * from_bits(amax_bits * 0 + INVERSE)
        stored = small_float(quotient, scale_part, False)
        value = small_float_value(stored, scale_part)
        factor = value
        if SCALE == "E4M3_INVERSE":
            one = from_bits(amax_bits * 0 + 0x3F800000)
            factor = tl.where(value > 0.0, tl.div_rn(one, tl.where(value > 0.0, value, one)), 0.0)
    else:
        factor = tl.div_rn(largest, amax)
        value = tl.div_rn(from_bits(amax_bits * 0 + 0x3F800000), factor)
        stored = to_bits(value)
    return stored, value, factor


@triton.jit
def codes_of(x, c: tl.constexpr, part: tl.constexpr):
    """Codes of the part's element, as int32."""
    ELEMENT: tl.constexpr = part.value.element
    BIAS: tl.constexpr = part.value.bias
    TIES_TO_EVEN: tl.constexpr = part.value.ties_to_even
    E4M3: tl.constexpr = c.value.casts_e4m3
    E2M1: tl.constexpr = c.value.casts_e2m1
    BF16: tl.constexpr = c.value.casts_bf16
    if ELEMENT == "small_float":
        code = small_float(x, part, (E4M3 and BIAS == 7) or (E2M1 and (BIAS == 1 and TIES_TO_EVEN)))
    elif ELEMENT == "whole":
        code = whole(x)
    elif ELEMENT == "plain16":
        code = bf16_bits(x, BF16) >> 16
    else:
        code = plain32(x)
    return code


@triton.jit
def put_codes(code, pointer, part: tl.constexpr, D: tl.constexpr):
    """Codes [d] of a part to ``pointer``, where channel 0 of the row would have its code."""
    FIRST: tl.constexpr = part.value.first
    LAST: tl.constexpr = part.value.last
    ELEMENT: tl.constexpr = part.value.element
    BITS: tl.constexpr = part.value.bits
    TILE: tl.constexpr = part.value.tile
    if ELEMENT == "small_float" and BITS == 4:
        pair = tl.arange(0, D // 2)
        # The even channel in the low nibble.
        shifted = tl.reshape(code << (4 * (tl.arange(0, D) % 2)), (D // 2, 2))
        mine = (pair >= FIRST // 2) & (pair < LAST // 2)
        store_bytes(pointer, tl.sum(shifted, axis=1), mine, D // 2, 1)
    elif TILE > 1:  # one row of each tile
        channel = tl.arange(0, D)
        place = TILE * TILE * (channel // TILE) + channel % TILE
        tl.store(pointer + place, code.to(tl.uint8), mask=(channel >= FIRST) & (channel < LAST))
    else:
        channel = tl.arange(0, D)
        WIDTH: tl.constexpr = 4 if ELEMENT == "plain32" else (2 if ELEMENT == "plain16" else 1)
        store_bytes(pointer, code, (channel >= FIRST) & (channel < LAST), D, WIDTH)


@triton.jit
def put_scales(stored, page, at, page_base, scales, scales_stride, c: tl.constexpr, part: tl.constexpr):
    """Stored scales [blocks] of a part: to the page, or to the tensor beside the pages."""
    D: tl.constexpr = c.value.head_dim
    BLOCK: tl.constexpr = part.value.block
    FIRST: tl.constexpr = part.value.first
    LAST: tl.constexpr = part.value.last
    WIDTH: tl.constexpr = part.value.scale_bytes
    BASE: tl.constexpr = part.value.scale_base
    STRIDE: tl.constexpr = part.value.scale_stride
    OUTSIDE: tl.constexpr = c.value.rows_map.scales_outside
    block = tl.arange(0, D // BLOCK)
    mine = (block >= FIRST // BLOCK) & (block < LAST // BLOCK)
    if OUTSIDE:
        tl.store(scales + page * scales_stride + at + block, from_bits(stored), mask=mine)
    else:
        store_bytes(page_base + (BASE + STRIDE * at), stored, mine, D // BLOCK, WIDTH)


@triton.jit
def through_part(row, c: tl.constexpr, K: tl.constexpr):
    """Row [d] with the channels of inner part K as bf16(q * s)."""
    part: tl.constexpr = c.value.rows_map.inner[K]
    D: tl.constexpr = c.value.head_dim
    BLOCK: tl.constexpr = part.value.block
    SCALE: tl.constexpr = part.value.scale
    FIRST: tl.constexpr = part.value.first
    LAST: tl.constexpr = part.value.last
    ELEMENT: tl.constexpr = part.value.element
    if SCALE != "":
        code, stored, value = codes_and_scales(row, c, part)
        code = tl.reshape(code, (D // BLOCK, BLOCK))
        if ELEMENT == "whole":
            back = code.to(tl.float32)
        else:
            back = small_float_value(code, part)
        back = back * value[:, None]
        channel = tl.arange(0, D)
        row = tl.where((channel >= FIRST) & (channel < LAST), round_bf16(tl.reshape(back, (D,)), c), row)
    return row


@triton.jit
def numbers_of(x):
    """x; 0 for a NaN, which a scale of 0 makes of 0, too; the largest number of its sign for an infinity."""
    b = to_bits(x)
    b = tl.where((b & 0x7FFFFFFF) == 0x7F800000, b - 1, b)
    return tl.where(x == x, from_bits(b), 0.0)


@triton.jit
def codes_and_scales(row, c: tl.constexpr, part: tl.constexpr):
    """Of row [d] in blocks of the part: codes [d], and scales [blocks] as they are stored and as values."""
    scale_part: tl.constexpr = c.value.scale_part
    D: tl.constexpr = c.value.head_dim
    BLOCK: tl.constexpr = part.value.block
    NAN_CODE: tl.constexpr = part.value.nan_code
    FLOOR: tl.constexpr = part.value.floor
    DIVIDES: tl.constexpr = part.value.divides
    CLEAN: tl.constexpr = part.value.clean
    COPIES: tl.constexpr = part.value.scale_copies
    NAN: tl.constexpr = part.value.scale_nan
    x = tl.reshape(row, (D // BLOCK, BLOCK))
    magnitude = magnitude_bits(x)
    amax = tl.max(tl.where(magnitude < 0x7F800000, magnitude, 0), axis=1)
    stored, value, factor = scale_of(tl.maximum(amax, FLOOR), part, scale_part)
    if DIVIDES:
        x = tl.div_rn(x, tl.broadcast_to(factor[:, None], (D // BLOCK, BLOCK)))
    else:
        x = x * factor[:, None]
    if CLEAN:
        x = numbers_of(x)
    elif NAN_CODE < 0:  # elements without a NaN: the scale says so
        poisoned = tl.max(magnitude, axis=1) >= 0x7F800000
        x = tl.where(poisoned[:, None], 0.0, x)
        value = tl.where(poisoned, from_bits(amax * 0 + 0x7FC00000), value)
        stored = tl.where(poisoned, NAN * COPIES if COPIES > 0 else 0x7FC00000, stored)
    return tl.reshape(codes_of(x, c, part), (D,)), stored, value


@triton.jit
def put_part(row, page, at, page_base, scales, scales_stride, c: tl.constexpr, K: tl.constexpr):
    """Encode and store part K of row [d]; ``scales``: bytes beside the pages, where the part lies there."""
    part: tl.constexpr = c.value.rows_map.parts[K]
    D: tl.constexpr = c.value.head_dim
    SCALE: tl.constexpr = part.value.scale
    BASE: tl.constexpr = part.value.code_base
    STRIDE: tl.constexpr = part.value.code_stride
    TILE: tl.constexpr = part.value.tile
    FIRST: tl.constexpr = part.value.first
    BITS: tl.constexpr = part.value.bits
    CLEAN: tl.constexpr = part.value.clean
    if part.value.second:
        pointer = scales + page * scales_stride + (BASE + STRIDE * at)
    else:
        pointer = page_base + (BASE + STRIDE * at)
    if CLEAN:
        row = tl.where(row == row, row, 0.0)
    if TILE > 1:
        pointer = page_base + (BASE + STRIDE * (at - at % TILE) + TILE * (at % TILE))
    if SCALE == "":
        code = codes_of(row, c, part)
    elif SCALE == "TENSOR":
        scaled = tl.div_rn(row, tl.zeros_like(row) + tl.load(scales))
        if CLEAN:
            scaled = numbers_of(scaled)
        code = codes_of(scaled, c, part)
    else:
        code, stored, value = codes_and_scales(row, c, part)
        put_scales(stored, page, at, page_base, scales, scales_stride, c, part)
    BEFORE: tl.constexpr = FIRST * BITS // 8
    put_codes(code, pointer - BEFORE, part, D)


@triton.jit
def put(row, slot, cache, scales, page_stride, scales_stride, c: tl.constexpr):
    """Encode row [d] and write it to cache slot ``slot`` (int64)."""
    PAGE_ROWS: tl.constexpr = c.value.rows_map.page_rows
    ROUND: tl.constexpr = c.value.rounds_rows
    INNER: tl.constexpr = len(c.value.rows_map.inner)
    PARTS: tl.constexpr = len(c.value.rows_map.parts)
    PAD_BASE: tl.constexpr = c.value.rows_map.pad_base
    PAD_STRIDE: tl.constexpr = c.value.rows_map.pad_stride
    PAD: tl.constexpr = c.value.rows_map.pad_bytes
    page, at = slot // PAGE_ROWS, slot % PAGE_ROWS
    page_base = cache + page * page_stride
    if ROUND:
        row = round_bf16(row, c)
    for k in tl.static_range(INNER):
        row = through_part(row, c, k)
    for k in tl.static_range(PARTS):
        put_part(row, page, at, page_base, scales, scales_stride, c, k)
    for i in tl.static_range(PAD):
        tl.store(page_base + (PAD_BASE + PAD_STRIDE * at + i), 0)
