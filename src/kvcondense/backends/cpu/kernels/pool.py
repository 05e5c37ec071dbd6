"""Stages 2 and 3 in Numba: softmax of each channel over the tokens of a window, in two passes, or folded one by one.

A table of n candidates says where those of a window lie, oldest first: addresses of kv, score and ape, all fp32.
Work runs over tokens in groups and over vectors of channels inside, so that memory is read along rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from kvcondense.backends.cpu.blocks import Block
from kvcondense.backends.cpu.kernels import fields, simd
from kvcondense.backends.cpu.kernels.simd import BYTES, fma, load, splat, store


class Candidate(Block):
    """Where a candidate's channels lie."""

    kv: int
    score: int
    bias: int


table_at = fields.view(Candidate)
ENTRY = Candidate.size
"""Bytes of a table's entry."""

_LOG2E = np.float32(1.4426950408889634)
_LOG2E_LOW = np.float32(1.4426950408889634 - float(_LOG2E))
_TO_INTEGER = np.float32(1.5 * 2**23 + 127)
"""Adding it rounds to an integer k and leaves k + 127 in the low bits."""
_LOWEST = np.float32(-88.03)
_C1, _C2, _C3, _C4, _C5, _C6 = (
    np.float32(c)
    for c in (0.6931471824645996, 0.24022646248340607, 0.05550340327, 0.00961855985, 0.00133972824, 0.000153225483)
)
_ONE = np.float32(1)
_ZERO = np.float32(0)
_LEAST = np.float32(np.finfo(np.float32).min)
_MINUS_INFINITY = np.float32(-np.inf)

kernel: Any = njit(error_model="numpy")
inlined: Any = njit(error_model="numpy", forceinline=True)


@inlined
def exp(x):
    """e^x for x <= 0: at most 2 ulp off; 0 below -87.7, where e^x leaves the normal fp32 numbers; NaN stays.

    2^k 2^r with k = rint(x log2 e) and a polynomial for 2^r, |r| <= 0.5. The integer k + 127 becomes the exponent bits
    of a factor, and 0 for k = -127.
    """
    x = simd.at_least(x, splat(_LOWEST))
    t = fma(x, splat(_LOG2E), splat(_TO_INTEGER))
    r = fma(x, splat(_LOG2E), splat(_TO_INTEGER) - t)
    r = fma(x, splat(_LOG2E_LOW), r)
    p = fma(splat(_C6), r, splat(_C5))
    p = fma(p, r, splat(_C4))
    p = fma(p, r, splat(_C3))
    p = fma(p, r, splat(_C2))
    p = fma(p, r, splat(_C1))
    p = fma(p, r, splat(_ONE))
    return p * simd.from_bits(simd.shift_left(simd.bits(t), simd.isplat(np.int32(23))))


@inlined
def score(candidate, c):
    """z: the score with its ape."""
    return load(candidate.score + c) + load(candidate.bias + c)


@kernel
def two_pass(table, n, begin, end, work, out):
    """P = sum e^(z - m) K / sum e^(z - m), oldest to newest, for channel bytes begin .. end - 1 of the table's rows.

    ``work`` takes 3 rows of channels; P goes to out + begin ...
    """
    if n <= 8:
        _few(table, n, begin, end, out)
        return
    span = end - begin
    top, total, pooled = work, work + span, work + 2 * span
    for c in range(0, span, BYTES):
        store(top + c, splat(_MINUS_INFINITY))
        store(total + c, splat(_ZERO))
        store(pooled + c, splat(_ZERO))
    whole = n // 4 * 4
    for j in range(0, whole, 4):
        z0, z1, z2, z3 = table[j].score, table[j + 1].score, table[j + 2].score, table[j + 3].score
        a0, a1, a2, a3 = table[j].bias, table[j + 1].bias, table[j + 2].bias, table[j + 3].bias
        for c in range(0, span, BYTES):
            at = begin + c
            m = load(top + c)
            m = simd.at_least(load(z0 + at) + load(a0 + at), m)
            m = simd.at_least(load(z1 + at) + load(a1 + at), m)
            m = simd.at_least(load(z2 + at) + load(a2 + at), m)
            m = simd.at_least(load(z3 + at) + load(a3 + at), m)
            store(top + c, m)
    for j in range(whole, n):
        for c in range(0, span, BYTES):
            store(top + c, simd.at_least(score(table[j], begin + c), load(top + c)))
    for j in range(0, whole, 4):
        k0, k1, k2, k3 = table[j].kv, table[j + 1].kv, table[j + 2].kv, table[j + 3].kv
        z0, z1, z2, z3 = table[j].score, table[j + 1].score, table[j + 2].score, table[j + 3].score
        a0, a1, a2, a3 = table[j].bias, table[j + 1].bias, table[j + 2].bias, table[j + 3].bias
        for c in range(0, span, BYTES):
            at = begin + c
            m, l, o = load(top + c), load(total + c), load(pooled + c)
            e = exp(load(z0 + at) + load(a0 + at) - m)
            l, o = l + e, fma(e, load(k0 + at), o)
            e = exp(load(z1 + at) + load(a1 + at) - m)
            l, o = l + e, fma(e, load(k1 + at), o)
            e = exp(load(z2 + at) + load(a2 + at) - m)
            l, o = l + e, fma(e, load(k2 + at), o)
            e = exp(load(z3 + at) + load(a3 + at) - m)
            l, o = l + e, fma(e, load(k3 + at), o)
            store(total + c, l)
            store(pooled + c, o)
    for j in range(whole, n):
        kv = table[j].kv
        for c in range(0, span, BYTES):
            e = exp(score(table[j], begin + c) - load(top + c))
            store(total + c, load(total + c) + e)
            store(pooled + c, fma(e, load(kv + begin + c), load(pooled + c)))
    for c in range(0, span, BYTES):
        store(out + begin + c, load(pooled + c) / load(total + c))


@kernel
def _few(table, n, begin, end, out):
    """``two_pass`` for windows of a few tokens: one pass over channels, sums in registers."""
    for c in range(begin, end, BYTES):
        m = splat(_MINUS_INFINITY)
        for j in range(n):
            m = simd.at_least(score(table[j], c), m)
        l, o = splat(_ZERO), splat(_ZERO)
        for j in range(n):
            e = exp(score(table[j], c) - m)
            l, o = l + e, fma(e, load(table[j].kv + c), o)
        store(out + c, o / l)


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


@kernel
def finish(acc, begin, end, head_bytes, out):
    """P = o / l."""
    for c in range(begin, end, BYTES):
        store(out + c, load(acc + 2 * head_bytes + c) / load(acc + head_bytes + c))
