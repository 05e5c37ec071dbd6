"""Arithmetic on vectors as Python writes it: ``expression`` makes one operation for kernels of many instructions.

Numba takes as long for one instruction as for a whole expression, which is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Union

from numba import types

from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.simd import F32, I32

Operand = Union["Lanes", int, float]


class Lanes:
    """A vector of fp32 or int32 whose operators emit instructions. Numbers beside it become constants."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _lift(self, other: Operand) -> Any:
        return other.value if isinstance(other, Lanes) else simd.constant(other, self.value.type)

    def _do(self, name: str, other: Operand) -> Lanes:
        return Lanes(self.builder, getattr(self.builder, name)(self.value, self._lift(other)))

    def __add__(self, other: Operand) -> Lanes:
        return self._do("add" if self.value.type == I32.llvm else "fadd", other)

    def __sub__(self, other: Operand) -> Lanes:
        return self._do("sub" if self.value.type == I32.llvm else "fsub", other)

    def __rsub__(self, other: int | float) -> Lanes:
        return Lanes(self.builder, self._lift(other)) - self

    def __mul__(self, other: Operand) -> Lanes:
        return self._do("fmul", other)

    def __and__(self, other: Operand) -> Lanes:
        return self._do("and_", other)

    def __or__(self, other: Operand) -> Lanes:
        return self._do("or_", other)

    def __lshift__(self, other: Operand) -> Lanes:
        return self._do("shl", other)

    def __rlshift__(self, other: int) -> Lanes:
        return Lanes(self.builder, self._lift(other)) << self

    def __rshift__(self, other: Operand) -> Lanes:
        """Keeps the sign."""
        return self._do("ashr", other)

    def bits(self) -> Lanes:
        """The bits of fp32."""
        return Lanes(self.builder, self.builder.bitcast(self.value, I32.llvm))

    def floats(self) -> Lanes:
        """fp32 of these bits."""
        return Lanes(self.builder, self.builder.bitcast(self.value, F32.llvm))

    def numbers(self) -> Lanes:
        """Integers as fp32."""
        return Lanes(self.builder, self.builder.sitofp(self.value, F32.llvm))

    def if_less(self, than: Operand, yes: Operand, no: Operand) -> Lanes:
        """``yes`` where this is less, else ``no``. Of integers."""
        return self._if(self.builder.icmp_signed("<", self.value, self._lift(than)), yes, no)

    def if_equal(self, to: Operand, yes: Operand, no: Operand) -> Lanes:
        """``yes`` where this is the same, else ``no``. Of integers."""
        return self._if(self.builder.icmp_signed("==", self.value, self._lift(to)), yes, no)

    def _if(self, condition: Any, yes: Operand, no: Operand) -> Lanes:
        return Lanes(self.builder, self.builder.select(condition, self._lift(yes), self._lift(no)))

    def at_most(self, high: Operand) -> Lanes:
        """This, or ``high`` where it is larger. Of integers."""
        return self.if_less(high, self, high)

    def at_least(self, low: Operand) -> Lanes:
        """This, or ``low`` where it is smaller. Of integers."""
        return self.if_less(low, low, self)


def expression(result: types.Type, *operands: types.Type) -> Callable[[Callable[..., Lanes]], Any]:
    """Make a function of Lanes callable in kernels, with these types; int64 and float32 are in every lane."""

    def wrap(formula: Callable[..., Lanes]) -> Any:
        def emit(b: Any, *values: Any) -> Any:
            lifted = (Lanes(b, _spread(b, value, kind)) for value, kind in zip(values, operands, strict=True))
            return formula(*lifted).value

        emit.__name__, emit.__doc__ = formula.__name__, formula.__doc__
        return simd.operation(result, *operands)(emit)

    return wrap


def _spread(b: Any, value: Any, kind: types.Type) -> Any:
    if kind == types.int64:
        return simd.emit_splat(b, b.trunc(value, I32.llvm.element), I32.llvm)
    return simd.emit_splat(b, value, F32.llvm) if kind == types.float32 else value
