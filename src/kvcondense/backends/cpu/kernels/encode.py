"""Stage 7 in Numba: a row to the bytes of its slot, for every cache format, by integer arithmetic on fp32 bits.

A format is a block of integers (``params``), made from its descriptor: which channels, which element, which scale rule,
which addresses. Codes and scales are those of ``formats.CacheFormat.encode``, bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import int64

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.blocks import LINE
from kvcondense.backends.cpu.kernels import fields, functions, simd
from kvcondense.backends.cpu.kernels.ahead import ask, wanted
from kvcondense.backends.cpu.kernels.bf16 import bf16_code, round_bf16
from kvcondense.backends.cpu.kernels.elements import (
    INFINITY,
    MAGNITUDE,
    NAN,
    one_nan,
    plain_small_float,
    small_float,
    small_float_value,
    whole,
    whole_value,
)
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.lanes import expression
from kvcondense.backends.cpu.kernels.scales import largest, scales_of, store_scale
from kvcondense.backends.cpu.kernels.simd import BYTES, F32, LANES, load, splat, store

_call_at, _room_at = fields.view(params.Call), fields.view(params.Room)


@expression(F32, F32, int64)
def _clean(x, clean):
    """x, or 0 where it is NaN and nothing stored may be."""
    b = x.bits()
    return clean.if_equal(0, b, (b & MAGNITUDE).if_less(INFINITY + 1, b, 0)).floats()


@expression(F32, F32, int64)
def _finite(x, clean):
    """x; if nothing stored may be NaN or infinite 0 for a NaN, which a scale of 0 makes of 0, too, and else the
    largest number of its sign.
    """
    b = x.bits()
    largest = (b & MAGNITUDE).if_less(INFINITY, b, b - 1)
    return clean.if_equal(0, b, (b & MAGNITUDE).if_less(INFINITY + 1, largest, 0)).floats()


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


@inlined
def _plain_code(x, part, size):
    """``plain_small_float`` as the part has it, of ``size`` bits."""
    return plain_small_float(x, size, part.mantissa, part.bias, part.max_code, part.nan_code)


@inlined
def _factor(at):
    """An fp32 in every lane."""
    return splat(simd.load_scalar(at))


@kernel
def _plain_codes(row, part, code, room):
    """Codes of a part that ``_is_plain``: of its vectors, times or divided by the room's ``factors``."""
    size, divides, asking = part.bits, part.divides, wanted(room, 6)
    i, end, factors = row + 4 * part.first, row + 4 * part.last, room.factors
    while i + 4 * BYTES <= end:
        if asking:
            for at in range(i - row, i - row + 4 * BYTES, LINE):
                ask(room, 6, at)
        a, b, c, d = load(i), load(i + BYTES), load(i + 2 * BYTES), load(i + 3 * BYTES)
        s, t, u, v = _factor(factors), _factor(factors + 4), _factor(factors + 8), _factor(factors + 12)
        if divides:
            a, b, c, d = a / s, b / t, c / u, d / v
        else:
            a, b, c, d = a * s, b * t, c * u, d * v
        if size == 8:
            a, b = _plain_code(a, part, 8), _plain_code(b, part, 8)
            c, d = _plain_code(c, part, 8), _plain_code(d, part, 8)
            simd.store_8s(code, a, b, c, d)
            code += 4 * LANES
        else:
            a, b = _plain_code(a, part, 4), _plain_code(b, part, 4)
            c, d = _plain_code(c, part, 4), _plain_code(d, part, 4)
            simd.store_4s(code, a, b, c, d)
            code += 2 * LANES
        i += 4 * BYTES
        factors += 16
    while i < end:
        factor = _factor(factors)
        value = _plain_code(load(i) / factor if divides else load(i) * factor, part, size)
        if size == 4:
            simd.store_4(code, value)
            code += LANES // 2
        else:
            simd.store_8(code, value)
            code += LANES
        i += BYTES
        factors += 4


@inlined
def _is_plain(part):
    """Whether ``_plain_codes`` takes the part: bytes or nibbles side by side, of values that need no more care."""
    minus_zero = 1 << (part.bits - 1)
    small = part.element == params.SMALL_FLOAT and (part.bits == 8 or part.bits == 4)
    usual = small and part.ties_to_even and part.nan_code != minus_zero
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
        simd.store_8(address, whole(x))
        return LANES
    if element == params.PLAIN16:
        simd.store_16(address, bf16_code(x))
        return 2 * LANES
    store(address, one_nan(x))
    return 4 * LANES


@inlined
def _code_value(x, part):
    """What the part's element gives back for x."""
    if part.element == params.WHOLE:
        return whole_value(whole(x))
    size, mantissa = part.bits, part.mantissa
    bias, nan_code = part.bias, part.nan_code
    return small_float_value(_small_float_codes(x, part), size, mantissa, bias, nan_code)


@kernel
def _constant(part, room, inner):
    """The room's ``factors`` of a part without scales of blocks."""
    asking = wanted(room, 4) and not inner
    for i in range(4 * part.first, 4 * part.last, BYTES):
        if asking:
            ask(room, 4, i)
        simd.store_scalar(room.factors + (i - 4 * part.first) // LANES, part.tensor_scale)


@kernel
def _scales(row, part, scales, room, inner):
    """Scales of a part's blocks: to the room, and to ``scales`` if not ``inner``. Returns how many blocks have none.

    Those are what is not finite, of elements that have no NaN. Stage by stage for all blocks, so that what each of them
    waits for is waited for together: its largest magnitude, its scale in a vector with others', what is stored.
    """
    size, begin, end = 4 * part.block, row + 4 * part.first, row + 4 * part.last
    at, away, factors = room.scales, room.scales_away, room.factors
    asking = wanted(room, 4) and not inner
    infinite = 0
    for block in range(begin, end, size):
        if asking:
            for i in range(block - row, block + size - row, LINE):
                ask(room, 4, i)
        amax = largest(block, block + size, False)
        if amax >= INFINITY:
            infinite += 1
            amax = largest(block, block + size, True)
        simd.store_scalar(at, simd.float_of(amax))
        at += 4
    beyond = at
    for at in range(room.scales, beyond, BYTES):
        scales_of(at, away, part)
    if part.nan_code >= 0 or part.clean:
        infinite = 0
    at = room.scales
    for block in range(begin, end, size):
        if infinite and largest(block, block + size, False) >= INFINITY:
            simd.store_scalar(at + away, simd.float_of(NAN))
            simd.store_byte(at + 2 * away, part.scale_nan)
        if not inner:
            scales += store_scale(scales, simd.load_scalar(at + away), simd.load_byte(at + 2 * away), part)
        factor = simd.load_scalar(at)
        for _ in range(0, size, BYTES):
            simd.store_scalar(factors, factor)
            factors += 4
        at += 4
    return infinite


@kernel
def _codes(row, part, code, room, inner):
    """``_plain_codes`` of any part; ``inner``: bf16(q s) into the row instead."""
    first, last, rule = part.first, part.last, part.scale
    of_blocks = rule >= 0 and rule != params.TENSOR
    block = part.block if of_blocks else last - first
    divides, clean, tile = part.divides, part.clean, part.tile
    factors, stored = room.factors, np.float32(1)
    asking = wanted(room, 6) and not inner
    for at in range(first, last, block):
        begin, end = row + 4 * at, row + 4 * (at + block)
        if of_blocks:  # NaN: the block has none
            stored = simd.load_scalar(room.scales + room.scales_away + 4 * ((at - first) // block))
        for i in range(begin, end, BYTES):
            if asking:
                ask(room, 6, i - row)
            x = load(i) if stored == stored else splat(np.float32(0))
            if divides:
                x = _finite(x / _factor(factors), clean)
            elif rule >= 0:
                x = _finite(x * _factor(factors), clean)
            else:
                x = _clean(x, clean)
            factors += 4
            if inner:
                if rule >= 0:
                    store(i, round_bf16(_code_value(x, part) * splat(stored)))
            elif tile > 1:  # a line of a tile, then the same line of the next one
                channel = (i - row) // 4 - first
                _store_codes(x, part, code + channel // tile * tile * tile + channel % tile)
            else:
                code += _store_codes(x, part, code)


@kernel
def _part(row, part, code, scales, inner, room):
    """Encode the channels of one part: codes to ``code``, scales to ``scales``; ``inner``: bf16(q s) into the row."""
    none = 0
    if part.scale >= 0 and part.scale != params.TENSOR:
        none = _scales(row, part, scales, room, inner)
    else:
        _constant(part, room, inner)
    if none == 0 and not inner and _is_plain(part):
        _plain_codes(row, part, code, room)
    else:
        _codes(row, part, code, room, inner)


@functions.entry
def entry(row, slot, block, where):
    """Encode the fp32 row at ``row`` and write it to cache slot ``slot`` of the call; ``where``: a room."""
    call, room = _call_at(block), _room_at(where)
    work = room.row
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
        _part(row, form.parts[k], 0, 0, True, room)
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
        _part(row, part, code, scales, False, room)
    pad = base + form.pad_base + form.pad_stride * at
    for i in range(form.pad_bytes):
        simd.store_byte(pad + i, 0)
