"""Training's pool in Numba: P and what the softmax needs to be formed again, then the gradients, strip by strip.

A task is a strip of windows and a block of channels. It alone writes their gradients, and it adds ape's up in the order
of windows, so that threads change no bit.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import pool, simd, training_rows
from kvcondense.backends.cpu.kernels.pool import ENTRY, exp, kernel
from kvcondense.backends.cpu.kernels.simd import BYTES, fetch_add, fma, load, load_i64, splat, store, store_i64

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)


@kernel
def _candidates(p, e, table):
    """Fill the table with the candidates of window e, oldest first; returns how many it lacks at the front."""
    ratio, width = load_i64(p + 8 * params.T_RATIO), load_i64(p + 8 * params.T_WIDTH)
    n, zeros = load_i64(p + 8 * params.T_WINDOW), load_i64(p + 8 * params.T_ZEROS)
    stride, ape = load_i64(p + 8 * params.T_STRIDE), load_i64(p + 8 * params.T_APE)
    gate = load_i64(p + 8 * params.T_GATE)
    first = load_i64(load_i64(p + 8 * params.T_FIRST) + 8 * e)
    missing = n - ratio if load_i64(load_i64(p + 8 * params.T_INDEX) + 8 * e) == 0 else 0
    late = width - load_i64(p + 8 * params.T_HEAD_DIM)
    tokens = load_i64(p + 8 * params.T_TOKENS)
    for j in range(missing, n):
        own = j - (n - ratio)
        channel = late if own >= 0 else 0
        kv = tokens + (first + own) * stride + 4 * channel
        phase = own if own >= 0 else own + ratio
        store_i64(table, kv)
        store_i64(table + 8, kv + 4 * width if gate else zeros)
        store_i64(table + 16, ape + 4 * (phase * width + channel) if ape else zeros)
        table += ENTRY
    return missing


@kernel
def _few(table, n, begin, end, out, top, total):
    """P, m and l of windows of a few tokens, for channel bytes begin .. end - 1."""
    for c in range(begin, end, BYTES):
        m = splat(_MINUS_INFINITY)
        for j in range(n):
            t = table + j * ENTRY
            m = simd.at_least(load(load_i64(t + 8) + c) + load(load_i64(t + 16) + c), m)
        l, o = splat(_ZERO), splat(_ZERO)
        for j in range(n):
            t = table + j * ENTRY
            e = exp(load(load_i64(t + 8) + c) + load(load_i64(t + 16) + c) - m)
            l, o = l + e, fma(e, load(load_i64(t) + c), o)
        store(out + c, o / l)
        store(top + c, m)
        store(total + c, l)


@kernel
def _forward(p, e, begin, end, scratch):
    n, row = load_i64(p + 8 * params.T_WINDOW), 4 * load_i64(p + 8 * params.T_HEAD_DIM) * e
    work = scratch + ENTRY * n
    count = n - _candidates(p, e, scratch)
    out, top = load_i64(p + 8 * params.T_POOLED) + row, load_i64(p + 8 * params.T_LSE) + row
    total = load_i64(p + 8 * params.T_TOTAL) + row
    if count <= 8:
        _few(scratch, count, begin, end, out, top, total)
        return
    pool.two_pass(scratch, count, begin, end, work, out)
    for c in range(0, end - begin, BYTES):
        store(top + begin + c, load(work + c))
        store(total + begin + c, load(work + end - begin + c))


@kernel
def _backward(p, e, begin, end, scratch, sums):
    """dK_j = w_j g, dz_j = w_j g (K_j - P), and dz_j added to ``sums`` + its candidate's row."""
    n, d = load_i64(p + 8 * params.T_WINDOW), load_i64(p + 8 * params.T_HEAD_DIM)
    width, gate = load_i64(p + 8 * params.T_WIDTH), load_i64(p + 8 * params.T_GATE)
    missing = _candidates(p, e, scratch)
    pooled, lse = load_i64(p + 8 * params.T_POOLED) + 4 * d * e, load_i64(p + 8 * params.T_LSE) + 4 * d * e
    given = load_i64(p + 8 * params.T_GIVEN) + 4 * d * e
    away = load_i64(p + 8 * params.T_GRADIENT) - load_i64(p + 8 * params.T_TOKENS)
    table = scratch
    for j in range(missing, n):
        kv, score, bias = load_i64(table), load_i64(table + 8), load_i64(table + 16)
        target, total = kv + away, sums + 4 * d * j
        for c in range(begin, end, BYTES):
            w = exp(load(score + c) + load(bias + c) - load(lse + c)) * load(given + c)
            dz = w * (load(kv + c) - load(pooled + c))
            store(target + c, w)
            store(total + c, load(total + c) + dz)
            if gate:
                store(target + 4 * width + c, dz)
        table += ENTRY


@kernel
def _work(p):
    number = fetch_add(p + 8 * params.T_THREADS, 1)
    scratch = load_i64(p + 8 * params.T_SCRATCH) + number * load_i64(p + 8 * params.T_SCRATCH_BYTES)
    windows, strip = load_i64(p + 8 * params.T_WINDOWS), load_i64(p + 8 * params.T_STRIP)
    d, channels = load_i64(p + 8 * params.T_HEAD_DIM), load_i64(p + 8 * params.T_CHANNELS)
    blocks = (d + channels - 1) // channels
    total = (windows + strip - 1) // strip * blocks
    back, n = load_i64(p + 8 * params.T_TOTAL) == 0, load_i64(p + 8 * params.T_WINDOW)
    while True:
        task = fetch_add(p + 8 * params.T_NEXT, 1)
        if task >= total:
            break
        at, block = task // blocks, task % blocks
        begin, end = 4 * channels * block, 4 * min(channels * (block + 1), d)
        sums = load_i64(p + 8 * params.T_BIAS_GRADIENT) + 4 * n * d * at
        for e in range(strip * at, min(strip * (at + 1), windows)):
            if back:
                _backward(p, e, begin, end, scratch, sums)
            else:
                _forward(p, e, begin, end, scratch)


@cfunc("void(int64)", error_model="numpy")
def entry(p):
    """Run a block; every thread of a launch enters here."""
    if load_i64(p + 8 * params.T_WHAT) == params.POOL:
        _work(p)
    else:
        training_rows.work(p)
