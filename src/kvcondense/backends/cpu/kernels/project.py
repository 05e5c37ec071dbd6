"""Stage 1 in Numba: fp32 products of bf16 rows, x [T, D] and w [N, D] as they lie, no packing.

Every output is one sum over D in 16 lanes, whose order depends on D alone: a token gives the same bits in any batch.
With AVX-512 BF16 a lane adds two products per instruction; else both are widened and added one after the other.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import fields, simd
from kvcondense.backends.cpu.kernels.pool import kernel
from kvcondense.backends.cpu.kernels.simd import LANES, constant, fetch_add, pointer
from kvcondense.backends.cpu.native import has_bf16_products

_I64 = ir.IntType(64)
_F = ir.VectorType(ir.FloatType(), LANES)
_I = ir.VectorType(ir.IntType(32), LANES)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BF = ir.VectorType(_BFloat(), 2 * LANES)


def _pair_products(b: Any, acc: Any, x: tuple[Any, ...], w: tuple[Any, ...]) -> Any:
    """acc + the products of both halves of each lane."""
    if len(x) == 1:
        kind = ir.FunctionType(_F, [_F, _BF, _BF])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
        return b.call(function, [acc, x[0], w[0]])
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(_F, [_F] * 3), f"llvm.fma.v{LANES}f32")
    return b.call(function, [x[1], w[1], b.call(function, [x[0], w[0], acc])])


def _operand(b: Any, pairs: Any, native: bool) -> tuple[Any, ...]:
    """32 bf16 as the product takes them: as they are, or widened, even ones and odd ones."""
    if native:
        return (b.bitcast(pairs, _BF),)
    return b.bitcast(b.shl(pairs, constant(16)), _F), b.bitcast(b.and_(pairs, constant(-0x10000)), _F)


def _tile(tokens: int, channels: int, native: bool) -> Any:
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
            acc.add_incoming(constant(0.0, _F), before)

        def load(row: Any) -> tuple[Any, ...]:
            return _operand(b, b.load(pointer(b, b.add(row, at), _I), align=2), native)

        operands_w = [load(r) for r in rows_w]
        nexts = []
        for line, row in zip(sums, rows_x, strict=True):
            operand = load(row)
            nexts.append([_pair_products(b, a, operand, o) for a, o in zip(line, operands_w, strict=True)])
        following = b.add(at, number(simd.BYTES))
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


_NATIVE = has_bf16_products()
# As many sums as registers hold: 24 of 32 with AVX-512 BF16, 16 where operands are widened.
_HEIGHT = 6 if _NATIVE else 4
_tall, _four, _two = (_tile(n, 4, _NATIVE) for n in (_HEIGHT, 4, 2))
_row = _tile(1, 8, _NATIVE)
_product_at = fields.view(params.Product)


@kernel
def _work(call):
    x, x_stride = call.x, call.x_stride
    w, w_stride = call.w, call.w_stride
    tokens, channels = call.tokens, call.channels
    size, out = call.hidden_bytes, call.out
    tall, wide = call.tile_tokens, call.tile_channels
    columns = (channels + wide - 1) // wide
    total = (tokens + tall - 1) // tall * columns
    stride = 4 * channels
    while True:
        task = fetch_add(call.next_tile, 1)
        if task >= total:
            break
        token, last = task // columns * tall, min(tokens, task // columns * tall + tall)
        first = task % columns * wide
        end = min(channels, first + wide)
        while token < last:
            left = last - token
            rows = x + token * x_stride
            target = out + token * stride
            if left >= _HEIGHT:
                for n in range(first, end, 4):
                    _tall(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
                token += _HEIGHT
            elif left >= 4:
                for n in range(first, end, 4):
                    _four(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
                token += 4
            elif left >= 2:
                for n in range(first, end, 4):
                    _two(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
                token += 2
            else:
                for n in range(first, end, 8):
                    _row(rows, x_stride, w + n * w_stride, w_stride, target + 4 * n, stride, size)
                token += 1


@cfunc("void(int64)", error_model="numpy")
def entry(p):
    """Run a projection; every thread of a launch enters here."""
    _work(_product_at(p))
