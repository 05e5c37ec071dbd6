"""Training's pool in Numba: P and what the softmax needs to be formed again, then the gradients, strip by strip.

A task is a strip of windows and a block of channels. It alone writes their gradients, and it adds ape's up in the order
of windows, so that threads change no bit.
"""

from __future__ import annotations

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import fields, functions, pool, training_rows
from kvcondense.backends.cpu.kernels.functions import kernel
from kvcondense.backends.cpu.kernels.integers import fetch_add, smaller
from kvcondense.backends.cpu.kernels.pool import exp, score, table_at
from kvcondense.backends.cpu.kernels.simd import BYTES, load, store
from kvcondense.backends.cpu.params import ENTRY, GROUP

_pool_at, _rows_at = fields.view(params.TrainingPool), fields.view(params.TrainingRows)


@kernel
def _candidates(call, e, table):
    """Fill the table with the candidates of window e, oldest first; returns how many it lacks at the front."""
    ratio, width = call.ratio, call.width
    n, zeros = call.window, call.zeros
    stride, ape = call.stride, call.ape
    gate = call.gate
    first = call.first[e]
    missing = n - ratio if call.index[e] == 0 else 0
    late = width - call.head_dim
    tokens = call.tokens
    for j in range(missing, n):
        own = j - (n - ratio)
        channel = late if own >= 0 else 0
        kv = tokens + (first + own) * stride + 4 * channel
        phase = own if own >= 0 else own + ratio
        candidate = table[j - missing]
        candidate.kv = kv
        candidate.score = kv + 4 * width if gate else zeros
        candidate.bias = ape + 4 * (phase * width + channel) if ape else zeros
    return missing


@kernel
def _forward(call, e, begin, end, scratch):
    n, row = call.window, 4 * call.head_dim * e
    span, zeros = end - begin, call.zeros
    table = scratch + 3 * span
    count = n - _candidates(call, e, table_at(table))
    pool.pad(table, count, zeros, call.nothing)
    for index in range((count + GROUP - 1) // GROUP):
        here = table + ENTRY * GROUP * index
        pool.group(params.FP32, index, count, here, here, begin, end, scratch, span, call.pooled + row)
    for c in range(0, span, BYTES):
        store(call.lse + row + begin + c, load(scratch + c))
        store(call.total + row + begin + c, load(scratch + span + c))


@kernel
def _backward(call, e, begin, end, scratch, sums):
    """dK_j = w_j g, dz_j = w_j g (K_j - P), and dz_j added to ``sums`` + its candidate's row."""
    n, d = call.window, call.head_dim
    width, gate = call.width, call.gate
    table = table_at(scratch)
    missing = _candidates(call, e, table)
    pooled, lse = call.pooled + 4 * d * e, call.lse + 4 * d * e
    given = call.given + 4 * d * e
    away = call.gradient - call.tokens
    for j in range(missing, n):
        candidate = table[j - missing]
        kv = candidate.kv
        target, total = kv + away, sums + 4 * d * j
        for c in range(begin, end, BYTES):
            w = exp(score(candidate, c) - load(lse + c)) * load(given + c)
            dz = w * (load(kv + c) - load(pooled + c))
            store(target + c, w)
            store(total + c, load(total + c) + dz)
            if gate:
                store(target + 4 * width + c, dz)


@kernel
def _work(call):
    number = fetch_add(call.threads, 1)
    scratch = call.scratch + number * call.scratch_bytes
    windows, strip = call.windows, call.strip
    d, channels = call.head_dim, call.channels
    blocks = (d + channels - 1) // channels
    total = (windows + strip - 1) // strip * blocks
    back, n = call.total == 0, call.window
    while True:
        task = fetch_add(call.next, 1)
        if task >= total:
            break
        at, block = task // blocks, task % blocks
        begin, end = 4 * channels * block, 4 * smaller(channels * (block + 1), d)
        sums = call.bias_gradient + 4 * n * d * at
        for e in range(strip * at, smaller(strip * (at + 1), windows)):
            if back:
                _backward(call, e, begin, end, scratch, sums)
            else:
                _forward(call, e, begin, end, scratch)


@functions.entry
def entry(p):
    """Run a block; every thread of a launch enters here."""
    call = _pool_at(p)
    if call.what == params.POOL:
        _work(call)
    else:
        training_rows.work(_rows_at(p))
