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
from kvcondense.backends.cpu.blocks import LINE
from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.ahead import Coming, table_at
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.simd import BYTES, LANES, fma, load, splat, store
from kvcondense.backends.cpu.kernels.tokens import Bf16, Fp32, Rounded, score_of, value_of
from kvcondense.backends.cpu.params import ENTRY, GROUP, Candidate
from kvcondense.backends.cpu.target import target

_STEPS = 8
"""Parts of an octave: 2^(j / 8) comes from a table, so that the rest is within 2^(1 / 16): three powers do."""
_SCALE = np.float32(_STEPS * 1.4426950408889634)
_TO_INTEGER = np.float32(1.5 * 2**23 + 127 * _STEPS)
"""Adding it rounds to an integer k and leaves k + 127 * 8 in the low bits."""
_LOWEST = np.float32(-88.03)
_POWERS = tuple(np.float32(c) for c in (0.00010842084939324164, 0.0037540255220065524, 0.08664339651649303))
"""Of 2^(r / 8) - 1, |r| <= 0.5, the highest first; 2.5e-8 off at most."""
_MANTISSAS = tuple(
    (int(np.float32(2 ** (j / _STEPS)).view(np.uint32)) - 0x3F800000 - (j << 20)) & 0xFFFFFFFF for j in range(_STEPS)
)
"""What j << 20, which comes with the exponent, lacks to be the mantissa of 2^(j / 8)."""
_APART = np.float32(32)
"""How much a score may exceed m: below, sums of e^32 and rows up to 10^22 stay far from fp32's largest number."""
_ONE = np.float32(1)
_ZERO = np.float32(0)
_LEAST = np.float32(np.finfo(np.float32).min)
_FEW_REGISTERS = target().registers < 32


def _exps(b: Any, x: list[Any]) -> list[Any]:
    """``exp`` of several vectors, step by step for all of them."""

    def number(value: Any) -> ir.Constant:
        return simd.constant(float(value), simd.F32.llvm)

    x = [simd.emit_at_least(b, one, number(_LOWEST)) for one in x]
    t = [simd.emit_fma(b, one, number(_SCALE), number(_TO_INTEGER)) for one in x]
    k = [b.fsub(number(_TO_INTEGER), one) for one in t]
    r = [simd.emit_fma(b, one, number(_SCALE), rest) for one, rest in zip(x, k, strict=True)]
    p = [simd.emit_fma(b, number(_POWERS[0]), rest, number(_POWERS[1])) for rest in r]
    p = [simd.emit_fma(b, one, rest, number(_POWERS[2])) for one, rest in zip(p, r, strict=True)]
    p = [b.fmul(one, rest) for one, rest in zip(p, r, strict=True)]
    whole = [b.bitcast(one, simd.I32.llvm) for one in t]
    whole = [b.add(b.shl(one, simd.constant(20)), simd.emit_one_of_eight(b, _MANTISSAS, one)) for one in whole]
    whole = [b.bitcast(one, simd.F32.llvm) for one in whole]
    return [simd.emit_fma(b, two, one, two) for one, two in zip(p, whole, strict=True)]


@simd.operation(simd.F32, simd.F32)
def exp(b: Any, x: Any) -> Any:
    """e^x for x <= 88, as weights of a softmax need it: off by less than (2 ulp + |x| 2^-26) e^x; NaN stays.

    2^((8 k + j) / 8) 2^(r / 8) with 8 k + j = rint(8 x log2 e): k + 127 becomes an exponent, j picks a mantissa, and a
    polynomial gives the last factor less 1. 1 at 0; 0 at -88.03 and below; from there to -87.33, where e^x leaves the
    normal fp32 numbers, something less than 2^-126.
    """
    return _exps(b, [x])[0]


@inlined
def score(candidate, c):
    """z: the score with its ape."""
    return load(candidate.score + c) + load(candidate.bias + c)


def _both(values: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """The only one, or both combined."""
    return combine(*values) if len(values) == 2 else values[0]


def _group(count: int, rows_of: type[Fp32], *, alone: bool = False, more: bool = False) -> Any:
    """A kernel for ``count`` tokens: l' = l + sum e^(z_j - m), o' likewise with K_j, and m stays.

    m is the score of the window's first token, whose weight is therefore 1. Where a later score exceeds it by too much
    neither sum is stored: returned is that channel's offset, or ``end``.

    m, l and o stand in three rows at ``work``, ``span`` bytes apart. more: they come from there, as there were tokens
    before. alone: none come behind either, P = o / l goes to ``out``, and o nowhere else. Meanwhile the rows that
    ``ahead`` lists are asked for; of a group alone the first half of them, since what finishes its row asks for others.
    """
    tokens = range(0 if more else 1, count)
    chunks = [tokens[i : i + rows_of.at_once] for i in range(0, len(tokens), rows_of.at_once)]
    asked = count * LANES * rows_of.size * (1 if alone else 2)
    parts = max(min(len(chunks), asked // LINE), 1)  # of whole lines

    @simd.operation(types.int64, *[types.int64] * 7)
    def group(b: Any, table: Any, ahead: Any, begin: Any, end: Any, work: Any, span: Any, out: Any) -> Any:
        def number(n: int) -> ir.Constant:
            return ir.Constant(begin.type, n)

        def vector(value: Any) -> ir.Constant:
            return simd.constant(float(value), simd.F32.llvm)

        def entry(j: int, field: str) -> Any:
            return simd.read(b, b.add(table, number(ENTRY * j + Candidate.offsets[field])), table.type, 8)

        rows = [[entry(j, f) for f in ("kv", "score", "bias")] for j in range(count)]
        held = [b.sub(b.add(work, b.mul(span, number(i))), begin) for i in range(3)]
        coming = Coming(b, ahead, begin, end, asked, rows_of.size, half=alone)
        before = b.block
        names = ("vectors", "stored", "on", "after")
        vectors, stored, on, after = (b.append_basic_block(name) for name in names)
        b.branch(vectors)
        b.position_at_end(vectors)
        coming.begin(before)
        at = b.phi(begin.type)
        at.add_incoming(begin, before)

        def score(j: int) -> Any:
            return rows_of.score(b, rows[j][1], rows[j][2], at)

        m = Fp32.value(b, held[0], at) if more else rows_of.number(b, score(0))
        l, o = ([], []) if more else ([vector(_ONE)], [rows_of.value(b, rows[0][0], at)])
        top = vector(_ZERO)
        if not chunks:
            coming.ask(1)
        if not more:
            simd.write(b, b.add(held[0], at), m, 4)
        for i, some in enumerate(chunks):
            if _FEW_REGISTERS:  # m is read again, so that it takes none meanwhile
                m = Fp32.value(b, held[0], at)
            x = [rows_of.above(b, score(j), m) for j in some]
            if i < parts:
                coming.ask(parts)
            for one in x:
                top = simd.emit_at_least(b, top, one)
            for j, e in zip(some, _exps(b, x), strict=True):
                k = rows_of.value(b, rows[j][0], at)
                if j < 2:  # two sums each, of even tokens and of odd ones: one would wait for itself
                    l, o = [*l, e], [*o, b.fmul(e, k)]
                else:
                    l[j % 2], o[j % 2] = b.fadd(l[j % 2], e), simd.emit_fma(b, e, k, o[j % 2])
            # Else LLVM reads rows of all chunks at once, and what has to wait goes to the stack.
            l, o = ([simd.emit_first(b, one) for one in sums] for sums in (l, o))
            top = simd.emit_first(b, top)
        # NaN unless m is a number: beside m = -inf, an x that is no number is none that top has seen.
        near = b.fcmp_ordered("<", top, simd.emit_fma(b, m, vector(_ZERO), vector(_APART)))
        b.cbranch(simd.emit_all(b, near), stored, after)
        b.position_at_end(stored)
        total, pooled = _both(l, b.fadd), _both(o, b.fadd)
        if more:
            total, pooled = (
                b.fadd(Fp32.value(b, base, at), new) for base, new in ((held[1], total), (held[2], pooled))
            )
        simd.write(b, b.add(held[1], at), total, 4)
        if alone:
            simd.write(b, b.add(out, at), b.fdiv(pooled, total), 4)
        else:
            simd.write(b, b.add(held[2], at), pooled, 4)
        b.branch(on)
        b.position_at_end(on)
        beyond = b.add(at, number(BYTES))
        at.add_incoming(beyond, on)
        coming.go_on(on)
        b.cbranch(b.icmp_signed("<", beyond, end), vectors, after)
        b.position_at_end(after)
        reached = b.phi(begin.type)
        reached.add_incoming(at, vectors)
        reached.add_incoming(end, on)
        return reached

    return group


def _groups(rows_of: type[Fp32]) -> Any:
    """A function that takes a window's groups: the only one, or the first and the others."""
    only, first, other = _group(GROUP, rows_of, alone=True), _group(GROUP, rows_of), _group(GROUP, rows_of, more=True)

    @inlined
    def take(index, n, table, ahead, begin, end, work, span, out):
        if n <= GROUP:
            return only(table, ahead, begin, end, work, span, out)
        if index == 0:
            return first(table, ahead, begin, end, work, span, 0)
        return other(table, ahead, begin, end, work, span, 0)

    return take


@kernel
def _apart(kind, index, count, table, at, work, span):
    """``group`` for a vector at ``at`` of which some channels have scores far above m: those get a new m, the largest.

    What came before is weighted anew, by e^(m - m'). Channels that keep their m get the bits that ``group`` gives them:
    the factor is 1 there, and sums have the same order.
    """
    m = load(work) if index else score_of(kind, table[0], at)
    top = m
    for j in range(count):
        top = simd.at_least(top, score_of(kind, table[j], at))
    above = simd.at_least(simd.at_least(m, top), splat(_LEAST))
    highest = simd.where_less(top - m, splat(_APART), m, above)
    l, o, l1, o1 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for j in range(count):
        e = exp(score_of(kind, table[j], at) - highest)
        k = value_of(kind, table[j].kv, at)
        if j == 0:
            l, o = e, e * k
        elif j == 1:
            l1, o1 = e, e * k
        elif j % 2:
            l1, o1 = l1 + e, fma(e, k, o1)
        else:
            l, o = l + e, fma(e, k, o)
    if count > 1:
        l, o = l + l1, o + o1
    if index:
        old = exp(m - highest)
        l, o = load(work + span) * old + l, load(work + 2 * span) * old + o
    store(work, highest)
    store(work + span, l)
    store(work + 2 * span, o)


@kernel
def finish(acc, begin, end, head_bytes, out):
    """P = o / l."""
    for c in range(begin, end, BYTES):
        store(out + c, load(acc + 2 * head_bytes + c) / load(acc + head_bytes + c))


_one, _two, _four = (_group(n, Fp32, alone=True) for n in (1, 2, 4))
_of_fp32, _of_bf16, _of_rounded = _groups(Fp32), _groups(Bf16), _groups(Rounded)


@inlined
def _near(kind, index, n, table, ahead, begin, end, work, span, out):
    if kind == params.BF16:
        return _of_bf16(index, n, table, ahead, begin, end, work, span, out)
    if kind == params.BF16_ROUNDED:
        return _of_rounded(index, n, table, ahead, begin, end, work, span, out)
    if n == 4:
        return _four(table, ahead, begin, end, work, span, out)
    if n == 2:
        return _two(table, ahead, begin, end, work, span, out)
    if n == 1:
        return _one(table, ahead, begin, end, work, span, out)
    return _of_fp32(index, n, table, ahead, begin, end, work, span, out)


@kernel
def group(kind, index, n, table, ahead, begin, end, work, span, out):
    """Group ``index`` of the n candidates at ``table``, whose first entry it is; kind: FP32, BF16 or BF16_ROUNDED.

    For channel bytes begin .. end - 1 of fp32: m, l and o to ``work``, three rows ``span`` bytes apart (no o of a group
    alone), and of the last group P to out + begin ... ``ahead``: as many entries, whose rows will be read next.
    """
    at = begin
    while at < end:
        at = _near(kind, index, n, table, ahead, at, end, work + at - begin, span, out)
        if at < end:
            # What an entry or two hold of bf16 goes by whole groups, whose rest has no weight.
            count = n if kind == params.FP32 and (n == 4 or n == 2 or n == 1) else GROUP
            target = work + at - begin
            _apart(kind, index, count, table_at(table), at, target, span)
            if n <= GROUP:
                finish(target, 0, BYTES, span, out + at)
            at += BYTES
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
