"""Integers in Numba: what kernels do with int64 values, counters and addresses beyond operators."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from kvcondense.backends.cpu.kernels.functions import kernel
from kvcondense.backends.cpu.kernels.simd import operation, pointer


@operation(types.int64, types.int64, types.int64)
def smaller(b: Any, x: Any, y: Any) -> Any:
    """The smaller one. Numba's own min is two functions, which pass through another pipeline."""
    return b.select(b.icmp_signed("<", y, x), y, x)


@operation(types.int64, types.int64, types.int64)
def larger(b: Any, x: Any, y: Any) -> Any:
    """The larger one."""
    return b.select(b.icmp_signed(">", y, x), y, x)


@operation(types.int64, types.int64, types.int64)
def fetch_add(b: Any, address: Any, x: Any) -> Any:
    """Add to a counter that threads share; the value before. Orders the memory accesses around it."""
    return b.atomic_rmw("add", pointer(b, address, ir.IntType(64)), x, "acq_rel")


@kernel
def take(counter, total, chunk):
    """The first of the next ``chunk`` of ``total`` tasks that threads share, or -1."""
    task = fetch_add(counter, chunk)
    return task if task < total else -1


@operation(types.void, *[types.int64] * 5)
def invoke(b: Any, function: Any, *four: Any) -> None:
    """Call the entry of another object, of four integers, at an address."""
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
    b.call(pointer(b, function, kind), four)
