"""Online states in Numba: (m, l, o) of a request, folded token by token to a window's end or up to its last token."""

from __future__ import annotations

import numpy as np

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import fields, functions, pool, window
from kvcondense.backends.cpu.kernels.functions import kernel
from kvcondense.backends.cpu.kernels.integers import larger, take
from kvcondense.backends.cpu.kernels.simd import BYTES, load, splat, store

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)
_call_at, _room_at = fields.view(params.Call), fields.view(params.Room)


@kernel
def _fold(call, q, begin, stop, first, last, room):
    """(m, l, o) at the room's ``work`` of positions begin .. stop - 1 of q: what was folded, the log, this step."""
    row_bytes, acc = 4 * call.layer.spec.head_dim, room.work
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
    if call.layer.state_page_stride == 0:  # no log: whatever ``folded`` holds, no row of one is read
        begin = larger(begin, start)
    if begin < stop:
        logged = window.candidates(call, q, begin, stop, begin, room, room.table)
        window.fold(call, stop - begin, logged, first, last, room)


@kernel
def _open(call, q, room):
    """Fold what request q commits beyond its last window into its online state."""
    tokens, start = call.plan.query_start[q + 1] - call.plan.query_start[q], call.plan.start[q]
    if start < 0 or tokens <= 0:
        return
    spec = call.layer.spec
    ratio, row_bytes = spec.ratio, 4 * spec.head_dim
    committed = start + tokens - call.plan.drafts[q]
    _fold(call, q, committed // ratio * ratio, committed, 0, row_bytes, room)
    slot = call.plan.state_table[q]
    target = call.layer.acc + 3 * row_bytes * slot
    for c in range(0, 3 * row_bytes, BYTES):
        store(target + c, load(room.work + c))
    call.layer.folded[slot] = committed


@kernel
def _close(call, e, block, room):
    """P of window e for one block of channels, to its row."""
    spec, q = call.layer.spec, call.plan.window_request[e]
    first, last = window.channels(call, block)
    begin = call.plan.window_index[e] * spec.ratio
    _fold(call, q, begin, begin + spec.ratio, first, last, room)
    pool.finish(room.work, first, last, 4 * spec.head_dim, call.rows + 4 * spec.head_dim * e)


@functions.entry
def entry(p, where, e, block):
    """Close window e, or, if it is negative, take requests until there are none and open what comes next."""
    call, room = _call_at(p), _room_at(where)
    if e >= 0:
        _close(call, e, block, room)
        return
    q = take(call.next_open, call.requests, 1)
    while q >= 0:
        _open(call, q, room)
        q = take(call.next_open, call.requests, 1)
