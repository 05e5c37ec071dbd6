"""Stages 2 and 3 in Numba: softmax of each channel over the tokens of a window, eight at a time, or folded one by one.

A table of n candidates says where those of a window lie, oldest first: addresses of kv, score and ape. Work runs over
groups of tokens and over channels inside, so that memory is read along rows, and every row once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import fields, simd
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.lanes import Lanes, rounded_bf16
from kvcondense.backends.cpu.kernels.simd import BYTES, fma, load, splat, store
from kvcondense.backends.cpu.params import CHANNELS, ENTRY, GROUP, Candidate
from kvcondense.backends.cpu.target import target

table_at = fields.view(Candidate)
_LINE = 4 * CHANNELS
"""Bytes of fp32 that a group is pooled by: a cache line."""

_LOG2E = np.float32(1.4426950408889634)
_LOG2E_LOW = np.float32(1.4426950408889634 - float(_LOG2E))
_TO_INTEGER = np.float32(1.5 * 2**23 + 127)
"""Adding it rounds to an integer k and leaves k + 127 in the low bits."""
_LOWEST = np.float32(-88.03)
_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (0.000153225483, 0.00133972824, 0.00961855985, 0.05550340327, 0.24022646248340607, 0.6931471824645996, 1)
)
"""Of 2^r, |r| <= 0.5, the highest power first."""
_ONE = np.float32(1)
_ZERO = np.float32(0)
_LEAST = np.float32(np.finfo(np.float32).min)

_AT_ONCE = 2
"""Exponentials that are formed step by step together: of 1, 2 and 4, two spill least with AVX2's registers."""


def _exps(b: Any, x: list[Any]) -> list[Any]:
    """``exp`` of several vectors, step by step for all of them."""

    def number(value: Any) -> ir.Constant:
        return simd.constant(float(value), simd.F32.llvm)

    x = [simd.emit_at_least(b, one, number(_LOWEST)) for one in x]
    t = [simd.emit_fma(b, one, number(_LOG2E), number(_TO_INTEGER)) for one in x]
    r = [b.fsub(number(_TO_INTEGER), one) for one in t]
    r = [simd.emit_fma(b, one, number(_LOG2E), rest) for one, rest in zip(x, r, strict=True)]
    r = [simd.emit_fma(b, one, number(_LOG2E_LOW), rest) for one, rest in zip(x, r, strict=True)]
    p = [number(_POLYNOMIAL[0])] * len(x)
    for coefficient in _POLYNOMIAL[1:]:
        p = [simd.emit_fma(b, one, rest, number(coefficient)) for one, rest in zip(p, r, strict=True)]
    power = [b.bitcast(b.shl(b.bitcast(one, simd.I32.llvm), simd.constant(23)), simd.F32.llvm) for one in t]
    return [b.fmul(one, two) for one, two in zip(p, power, strict=True)]


@simd.operation(simd.F32, simd.F32)
def exp(b: Any, x: Any) -> Any:
    """e^x for x <= 0: at most 2 ulp off; 0 below -87.7, where e^x leaves the normal fp32 numbers; NaN stays.

    2^k 2^r with k = rint(x log2 e) and a polynomial for 2^r, |r| <= 0.5. The integer k + 127 becomes the exponent bits
    of a factor, and 0 for k = -127.
    """
    return _exps(b, [x])[0]


@inlined
def score(candidate, c):
    """z: the score with its ape."""
    return load(candidate.score + c) + load(candidate.bias + c)


_HELD = target().registers >= 32
"""Whether a group's scores stay in registers from their maximum to their exponentials."""
_Row = Callable[[Any, Any, Any], Any]
"""(builder, address of channel 0, offset of the channel in bytes of fp32) -> a vector of fp32."""


def _fp32(b: Any, row: Any, at: Any) -> Any:
    return simd.read(b, b.add(row, at), simd.F32.llvm, 4)


def _bf16(b: Any, row: Any, at: Any) -> Any:
    return simd.emit_load_bf16(b, b.add(row, b.lshr(at, ir.Constant(at.type, 1))))


def _halving(values: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """All of them as one: neighbours are combined until one is left."""
    while len(values) > 1:
        values = [combine(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _group(count: int, row: _Row, *, more: bool, last: bool, rounded: bool) -> Any:
    """A kernel for ``count`` tokens: m' = max(m, z_j), l' = l e^(m - m') + sum e^(z_j - m'), o' likewise with K_j.

    row: how rows of kv and score are read; rounded: z becomes bf16. more: there were tokens before, whose m, l and o
    stand in three rows at ``work``, ``span`` bytes apart; last: none come behind, and P = o / l goes to ``out``.
    Meanwhile the lines that ``ahead`` lists are asked for.
    """

    @simd.operation(types.void, *[types.int64] * 7)
    def group(b: Any, table: Any, ahead: Any, begin: Any, end: Any, work: Any, span: Any, out: Any) -> None:
        def number(n: int) -> ir.Constant:
            return ir.Constant(begin.type, n)

        def entry(of: Any, j: int, field: str) -> Any:
            return simd.read(b, b.add(of, number(ENTRY * j + Candidate.offsets[field])), of.type, 8)

        rows = [[entry(table, j, f) for f in ("kv", "score", "bias")] for j in range(count)]
        coming = [entry(ahead, j, f) for j in range(count) for f in ("kv", "score")]
        held = [b.sub(b.add(work, b.mul(span, number(i))), begin) for i in range(3)]
        least = simd.constant(float(_LEAST), simd.F32.llvm)
        before = b.block
        lines, vectors, after = (b.append_basic_block(name) for name in ("lines", "vectors", "after"))
        b.branch(lines)
        b.position_at_end(lines)
        line = b.phi(begin.type)
        line.add_incoming(begin, before)
        following = b.add(line, number(_LINE))
        for address in coming:
            simd.emit_prefetch(b, b.add(address, line if row is _fp32 else b.lshr(line, number(1))))
        b.branch(vectors)
        b.position_at_end(vectors)  # a loop of its own: two vectors at once would want twice the registers
        at = b.phi(begin.type)
        at.add_incoming(line, lines)

        def score(j: int, at: Any) -> Any:
            z = b.fadd(row(b, rows[j][1], at), _fp32(b, rows[j][2], at))
            return rounded_bf16(Lanes(b, z)).value if rounded else z

        z = [score(j, at) for j in range(count)]
        m = _halving(z, lambda x, y: simd.emit_at_least(b, x, y))
        earlier = _fp32(b, held[0], at) if more else least
        m = simd.emit_at_least(b, m, earlier)
        if not (_HELD or rounded):  # a sum more for each is cheaper than a register that waits in memory
            anew = simd.emit_anew(b, at)
            z = [score(j, anew) for j in range(count)]
        sums, products, half = [], [], max(count // 2, 1)
        for first in range(0, count, _AT_ONCE):
            e = _exps(b, [b.fsub(one, m) for one in z[first : first + _AT_ONCE]])
            for j, one in enumerate(e, first):
                k = row(b, rows[j][0], at)
                if j % half:
                    products[-1] = simd.emit_fma(b, one, k, products[-1])
                else:
                    products.append(b.fmul(one, k))
            sums.append(_halving(e, b.fadd))
        l, o = _halving(sums, b.fadd), _halving(products, b.fadd)
        if more:
            (old,) = _exps(b, [b.fsub(earlier, m)])
            l, o = simd.emit_fma(b, _fp32(b, held[1], at), old, l), simd.emit_fma(b, _fp32(b, held[2], at), old, o)
        for base, value in zip(held, (m, l, o), strict=True):
            simd.write(b, b.add(base, at), value, 4)
        if last:
            simd.write(b, b.add(out, at), b.fdiv(o, l), 4)
        beyond = b.add(at, number(BYTES))
        at.add_incoming(beyond, vectors)
        line.add_incoming(following, (line_end := b.append_basic_block("line_end")))
        b.cbranch(b.icmp_signed("<", beyond, following), vectors, line_end)
        b.position_at_end(line_end)
        b.cbranch(b.icmp_signed("<", following, end), lines, after)
        b.position_at_end(after)

    return group


def _groups(row: _Row, *, rounded: bool = False) -> Any:
    """A function that takes a window's groups: one that is whole, or the first and the others."""
    ends = ((False, True), (False, False), (True, False))
    whole, first, other = (_group(GROUP, row, more=more, last=last, rounded=rounded) for more, last in ends)

    @inlined
    def take(index, n, table, ahead, begin, end, work, span, out):
        if n <= GROUP:
            whole(table, ahead, begin, end, work, span, out)
        elif index == 0:
            first(table, ahead, begin, end, work, span, out)
        else:
            other(table, ahead, begin, end, work, span, out)

    return take


@kernel
def finish(acc, begin, end, head_bytes, out):
    """P = o / l."""
    for c in range(begin, end, BYTES):
        store(out + c, load(acc + 2 * head_bytes + c) / load(acc + head_bytes + c))


_one, _two, _four = (_group(n, _fp32, more=False, last=True, rounded=False) for n in (1, 2, 4))
_of_fp32, _of_bf16, _of_rounded = _groups(_fp32), _groups(_bf16), _groups(_bf16, rounded=True)


@kernel
def group(kind, index, n, table, ahead, begin, end, work, span, out):
    """Group ``index`` of the n candidates at ``table``, whose first entry it is; kind: FP32, BF16 or BF16_ROUNDED.

    For channel bytes begin .. end - 1 of fp32: m, l and o to ``work``, three rows ``span`` bytes apart, and of the last
    group P to out + begin ... ``ahead``: as many entries, whose lines will be read next.
    """
    if kind == params.BF16:
        _of_bf16(index, n, table, ahead, begin, end, work, span, out)
    elif kind == params.BF16_ROUNDED:
        _of_rounded(index, n, table, ahead, begin, end, work, span, out)
    elif n == 4:
        _four(table, ahead, begin, end, work, span, out)
    elif n == 2:
        _two(table, ahead, begin, end, work, span, out)
    elif n == 1:
        _one(table, ahead, begin, end, work, span, out)
    else:
        _of_fp32(index, n, table, ahead, begin, end, work, span, out)
    if n > GROUP and GROUP * (index + 1) >= n:
        finish(work, 0, end - begin, span, out + begin)


@kernel
def pad(table, n, zeros, nothing):
    """Fill the table up to whole groups with candidates of no weight: rows of 0, in any type, with an ape of -inf."""
    entries = table_at(table)
    for j in range(n, (n + GROUP - 1) // GROUP * GROUP):
        candidate = entries[j]
        candidate.kv = zeros
        candidate.score = zeros
        candidate.bias = nothing


@kernel
def fold(table, n, begin, end, acc, head_bytes):
    """Fold tokens into (m, l, o), oldest to newest: m at acc, l and o ``head_bytes`` further each.

    m' = max(m, z), l' = l e^(m - m') + e^(z - m'), o' = o e^(m - m') + K e^(z - m'). One of the two exponents is 0, so
    one exponential does for both. A score of -inf has weight 0 and is skipped.
    """
    total, pooled = acc + head_bytes, acc + 2 * head_bytes
    for j in range(n):
        kv = table[j].kv
        for c in range(begin, end, BYTES):
            z = score(table[j], c)
            m, l, o = load(acc + c), load(total + c), load(pooled + c)
            e = exp(simd.negative_magnitude(z - m))
            one = splat(_ONE)
            old = simd.where_less(m, z, e, one)
            new = simd.where_less(m, z, one, e) + (z - z)  # +inf has no weight: NaN
            l1 = fma(l, old, new)
            o1 = fma(load(kv + c), new, o * old)
            # Only -inf is less than the least number; NaN is not, and must reach the sums.
            store(acc + c, simd.at_least(z, m))
            store(total + c, simd.where_less(z, splat(_LEAST), l, l1))
            store(pooled + c, simd.where_less(z, splat(_LEAST), o, o1))
