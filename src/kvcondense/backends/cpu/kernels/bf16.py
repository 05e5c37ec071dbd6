"""bf16 in vectors: pairs of them, widened to fp32, multiplied, and rounded to."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.lanes import Lanes, expression
from kvcondense.backends.cpu.kernels.simd import F32, I32, LANES, constant
from kvcondense.backends.cpu.target import target


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


PAIRS = ir.VectorType(_BFloat(), 2 * LANES)
"""As many bf16 as fill a vector."""
_CODES = ir.VectorType(ir.IntType(16), LANES)
_ONE = 0x3F80


def emit_halves(b: Any, pairs: Any) -> tuple[Any, Any]:
    """Pairs of bf16 in int32, widened to fp32: the even ones, the odd ones."""
    kind = ir.VectorType(ir.FloatType(), pairs.type.count)
    even, odd = b.shl(pairs, constant(16, pairs.type)), b.and_(pairs, constant(-0x10000, pairs.type))
    return b.bitcast(even, kind), b.bitcast(odd, kind)


def _widened(b: Any, codes: Any) -> Any:
    """fp32 of the bits in int16."""
    return b.bitcast(b.shl(b.zext(codes, I32.llvm), constant(16)), F32.llvm)


def emit_load_bf16(b: Any, address: Any) -> Any:
    """``load_bf16``, for whoever emits instructions."""
    return _widened(b, simd.read(b, address, _CODES, 2))


@simd.operation(F32, types.int64)
def load_bf16(b: Any, address: Any) -> Any:
    """bf16, widened."""
    return emit_load_bf16(b, address)


def emit_pair_products(b: Any, x: Any, y: Any, z: Any) -> Any:
    """z + the products of both bf16 of each lane, the odd one first; AVX-512 BF16 alone has it."""
    kind = ir.FunctionType(F32.llvm, [F32.llvm, PAIRS, PAIRS])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return b.call(function, [z, x, y])


def nearest_bf16(x: Lanes) -> Lanes:
    """Bits whose upper half is the nearest bf16, ties to even. Of no NaN."""
    return x.bits() + 0x7FFF + ((x.bits() >> 16) & 1)


def rounded_bf16(x: Lanes) -> Lanes:
    """``round_bf16``, for whoever emits instructions."""
    b = x.builder
    quiet = (x.bits() | 0x7FC00000).value
    bits = b.select(b.fcmp_unordered("uno", x.value, x.value), quiet, nearest_bf16(x).value)
    return (Lanes(b, bits) & -0x10000).floats()


def emit_nearest_score(b: Any, z: Any) -> Any:
    """A score as a bf16 state would hold it, for ``emit_sum`` and ``emit_widened``; as far as a softmax can tell.

    AVX-512 BF16 rounds by one instruction, which makes numbers below 2^-126 zero. No weight shows that: e^(z - m) is 1
    while |m| is below 2^-26, and beyond that z - m is -m either way.
    """
    if not target().bf16_products:
        return rounded_bf16(Lanes(b, z)).value
    kind = ir.FunctionType(ir.VectorType(_BFloat(), LANES), [F32.llvm])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512bf16.cvtneps2bf16.512")
    return b.bitcast(b.call(function, [z]), _CODES)


def emit_score(b: Any, address: Any) -> Any:
    """A score in bf16, for ``emit_sum`` and ``emit_widened``."""
    return simd.read(b, address, _CODES, 2) if target().bf16_products else emit_load_bf16(b, address)


def emit_widened(b: Any, score: Any) -> Any:
    """The score in fp32."""
    return _widened(b, score) if target().bf16_products else score


def emit_sum(b: Any, score: Any, x: Any) -> Any:
    """The score + x in fp32; where pairs are quickly multiplied a product with 1, which widens in passing.

    Sums below 2^-126 become zero there, as above.
    """
    if not target().fast_bf16_products:
        return b.fadd(emit_widened(b, score), x)
    return emit_pair_products(b, b.bitcast(b.zext(score, I32.llvm), PAIRS), b.bitcast(constant(_ONE), PAIRS), x)


@expression(F32, F32)
def round_bf16(x: Lanes) -> Lanes:
    """To the nearest bf16, ties to even, as fp32. A NaN stays one, with its sign."""
    return rounded_bf16(x)


@expression(I32, F32)
def bf16_code(x: Lanes) -> Lanes:
    """The 16 bits of the nearest bf16; every NaN is 0x7FC0."""
    return (x.bits() & 0x7FFFFFFF).if_less(0x7F800001, nearest_bf16(x) >> 16, 0x7FC0)
