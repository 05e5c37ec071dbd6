"""Stage 1 in Numba: fp32 products of bf16 rows, x [T, D] and w [N, D].

Every output is one sum over D in 16 lanes, which meet in a tree: lane i takes the products of channels 2 i and 2 i + 1
of every 32, odd ones first. The order depends on D alone: a token gives the same bits in any batch, and whatever the
length of vectors. Where that is fast, AVX-512 BF16 has a lane add two products per instruction, from rows as they lie.
Elsewhere rows are widened: of a few tokens as they lie, of more in ``panels``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import fields, functions, panels, simd
from kvcondense.backends.cpu.kernels.bf16 import PAIRS, emit_halves, emit_pair_products
from kvcondense.backends.cpu.kernels.functions import kernel
from kvcondense.backends.cpu.kernels.integers import fetch_add, smaller
from kvcondense.backends.cpu.kernels.simd import pointer
from kvcondense.backends.cpu.target import target

_NATIVE = target().fast_bf16_products
_SUMS = params.CHANNELS
"""Lanes of a sum: LLVM makes as many vectors of them as the processor needs."""
_STEP = 4 * _SUMS
"""Bytes of a row that all lanes take at once."""
_I64 = ir.IntType(64)
_F = ir.VectorType(ir.FloatType(), _SUMS)
_I = ir.VectorType(ir.IntType(32), _SUMS)


def _pair_products(b: Any, acc: Any, x: tuple[Any, ...], w: tuple[Any, ...]) -> Any:
    """acc + the products of both halves of each lane, the odd one first."""
    if _NATIVE:
        return emit_pair_products(b, x[0], w[0], acc)
    return simd.emit_fma(b, x[0], w[0], simd.emit_fma(b, x[1], w[1], acc))


def _operand(b: Any, pairs: Any) -> tuple[Any, ...]:
    """32 bf16 as the product takes them: as they are, or widened, even ones and odd ones."""
    return (b.bitcast(pairs, PAIRS),) if _NATIVE else emit_halves(b, pairs)


def _tile(tokens: int, channels: int) -> Any:
    """A kernel for ``tokens`` rows of x times ``channels`` rows of w, its sums in registers."""

    @simd.operation(types.void, *[types.int64] * 7)
    def tile(
        b: Any,
        x: Any,
        x_stride: Any,
        w: Any,
        w_stride: Any,
        out: Any,
        out_stride: Any,
        size: Any,
    ) -> None:
        def number(n: int) -> ir.Constant:
            return ir.Constant(_I64, n)

        rows_x = [b.add(x, b.mul(x_stride, number(i))) for i in range(tokens)]
        rows_w = [b.add(w, b.mul(w_stride, number(i))) for i in range(channels)]
        before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        at = b.phi(_I64)
        at.add_incoming(number(0), before)
        sums = [[b.phi(_F) for _ in rows_w] for _ in rows_x]
        for acc in (a for line in sums for a in line):
            acc.add_incoming(simd.constant(0.0, _F), before)

        def load(row: Any) -> tuple[Any, ...]:
            return _operand(b, b.load(pointer(b, b.add(row, at), _I), align=2))

        nexts: list[list[Any]] = [[] for _ in rows_x]
        operands_x = [load(r) for r in rows_x]
        for j, row in enumerate(rows_w):
            # The same line of a row behind these: each row is two pages, where memory's own prefetchers begin anew.
            simd.emit_prefetch(b, b.add(b.add(row, at), b.mul(w_stride, number(channels))))
            operand = load(row)
            for line, of, x_operand in zip(nexts, sums, operands_x, strict=True):
                line.append(_pair_products(b, of[j], x_operand, operand))
        following = b.add(at, number(_STEP))
        at.add_incoming(following, loop)
        for line, new in zip(sums, nexts, strict=True):
            for acc, value in zip(line, new, strict=True):
                acc.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        for i, line in enumerate(nexts):
            target = b.add(out, b.mul(out_stride, number(i)))
            for j, value in enumerate(line):
                b.store(
                    simd.reduce_lanes(b, value, b.fadd),
                    pointer(b, b.add(target, number(4 * j)), ir.FloatType()),
                    align=4,
                )

    return tile


# As many sums as registers hold: 24 of 32 with AVX-512 BF16. Widened, a sum takes two of AVX2's 16, and operands four.
# One token reads rows of w and hardly computes: two at a time are quicker to read on than eight.
_HEIGHT, _WIDTH, _LONG = (6, 4, 2) if _NATIVE else (4, 4, 8) if target().lanes == _SUMS else (2, 1, 2)
_tall, _four, _two = (_tile(n, _WIDTH) for n in (_HEIGHT, min(_HEIGHT, 4), 2))
_row = _tile(1, _LONG)
_FEW = params.TALL + 1 if _NATIVE else 100 if target().lanes == _SUMS else 12
"""Tokens of a task from which panels pay. Pairs take no room to widen: a product of rows as they lie is as fast."""
_product_at = fields.view(params.Product)


@kernel
def _rows(call, token, last, first, end):
    """Tokens token .. last - 1, channels first .. end - 1, from rows as they lie."""
    x_stride, w, w_stride = call.x_stride, call.w, call.w_stride
    size, stride = call.hidden_bytes, 4 * call.channels
    while token < last:
        left = last - token
        rows = call.x + token * x_stride
        target = call.out + token * stride
        if left >= _HEIGHT:
            for n in range(first, end, _WIDTH):
                _tall(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
            token += _HEIGHT
        elif left >= 4:
            for n in range(first, end, _WIDTH):
                _four(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
            token += 4
        elif left >= 2:
            for n in range(first, end, _WIDTH):
                _two(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
            token += 2
        else:
            for n in range(first, end, _LONG):
                _row(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
            token += 1


@kernel
def _work(call):
    tokens, channels = call.tokens, call.channels
    tall, wide = call.tile_tokens, call.tile_channels
    columns = (channels + wide - 1) // wide
    total = (tokens + tall - 1) // tall * columns
    scratch = call.scratch + fetch_add(call.threads, 1) * call.scratch_bytes
    while True:
        task = fetch_add(call.next_tile, 1)
        if task >= total:
            break
        token, first = task // columns * tall, task % columns * wide
        last, end = smaller(tokens, token + tall), smaller(channels, first + wide)
        if last - token < _FEW:
            _rows(call, token, last, first, end)
        else:
            panels.multiply(call, token, last, first, end, scratch)


@functions.entry
def entry(p):
    """Run a projection; every thread of a launch enters here."""
    _work(_product_at(p))
