"""Training's norm, RoPE and Hadamard in Numba: rows of P forward, their gradients back, strip by strip.

Roundings of the REFERENCE profile pass gradients on as they are. gamma's gradient is added up row by row in a strip.
"""

from __future__ import annotations

import math

import numpy as np

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import row, simd
from kvcondense.backends.cpu.kernels.pool import kernel
from kvcondense.backends.cpu.kernels.simd import BYTES, fetch_add, load, load_i64, splat, store


@kernel
def _tables(p, e, spec):
    """cos and sin of row e."""
    at = 2 * load_i64(spec + 8 * params.ROPE_DIM) * load_i64(load_i64(p + 8 * params.F_POSITION) + 8 * e)
    return load_i64(p + 8 * params.F_COS) + at, load_i64(p + 8 * params.F_SIN) + at


@kernel
def _forward(p, e, spec, work):
    d = load_i64(spec + 8 * params.HEAD_DIM)
    out, pooled = load_i64(p + 8 * params.F_OUT) + 4 * d * e, load_i64(p + 8 * params.F_POOLED) + 4 * d * e
    for c in range(0, 4 * d, BYTES):
        store(out + c, load(pooled + c))
    row.rms_norm(out, load_i64(p + 8 * params.F_GAMMA), spec, work)
    if load_i64(spec + 8 * params.ROPE_DIM):
        cos, sin = _tables(p, e, spec)
        row.rope(out, cos, sin, spec)
    if load_i64(spec + 8 * params.ROTATE):
        row.hadamard(out, spec)


@kernel
def _backward(p, e, spec, scratch, sums):
    """y = u s, s = rsqrt(mean(u^2) + eps), g before RoPE: d gamma += g y, du = s (gamma g - y mean(gamma g y))."""
    d = load_i64(spec + 8 * params.HEAD_DIM)
    gamma, rounding = load_i64(p + 8 * params.F_GAMMA), load_i64(spec + 8 * params.ROUND)
    out, pooled = load_i64(p + 8 * params.F_OUT) + 4 * d * e, load_i64(p + 8 * params.F_POOLED) + 4 * d * e
    given, g, y, work = load_i64(p + 8 * params.F_GIVEN) + 4 * d * e, scratch, scratch + 4 * d, scratch + 8 * d
    for c in range(0, 4 * d, BYTES):
        u = load(pooled + c)
        if rounding:
            u = row.round_bf16(u)
        store(g + c, load(given + c))
        store(y + c, u)
        store(work + c, u * u)
    if load_i64(spec + 8 * params.ROTATE):
        row.hadamard(g, spec)
    if load_i64(spec + 8 * params.ROPE_DIM):
        cos, sin = _tables(p, e, spec)
        row.turn(g, cos, sin, spec, np.float32(-1), 0)
    eps = simd.float_of(load_i64(spec + 8 * params.EPS))
    s = splat(np.float32(1) / np.float32(math.sqrt(row.tree_sum(work, d) / np.float32(d) + eps)))
    for c in range(0, 4 * d, BYTES):
        one = load(y + c) * s
        gy = load(g + c) * one
        store(y + c, one)
        store(sums + c, load(sums + c) + gy)
        store(work + c, gy * load(gamma + c))
    mean = splat(row.tree_sum(work, d) / np.float32(d))
    for c in range(0, 4 * d, BYTES):
        store(out + c, s * (load(g + c) * load(gamma + c) - load(y + c) * mean))


@kernel
def work(p):
    """Take strips of rows until there are none."""
    spec, count = load_i64(p + 8 * params.F_SPEC), load_i64(p + 8 * params.F_COUNT)
    d, strip = load_i64(spec + 8 * params.HEAD_DIM), load_i64(p + 8 * params.F_STRIP)
    scratch = load_i64(p + 8 * params.F_SCRATCH) + 12 * d * fetch_add(p + 8 * params.F_THREADS, 1)
    back = load_i64(p + 8 * params.F_GIVEN) != 0
    while True:
        at = fetch_add(p + 8 * params.F_NEXT, 1)
        if at * strip >= count:
            break
        sums = load_i64(p + 8 * params.F_GAMMA_GRADIENT) + 4 * d * at
        for e in range(at * strip, min((at + 1) * strip, count)):
            if back:
                _backward(p, e, spec, scratch, sums)
            else:
                _forward(p, e, spec, scratch)
