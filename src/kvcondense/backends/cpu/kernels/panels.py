"""Stage 1 for many tokens: rows are copied once into panels that stay in cache, then multiplied tile by tile.

Panels hold rows part by part of a sum's 16 lanes, as many as vectors take. Rows of w are widened once, the odd channels
of a vector, then the even ones; those of x stay bf16 and are widened when they are multiplied: so they take half the
first cache. Sums between chunks of D wait in memory, so that panels are small and the order of a sum is that of
``project``. Rows as they lie would often share the sets of a cache, and be widened again and again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.bf16 import emit_halves
from kvcondense.backends.cpu.kernels.functions import kernel
from kvcondense.backends.cpu.kernels.integers import smaller
from kvcondense.backends.cpu.kernels.simd import BYTES, LANES, splat, store
from kvcondense.backends.cpu.params import BLOCK, CHANNELS, PANEL, W_ROW, WIDE, X_ROW
from kvcondense.backends.cpu.target import target

PARTS = CHANNELS // LANES
"""Vectors of a sum."""
_PART = PANEL // PARTS
"""Bytes of a part in a row of bf16."""
_GROWN = 2
"""What rows grow by when they are widened."""
_STEP = 4 * CHANNELS
"""Bytes of a bf16 row that all lanes take at once, and of a sum."""
_TOKENS, _ROWS = (6, 4) if target().registers >= 32 else (3, 4)
"""Sums in registers: twelve, three operands and one that changes fill sixteen."""
_AHEAD = 4
"""Rows by which lines are asked for before they are copied."""
_LONG = 2
"""Vectors of tokens in a loop's turn. A multiple of 32 channels makes one."""


def _copying(grown: int) -> Any:
    """32 bf16 to a panel, whose parts lie apart: pairs as they are, or odd ones and even ones widened."""

    @simd.operation(types.void, types.int64, types.int64)
    def copy_step(b: Any, source: Any, to: Any) -> None:
        number = source.type
        for part in range(PARTS):
            pairs = simd.read(b, b.add(source, ir.Constant(number, BYTES * part)), simd.I32.llvm, 2)
            place = b.add(to, ir.Constant(number, grown * _PART * part))
            if grown == 1:
                simd.write(b, place, pairs, 4)
            else:
                even, odd = emit_halves(b, pairs)
                simd.write(b, place, odd, 4)
                simd.write(b, b.add(place, ir.Constant(number, BYTES)), even, 4)

    return copy_step


_copy_pairs, _copy_widened = _copying(1), _copying(2)


@simd.operation(types.float32, types.int64)
def _total(b: Any, sums: Any) -> Any:
    """All lanes of a sum as one."""
    lanes = simd.read(b, sums, ir.VectorType(ir.FloatType(), CHANNELS), 4)
    return simd.reduce_lanes(b, lanes, b.fadd)


def _tile(tokens: int, steps: int) -> Any:
    """sums += x w for ``tokens`` rows of the one panel and four of the other: parts of ``size`` bytes, sums of lanes.

    steps: vectors of a turn; ``size`` must be a multiple of as many.
    """

    @simd.operation(types.void, *[types.int64] * 4)
    def tile(b: Any, x: Any, w: Any, sums: Any, size: Any) -> None:
        def number(n: int) -> ir.Constant:
            return ir.Constant(x.type, n)

        def at(base: Any, n: int) -> Any:
            return b.add(base, number(n))

        places = [[at(sums, _STEP * (WIDE * i + j)) for j in range(_ROWS)] for i in range(tokens)]
        old = [[simd.read(b, p, simd.F32.llvm, 4) for p in line] for line in places]
        before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(x.type)
        offset.add_incoming(number(0), before)
        sums_in = [[b.phi(simd.F32.llvm) for _ in line] for line in old]
        new = [list(line) for line in sums_in]
        for half in range(_GROWN * steps):
            here = at(offset, BYTES * (half // _GROWN))
            there = at(b.mul(offset, number(_GROWN)), BYTES * half)

            def token(i: int, here: Any = here, even: int = half % 2) -> Any:
                return _operand(b, at(here, X_ROW * i), x, even)

            def row(j: int, there: Any = there) -> Any:
                return simd.read(b, b.add(at(w, W_ROW * j), there), simd.F32.llvm, 4)

            # The fewer operands wait in registers, beside one of the others.
            tokens_first = tokens > _ROWS
            held = [row(j) for j in range(_ROWS)] if tokens_first else [token(i) for i in range(tokens)]
            for one in range(tokens if tokens_first else _ROWS):
                other = token(one) if tokens_first else row(one)
                for k, operand in enumerate(held):
                    i, j = (one, k) if tokens_first else (k, one)
                    new[i][j] = simd.emit_fma(b, operand, other, new[i][j])
            # Else pairs would be kept for their other half, and sums would go to the stack.
            new = [[simd.emit_first(b, one) for one in line] for line in new]
        following = at(offset, BYTES * steps)
        offset.add_incoming(following, loop)
        for phis, values, starts in zip(sums_in, new, old, strict=True):
            for phi, value, start in zip(phis, values, starts, strict=True):
                phi.add_incoming(start, before)
                phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        for line, values in zip(places, new, strict=True):
            for place, value in zip(line, values, strict=True):
                simd.write(b, place, value, 4)

    return tile


def _operand(b: Any, offset: Any, x: Any, even: int) -> Any:
    """A vector of tokens as the product takes it: the odd or even halves of pairs, widened."""
    return emit_halves(b, simd.read(b, b.add(x, offset), simd.I32.llvm, 4))[1 - even]


_tile_6, _tile_3, _tile_2, _tile_1 = (_tile(n, _LONG) for n in (6, 3, 2, 1))
_short_3, _short_1 = (_tile(n, 1) for n in (3, 1))


@kernel
def _copy(source, stride, count, size, panel, row, grown):
    """``size`` bytes of ``count`` bf16 rows to a panel whose rows are ``row`` bytes long; widened if they grow."""
    for i in range(count):
        for at in range(0, size, _STEP):
            simd.prefetch(source + (i + _AHEAD) * stride + at)
            place = panel + i * row + at // PARTS * grown
            if grown == 1:
                _copy_pairs(source + i * stride + at, place)
            else:
                _copy_widened(source + i * stride + at, place)


@kernel
def _products(x, tokens, w, channels, sums, size):
    """Add the products of one part of two panels to the sums, whose rows are WIDE sums long."""
    for n in range(0, channels, _ROWS):
        rows, t = w + W_ROW * n, 0
        while t < tokens:
            left = tokens - t
            token, target = x + X_ROW * t, sums + _STEP * (WIDE * t + n)
            if size % (BYTES * _LONG):
                if left >= 3:
                    _short_3(token, rows, target, size)
                    t += 3
                else:
                    _short_1(token, rows, target, size)
                    t += 1
            elif _TOKENS == 6 and left >= 6:
                _tile_6(token, rows, target, size)
                t += 6
            elif left >= 3:
                _tile_3(token, rows, target, size)
                t += 3
            elif left == 2:
                _tile_2(token, rows, target, size)
                t += 2
            else:
                _tile_1(token, rows, target, size)
                t += 1


@kernel
def multiply(call, token, last, first, end, scratch):
    """Tokens token .. last - 1, at most TALL, times channels first .. end - 1, at most WIDE."""
    tokens, channels, size = last - token, end - first, call.hidden_bytes
    x, w = call.x + token * call.x_stride, call.w + first * call.w_stride
    x_panel, w_panel = scratch, scratch + X_ROW * BLOCK
    sums = w_panel + W_ROW * WIDE
    for i in range(0, _STEP * WIDE * tokens, BYTES):
        store(sums + i, splat(np.float32(0)))
    for at in range(0, size, PANEL):
        taken = smaller(PANEL, size - at)
        _copy(w + at, call.w_stride, channels, taken, w_panel, W_ROW, _GROWN)
        for t in range(0, tokens, BLOCK):
            count, target = smaller(BLOCK, tokens - t), sums + _STEP * WIDE * t
            _copy(x + t * call.x_stride + at, call.x_stride, count, taken, x_panel, X_ROW, 1)
            for part in range(PARTS):
                rows_x, rows_w = x_panel + _PART * part, w_panel + _GROWN * _PART * part
                _products(rows_x, count, rows_w, channels, target + BYTES * part, taken // PARTS)
    for i in range(tokens):
        out = call.out + 4 * ((token + i) * call.channels + first)
        for j in range(channels):
            simd.store_scalar(out + 4 * j, _total(sums + _STEP * (WIDE * i + j)))
