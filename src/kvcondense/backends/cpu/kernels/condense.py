"""The step in Numba: tasks that threads take from shared counters. Windows first, then whatever later steps read.

A window is pooled in one piece or, if there are fewer windows than threads, in blocks of channels; whoever pools the
last block finishes the row. Channels never meet before the norm, so neither threads nor blocks change a bit.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import encode, fields, pool, row, window
from kvcondense.backends.cpu.kernels.pool import ENTRY, kernel, table_at
from kvcondense.backends.cpu.kernels.simd import BYTES, LANES, fetch_add, load, splat, store

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)
_call_at = fields.view(params.Call)


@kernel
def _pool(call, q, index, first, last, scratch, out):
    """P of window ``index`` of request q for channel bytes first .. last - 1, to out + first ..."""
    spec = call.layer.spec
    ratio, n = spec.ratio, spec.window
    row_bytes, staged = 4 * spec.head_dim, call.staged
    work = scratch + 2 * row_bytes + ENTRY * n  # scratch: zeros, a row, the table, then what a pool needs
    end = (index + 1) * ratio
    begin = max(end - n, 0)
    count = end - begin
    table = table_at(scratch + 2 * row_bytes)
    stored = window.candidates(call, q, begin, end, index * ratio, table, scratch)
    if not staged:
        pool.two_pass(table, count, first, last, work, out)
        return
    copied, buffer = table_at(work + 3 * row_bytes), work + 3 * row_bytes + ENTRY * n
    for at in range(first, last, 4 * staged):
        size = min(4 * staged, last - at)
        window.stage(call, count, stored, table, copied, at // 4, size // 4, buffer, scratch)
        pool.two_pass(copied, count, 0, size, work, out + at)


@kernel
def _fold(call, q, begin, stop, acc, first, last, scratch):
    """(m, l, o) at ``acc`` of positions begin .. stop - 1 of request q: stored values, then the log, then this step."""
    spec = call.layer.spec
    row_bytes, staged = 4 * spec.head_dim, call.staged
    slot, start = call.plan.state_table[q], call.plan.start[q]
    folded = call.layer.folded[slot]
    stored = begin < start and folded > begin
    old = call.layer.acc + 3 * row_bytes * slot
    for c in range(first, last, BYTES):
        store(acc + c, load(old + c) if stored else splat(_MINUS_INFINITY))
        store(acc + row_bytes + c, load(old + row_bytes + c) if stored else splat(_ZERO))
        store(acc + 2 * row_bytes + c, load(old + 2 * row_bytes + c) if stored else splat(_ZERO))
    if stored:
        begin = folded
    if begin >= stop:
        return
    table = table_at(scratch + 2 * row_bytes)
    count = stop - begin
    logged = window.candidates(call, q, begin, stop, begin, table, scratch)
    if not staged:
        pool.fold(table, count, first, last, acc, row_bytes)
        return
    n = spec.window
    behind = scratch + 5 * row_bytes + ENTRY * n
    copied, buffer = table_at(behind), behind + ENTRY * n
    for at in range(first, last, 4 * staged):
        size = min(4 * staged, last - at)
        window.stage(call, count, logged, table, copied, at // 4, size // 4, buffer, scratch)
        pool.fold(copied, count, 0, size, acc + at, row_bytes)


@kernel
def _finish(call, e, index, scratch):
    """P of window e in its row -> norm, RoPE, Hadamard, in place, and the cache's bytes."""
    spec = call.layer.spec
    d = spec.head_dim
    out, work = call.rows + 4 * d * e, scratch + 4 * d
    row.rms_norm(out, call.layer.gamma, spec, work)
    latent = call.latent
    if latent:
        for c in range(0, 4 * d, BYTES):
            store(latent + 4 * d * e + c, load(out + c))
    size = spec.rope_dim
    if size:
        angle = 2 * size * index * spec.ratio
        row.rope(out, call.layer.cos + angle, call.layer.sin + angle, spec)
    if spec.rotate:
        row.hadamard(out, spec)
    slot = call.plan.window_slot[e]
    if slot >= 0 and call.store and call.layer.format:
        encode.put(out, slot, call, work)


@kernel
def _window(call, task, blocks, scratch):
    """Pool one block of channels of a window; finish the window if it was the last one."""
    spec = call.layer.spec
    d = spec.head_dim
    e, block = task // blocks, task % blocks
    q, index = call.plan.window_request[e], call.plan.window_index[e]
    if q < 0:
        return
    vectors = d // LANES
    first, last = BYTES * (vectors * block // blocks), BYTES * (vectors * (block + 1) // blocks)
    out = call.rows + 4 * d * e
    if call.layer.acc:
        ratio = spec.ratio
        acc = scratch + 8 * d + ENTRY * spec.window
        _fold(call, q, index * ratio, (index + 1) * ratio, acc, first, last, scratch)
        pool.finish(acc, first, last, 4 * d, out)
    else:
        _pool(call, q, index, first, last, scratch, out)
    if blocks > 1 and fetch_add(call.blocks_done + 8 * e, 1) < blocks - 1:
        return
    _finish(call, e, index, scratch)


@kernel
def _open(call, q, scratch):
    """Fold what request q commits beyond its last window into its online state."""
    tokens, start = call.plan.query_start[q + 1] - call.plan.query_start[q], call.plan.start[q]
    if start < 0 or tokens <= 0:
        return
    spec = call.layer.spec
    ratio, row_bytes = spec.ratio, 4 * spec.head_dim
    committed = start + tokens - call.plan.drafts[q]
    acc = scratch + 2 * row_bytes + ENTRY * spec.window
    _fold(call, q, committed // ratio * ratio, committed, acc, 0, row_bytes, scratch)
    slot = call.plan.state_table[q]
    target = call.layer.acc + 3 * row_bytes * slot
    for c in range(0, 3 * row_bytes, BYTES):
        store(target + c, load(acc + c))
    call.layer.folded[slot] = committed


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
def _work(call):
    number = fetch_add(call.threads, 1)
    scratch = call.scratch + number * call.scratch_bytes
    spec = call.layer.spec
    for c in range(0, 4 * spec.head_dim, BYTES):
        store(scratch + c, splat(_ZERO))
    blocks, chunk = call.blocks, call.chunk
    total = call.windows * blocks
    done = call.done
    while True:
        first = _take(call.next_window, total, chunk)
        if first < 0:
            break
        last = min(first + chunk, total)
        for task in range(first, last):
            _window(call, task, blocks, scratch)
        fetch_add(done, last - first)
    online, keeps = call.layer.acc, call.keeps
    if keeps == 0 and online == 0:
        return
    _wait(done, total)
    if online:
        requests = call.requests
        while True:
            q = _take(call.next_open, requests, 1)
            if q < 0:
                break
            _open(call, q, scratch)
            fetch_add(done, 1)
        if keeps == 0:
            return
        _wait(done, total + requests)
    while True:
        first = _take(call.next_keep, keeps, 4)
        if first < 0:
            break
        for k in range(first, min(first + 4, keeps)):
            window.keep(call, k)


@cfunc("void(int64)", error_model="numpy")
def entry(p):
    """Run a call block; every thread of a launch enters here."""
    _work(_call_at(p))
