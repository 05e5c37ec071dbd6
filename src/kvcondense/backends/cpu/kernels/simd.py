"""Vectors for Numba: fp32 and int32 types and the few operations that the kernels are written in.

Every operation is one LLVM instruction or intrinsic, so what a kernel computes does not depend on what a vectoriser
makes of a loop: no reassociation, no contraction, one fma where it says fma. Nor on how long the vectors are, which is
as long as the processor's (``target``): lanes meet in halving sums alone, which are the same from any length down.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, Signature, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from kvcondense.backends.cpu.target import target

LANES = target().lanes
BYTES = 4 * LANES
"""Bytes of a vector of fp32."""

_READ, _SECOND_LEVEL, _DATA = 0, 2, 1
"""Of llvm.prefetch."""
_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F = ir.VectorType(ir.FloatType(), LANES)
_I = ir.VectorType(_I32, LANES)


class _Vector(types.Type):
    def __init__(self, name: str, llvm: ir.VectorType) -> None:
        self.llvm = llvm
        super().__init__(name=f"{name}x{LANES}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: _Vector) -> None:
        super().__init__(manager, fe_type, fe_type.llvm)


F32 = _Vector("f32", _F)
I32 = _Vector("i32", _I)


def operation(result: types.Type, *operands: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Make ``emit(builder, *values)`` callable in kernels, with these types."""

    def wrap(emit: Callable[..., Any]) -> Any:
        def typing(context: Any, *args: Any) -> Any:  # noqa: ARG001 - Numba passes them
            def codegen(target: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
                out = emit(builder, *values)
                return target.get_dummy_value() if result is types.void else out

            return result(*operands), codegen

        typing.__name__, typing.__doc__ = emit.__name__, emit.__doc__
        names = ["context", *(f"operand_{i}" for i in range(len(operands)))]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        taken = inspect.Signature([inspect.Parameter(n, kind) for n in names])
        vars(typing)["__signature__"] = taken  # Numba counts the operands there
        return intrinsic(typing)

    return wrap


def constant(value: int | float, kind: ir.VectorType = _I) -> ir.Constant:
    """A vector with ``value`` in every lane."""
    return ir.Constant(kind, [value] * kind.count)


def pointer(builder: Any, address: Any, kind: ir.Type) -> Any:
    """An address as a pointer."""
    return builder.inttoptr(address, kind.as_pointer())


def _call(builder: Any, name: str, kind: ir.Type, *values: Any) -> Any:
    signature = ir.FunctionType(kind, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, signature, name)
    return builder.call(function, values)


def read(builder: Any, address: Any, kind: ir.Type, align: int) -> Any:
    """The value at an address."""
    return builder.load(pointer(builder, address, kind), align=align)


def write(builder: Any, address: Any, value: Any, align: int) -> None:
    """Store a value at an address."""
    builder.store(value, pointer(builder, address, value.type), align=align)


def emit_prefetch(b: Any, address: Any) -> None:
    """``prefetch``, for whoever emits instructions."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    where = b.inttoptr(address, _I8.as_pointer())
    b.call(function, [where, *(ir.Constant(_I32, n) for n in (_READ, _SECOND_LEVEL, _DATA))])


def _lanes(*index: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(index)), list(index))


# Memory. Vectors need no more than the alignment of their elements.


@operation(F32, types.int64)
def load(b: Any, address: Any) -> Any:
    """As many fp32 as there are lanes."""
    return read(b, address, _F, 4)


@operation(F32, types.int64)
def load_fp16(b: Any, address: Any) -> Any:
    """fp16, widened."""
    return b.fpext(read(b, address, ir.VectorType(ir.HalfType(), LANES), 2), _F)


@operation(F32, types.int64)
def load_pairs(b: Any, address: Any) -> Any:
    """Half as many fp32 as there are lanes, each in two neighbouring ones."""
    half = read(b, address, ir.VectorType(ir.FloatType(), LANES // 2), 4)
    return b.shuffle_vector(half, half, _lanes(*(i // 2 for i in range(LANES))))


@operation(types.void, types.int64, F32)
def store(b: Any, address: Any, x: Any) -> None:
    """Of all lanes."""
    write(b, address, x, 4)


@operation(types.void, types.int64, I32)
def store_16(b: Any, address: Any, x: Any) -> None:
    """The low 16 bits of each lane."""
    write(b, address, b.trunc(x, ir.VectorType(_I16, LANES)), 1)


@operation(types.void, types.int64, I32)
def store_8(b: Any, address: Any, x: Any) -> None:
    """The low 8 bits of each lane."""
    write(b, address, b.trunc(x, ir.VectorType(_I8, LANES)), 1)


def _bytes(b: Any, *vectors: Any) -> Any:
    """The low 8 bits of each lane of vectors, as many as a power of two, side by side."""
    parts = list(vectors)
    while len(parts) > 1:
        both = _lanes(*range(2 * parts[0].type.count))
        parts = [b.shuffle_vector(*parts[k : k + 2], both) for k in range(0, len(parts), 2)]
    return b.trunc(parts[0], ir.VectorType(_I8, parts[0].type.count))


def _nibbles(b: Any, *vectors: Any) -> Any:
    """The low 4 bits of each lane, of which no more may be set, an even lane in the low nibble."""
    pairs = _bytes(b, *vectors)
    kind = ir.VectorType(_I16, pairs.type.count // 2)
    pairs = b.bitcast(pairs, kind)
    return b.trunc(b.or_(pairs, b.lshr(pairs, constant(4, kind))), ir.VectorType(_I8, kind.count))


@operation(types.void, types.int64, I32, I32, I32, I32)
def store_8s(b: Any, address: Any, *four: Any) -> None:
    """``store_8`` of four vectors, side by side."""
    write(b, address, _bytes(b, *four), 1)


@operation(types.void, types.int64, I32)
def store_4(b: Any, address: Any, x: Any) -> None:
    """Each lane's 4 bits, beyond which none may be set, the even lane in the low nibble."""
    write(b, address, _nibbles(b, x), 1)


@operation(types.void, types.int64, I32, I32, I32, I32)
def store_4s(b: Any, address: Any, *four: Any) -> None:
    """``store_4`` of four vectors, side by side."""
    write(b, address, _nibbles(b, *four), 1)


@operation(types.float32, types.int64)
def load_scalar(b: Any, address: Any) -> Any:
    """One fp32."""
    return read(b, address, ir.FloatType(), 4)


@operation(types.int64, types.int64)
def load_byte(b: Any, address: Any) -> Any:
    """8 bits, none of them a sign."""
    return b.zext(read(b, address, _I8, 1), _I64)


@operation(types.void, types.int64, types.float32)
def store_scalar(b: Any, address: Any, x: Any) -> None:
    """One fp32, at any address."""
    write(b, address, x, 1)


@operation(types.void, types.int64, types.int64)
def store_byte(b: Any, address: Any, x: Any) -> None:
    """The low 8 bits."""
    write(b, address, b.trunc(x, _I8), 1)


@operation(types.void, types.int64)
def prefetch(b: Any, address: Any) -> None:
    """Ask for the line at an address, which need not be there, to be read into the second-level cache."""
    emit_prefetch(b, address)


# Lanes.


def emit_splat(b: Any, x: Any, kind: ir.Type) -> Any:
    """One value in every lane, for whoever emits instructions."""
    undefined = ir.Constant(kind, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, x, ir.Constant(_I32, 0)), undefined, constant(0))


@operation(F32, types.float32)
def splat(b: Any, x: Any) -> Any:
    """One value in every lane."""
    return emit_splat(b, x, _F)


@operation(types.float32, types.int64)
def float_of(b: Any, x: Any) -> Any:
    """One fp32 from its bits."""
    return b.bitcast(b.trunc(x, _I32), ir.FloatType())


@operation(F32, F32)
def swap_neighbours(b: Any, x: Any) -> Any:
    """Lane i gets lane i ^ 1."""
    return b.shuffle_vector(x, x, _lanes(*(i ^ 1 for i in range(LANES))))


@operation(F32, F32)
def butterflies(b: Any, x: Any) -> Any:
    """Sums and differences of lanes 1, 2, 4 .. apart, one distance after the other: a Hadamard matrix of their size."""
    distance = 1
    while distance < LANES:
        signs = ir.Constant(_F, [-1.0 if i & distance else 1.0 for i in range(LANES)])
        partner = b.shuffle_vector(x, x, _lanes(*(i ^ distance for i in range(LANES))))
        x = b.fadd(partner, b.fmul(x, signs))
        distance *= 2
    return x


@operation(F32)
def odd_signs(b: Any) -> Any:  # noqa: ARG001 - every operation gets a builder
    """-1, 1, -1, 1 ..."""
    return ir.Constant(_F, [1.0 if i % 2 else -1.0 for i in range(LANES)])


def reduce_lanes(b: Any, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """All lanes as one: the second half is combined with the first until one is left."""
    size = x.type.count
    while size > 1:
        size //= 2
        x = combine(*(b.shuffle_vector(x, x, _lanes(*range(k, k + size))) for k in (0, size)))
    return b.extract_element(x, ir.Constant(_I32, 0))


@operation(types.float32, F32)
def first_lane(b: Any, x: Any) -> Any:
    """Lane 0."""
    return b.extract_element(x, ir.Constant(_I32, 0))


@operation(types.float32, F32)
def halving_sum(b: Any, x: Any) -> Any:
    """Sum of the lanes as ``numerics.tree_sum`` forms it."""
    return reduce_lanes(b, x, b.fadd)


@operation(types.int64, I32)
def largest_lane(b: Any, x: Any) -> Any:
    """The largest of the integers, none of them negative."""

    def larger(low: Any, high: Any) -> Any:
        return b.select(b.icmp_signed("<", low, high), high, low)

    return b.zext(reduce_lanes(b, x, larger), _I64)


# Arithmetic.


def emit_all(b: Any, lanes: Any) -> Any:
    """Whether a condition holds in every lane."""
    kind = ir.IntType(lanes.type.count)
    return b.icmp_unsigned("==", b.bitcast(lanes, kind), ir.Constant(kind, -1))


def emit_first(b: Any, x: Any) -> Any:
    """The vector x, computed before anything behind this is read from memory. No instruction.

    Vectors that take more than a register are left alone.
    """
    if x.type.count > target().widest:
        return x
    register = "w" if "neon" in target().features else "v"
    return b.asm(ir.FunctionType(x.type, [x.type]), "", f"={register},0,~{{memory}}", [x], side_effect=True)


def emit_one_of_eight(b: Any, values: tuple[int, ...], index: Any) -> Any:
    """In each lane the one of eight 32-bit values that the low three bits of ``index`` name."""
    count, features = index.type.count, target().features
    if count == 16 and "avx512f" in features:
        return _call(b, "llvm.x86.avx512.permvar.si.512", index.type, ir.Constant(index.type, values * 2), index)
    if "avx2" in features:
        eight = ir.VectorType(_I32, 8)
        if count == 16:
            halves = [b.shuffle_vector(index, index, _lanes(*range(k, k + 8))) for k in (0, 8)]
            low, high = (emit_one_of_eight(b, values, half) for half in halves)
            return b.shuffle_vector(low, high, _lanes(*range(16)))
        wide = index if count == 8 else b.shuffle_vector(index, index, _lanes(*range(4), *range(4)))
        found = _call(b, "llvm.x86.avx2.permd", eight, ir.Constant(eight, values), wide)
        return found if count == 8 else b.shuffle_vector(found, found, _lanes(*range(4)))
    if "neon" in features and count == 4:  # bytes 4 i .. 4 i + 3 of 32
        bytes_of = ir.VectorType(_I8, 16)
        low, high = (b.bitcast(ir.Constant(index.type, values[k : k + 4]), bytes_of) for k in (0, 4))
        first = b.and_(b.shl(index, constant(2, index.type)), constant(28, index.type))
        places = b.add(b.mul(first, constant(0x01010101, index.type)), constant(0x03020100, index.type))
        found = _call(b, "llvm.aarch64.neon.tbl2.v16i8", bytes_of, low, high, b.bitcast(places, bytes_of))
        return b.bitcast(found, index.type)
    table, found = ir.Constant(ir.VectorType(_I32, 8), values), ir.Constant(index.type, ir.Undefined)
    for i in range(count):
        one = b.and_(b.extract_element(index, ir.Constant(_I32, i)), ir.Constant(_I32, 7))
        found = b.insert_element(found, b.extract_element(table, one), ir.Constant(_I32, i))
    return found


def emit_fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """``fma``, for whoever emits instructions."""
    return _call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


@operation(F32, F32, F32, F32)
def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x y + z, rounded once."""
    return emit_fma(b, x, y, z)


def emit_at_least(b: Any, x: Any, low: Any) -> Any:
    """``at_least``, for whoever emits instructions."""
    return b.select(b.fcmp_ordered("<", x, low), low, x)


@operation(F32, F32, F32)
def at_least(b: Any, x: Any, low: Any) -> Any:
    """x, or ``low`` where x is smaller. A NaN in x stays."""
    return emit_at_least(b, x, low)


@operation(F32, F32)
def negative_magnitude(b: Any, x: Any) -> Any:
    """-|x|."""
    return b.bitcast(b.or_(b.bitcast(x, _I), constant(-0x80000000)), _F)


@operation(F32, F32, F32, F32, F32)
def where_less(b: Any, x: Any, y: Any, yes: Any, no: Any) -> Any:
    """``yes`` where x < y, else ``no`` (also for NaN)."""
    return b.select(b.fcmp_ordered("<", x, y), yes, no)


_typing: Any = infer_global  # its own annotation says that it may give None


def _operator(symbol: Callable[..., Any], name: str) -> None:
    """fp32 on both sides; as a template, since an overload would be compiled for each use."""

    class _Typed(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Signature | None:  # noqa: ARG002 - as Numba calls it
            return signature(F32, *args) if args == (F32, F32) else None

    _typing(symbol)(_Typed)

    @lower_builtin(symbol, F32, F32)
    def lower(context: Any, b: Any, sig: Any, operands: Any) -> Any:  # noqa: ARG001
        return getattr(b, name)(*operands)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")
_operator(operator.truediv, "fdiv")
