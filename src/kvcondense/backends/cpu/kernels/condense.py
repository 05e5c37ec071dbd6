"""The step in Numba: tasks that threads take from shared counters. Windows first, then whatever later steps read.

A window is pooled in one piece or, if there are fewer windows than threads, in blocks of channels; whoever pools the
last block finishes the row. Channels never meet before the norm, so neither threads nor blocks change a bit.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import encode, pool, row, simd, window
from kvcondense.backends.cpu.kernels.pool import ENTRY, kernel
from kvcondense.backends.cpu.kernels.simd import BYTES, LANES, fetch_add, load, load_i64, splat, store

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)


@kernel
def _pool(p, q, index, first, last, scratch, out):
    """P of window ``index`` of request q for channel bytes first .. last - 1, to out + first ..."""
    spec = load_i64(p + 8 * params.SPEC)
    ratio, n = load_i64(spec + 8 * params.RATIO), load_i64(spec + 8 * params.WINDOW)
    row_bytes, staged = 4 * load_i64(spec + 8 * params.HEAD_DIM), load_i64(spec + 8 * params.STAGED)
    table = scratch + 2 * row_bytes  # scratch: zeros, a row, then what a pool needs
    end = (index + 1) * ratio
    begin = max(end - n, 0)
    count = end - begin
    stored = window.candidates(p, q, begin, end, index * ratio, table, scratch)
    work = table + ENTRY * n
    if not staged:
        pool.two_pass(table, count, first, last, work, out)
        return
    copied = work + 3 * row_bytes
    buffer = copied + ENTRY * n
    for at in range(first, last, 4 * staged):
        size = min(4 * staged, last - at)
        window.stage(p, count, stored, table, copied, at // 4, size // 4, buffer, scratch)
        pool.two_pass(copied, count, 0, size, work, out + at)


@kernel
def _fold(p, q, begin, stop, acc, first, last, scratch):
    """(m, l, o) at ``acc`` of positions begin .. stop - 1 of request q: stored values, then the log, then this step."""
    spec = load_i64(p + 8 * params.SPEC)
    row_bytes, staged = 4 * load_i64(spec + 8 * params.HEAD_DIM), load_i64(spec + 8 * params.STAGED)
    slot = load_i64(load_i64(p + 8 * params.STATE_TABLE) + 8 * q)
    start = load_i64(load_i64(p + 8 * params.START) + 8 * q)
    folded = load_i64(load_i64(p + 8 * params.FOLDED) + 8 * slot)
    stored = begin < start and folded > begin
    old = load_i64(p + 8 * params.ACC) + 3 * row_bytes * slot
    for c in range(first, last, BYTES):
        store(acc + c, load(old + c) if stored else splat(_MINUS_INFINITY))
        store(acc + row_bytes + c, load(old + row_bytes + c) if stored else splat(_ZERO))
        store(acc + 2 * row_bytes + c, load(old + 2 * row_bytes + c) if stored else splat(_ZERO))
    if stored:
        begin = folded
    if begin >= stop:
        return
    table = scratch + 2 * row_bytes
    count = stop - begin
    logged = window.candidates(p, q, begin, stop, begin, table, scratch)
    if not staged:
        pool.fold(table, count, first, last, acc, row_bytes)
        return
    n = load_i64(spec + 8 * params.WINDOW)
    copied = table + ENTRY * n + 3 * row_bytes
    for at in range(first, last, 4 * staged):
        size = min(4 * staged, last - at)
        window.stage(p, count, logged, table, copied, at // 4, size // 4, copied + ENTRY * n, scratch)
        pool.fold(copied, count, 0, size, acc + at, row_bytes)


@kernel
def _finish(p, e, index, scratch):
    """P of window e in ROWS -> norm, RoPE, Hadamard, in place, and the cache's bytes."""
    spec = load_i64(p + 8 * params.SPEC)
    d = load_i64(spec + 8 * params.HEAD_DIM)
    out, work = load_i64(p + 8 * params.ROWS) + 4 * d * e, scratch + 4 * d
    row.rms_norm(out, load_i64(p + 8 * params.GAMMA), spec, work)
    latent = load_i64(p + 8 * params.LATENT)
    if latent:
        for c in range(0, 4 * d, BYTES):
            store(latent + 4 * d * e + c, load(out + c))
    size = load_i64(spec + 8 * params.ROPE_DIM)
    if size:
        angle = 2 * size * index * load_i64(spec + 8 * params.RATIO)
        row.rope(out, load_i64(p + 8 * params.COS) + angle, load_i64(p + 8 * params.SIN) + angle, spec)
    if load_i64(spec + 8 * params.ROTATE):
        row.hadamard(out, spec)
    slot = load_i64(load_i64(p + 8 * params.WINDOW_SLOT) + 8 * e)
    if slot >= 0 and load_i64(p + 8 * params.FORMAT):
        encode.put(out, slot, p, work)


@kernel
def _window(p, task, blocks, scratch):
    """Pool one block of channels of a window; finish the window if it was the last one."""
    spec = load_i64(p + 8 * params.SPEC)
    d = load_i64(spec + 8 * params.HEAD_DIM)
    e, block = task // blocks, task % blocks
    q = load_i64(load_i64(p + 8 * params.WINDOW_REQUEST) + 8 * e)
    if q < 0:
        return
    index = load_i64(load_i64(p + 8 * params.WINDOW_INDEX) + 8 * e)
    vectors = d // LANES
    first, last = BYTES * (vectors * block // blocks), BYTES * (vectors * (block + 1) // blocks)
    out = load_i64(p + 8 * params.ROWS) + 4 * d * e
    if load_i64(p + 8 * params.ACC):
        ratio = load_i64(spec + 8 * params.RATIO)
        acc = scratch + 8 * d + ENTRY * load_i64(spec + 8 * params.WINDOW)
        _fold(p, q, index * ratio, (index + 1) * ratio, acc, first, last, scratch)
        pool.finish(acc, first, last, 4 * d, out)
    else:
        _pool(p, q, index, first, last, scratch, out)
    if blocks > 1:
        left = p + params.WINDOW_BLOCKS + 8 * e
        if fetch_add(left, 1) < blocks - 1:
            return
    _finish(p, e, index, scratch)


@kernel
def _open(p, q, scratch):
    """Fold what request q commits beyond its last window into its online state."""
    query_start = load_i64(p + 8 * params.QUERY_START) + 8 * q
    tokens = load_i64(query_start + 8) - load_i64(query_start)
    start = load_i64(load_i64(p + 8 * params.START) + 8 * q)
    if start < 0 or tokens <= 0:
        return
    spec = load_i64(p + 8 * params.SPEC)
    ratio, row_bytes = load_i64(spec + 8 * params.RATIO), 4 * load_i64(spec + 8 * params.HEAD_DIM)
    committed = start + tokens - load_i64(load_i64(p + 8 * params.DRAFTS) + 8 * q)
    acc = scratch + 2 * row_bytes + ENTRY * load_i64(spec + 8 * params.WINDOW)
    _fold(p, q, committed // ratio * ratio, committed, acc, 0, row_bytes, scratch)
    slot = load_i64(load_i64(p + 8 * params.STATE_TABLE) + 8 * q)
    target = load_i64(p + 8 * params.ACC) + 3 * row_bytes * slot
    for c in range(0, 3 * row_bytes, BYTES):
        store(target + c, load(acc + c))
    simd.store_i64(load_i64(p + 8 * params.FOLDED) + 8 * slot, committed)


@kernel
def _take(counter, total, chunk):
    """The first of the next ``chunk`` tasks, or -1."""
    task = fetch_add(counter, chunk)
    return task if task < total else -1


@kernel
def _wait(counter, total):
    """Until all tasks of a phase are done: threads that still run them have taken them already."""
    while fetch_add(counter, 0) < total:
        pass


@kernel
def _work(p):
    number = fetch_add(p + params.THREADS, 1)
    scratch = load_i64(p + 8 * params.SCRATCH) + number * load_i64(p + 8 * params.SCRATCH_BYTES)
    spec = load_i64(p + 8 * params.SPEC)
    for c in range(0, 4 * load_i64(spec + 8 * params.HEAD_DIM), BYTES):
        store(scratch + c, splat(_ZERO))
    blocks, chunk = load_i64(p + 8 * params.BLOCKS), load_i64(p + 8 * params.CHUNK)
    total = load_i64(p + 8 * params.WINDOWS) * blocks
    done = p + params.DONE_WINDOWS
    while True:
        first = _take(p + params.NEXT_WINDOW, total, chunk)
        if first < 0:
            break
        last = min(first + chunk, total)
        for task in range(first, last):
            _window(p, task, blocks, scratch)
        fetch_add(done, last - first)
    online, keeps = load_i64(p + 8 * params.ACC), load_i64(p + 8 * params.KEEPS)
    if keeps == 0 and online == 0:
        return
    _wait(done, total)
    if online:
        requests = load_i64(p + 8 * params.REQUESTS)
        while True:
            q = _take(p + params.NEXT_OPEN, requests, 1)
            if q < 0:
                break
            _open(p, q, scratch)
            fetch_add(done, 1)
        if keeps == 0:
            return
        _wait(done, total + requests)
    while True:
        first = _take(p + params.NEXT_KEEP, keeps, 4)
        if first < 0:
            break
        for k in range(first, min(first + 4, keeps)):
            window.keep(p, k)


@cfunc("void(int64)", error_model="numpy")
def entry(p):
    """Run a call block; every thread of a launch enters here."""
    _work(p)
