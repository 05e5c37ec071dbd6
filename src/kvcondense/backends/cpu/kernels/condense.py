"""The step in Numba: tasks that threads take from shared counters. Windows, then whatever later steps read.

A window is pooled in one piece or, if there are fewer windows than threads, in blocks of channels; whoever pools the
last block finishes the row. Channels never meet before the norm, so neither threads nor blocks change a bit.
"""

from __future__ import annotations

import numpy as np

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import fields, functions, row, window
from kvcondense.backends.cpu.kernels.ahead import ask_rest
from kvcondense.backends.cpu.kernels.functions import kernel
from kvcondense.backends.cpu.kernels.integers import fetch_add, invoke, larger, smaller, take
from kvcondense.backends.cpu.kernels.simd import BYTES, load, splat, store
from kvcondense.backends.cpu.params import ENTRY, GROUP, ROOM, STAGED

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0)
_call_at, _room_at = fields.view(params.Call), fields.view(params.Room)


@kernel
def _finish(call, e, index, room):
    """P of window e in its row -> norm, RoPE, Hadamard, in place, and the cache's bytes."""
    spec = call.layer.spec
    d = spec.head_dim
    out = call.rows + 4 * d * e
    row.rms_norm(out, call.layer.gamma, spec, room)
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
        invoke(call.layer.encode, out, slot, call, room)
    else:
        ask_rest(room, 4 * d)


@kernel
def _look(call, task, room, table):
    """Find the candidates of a task's window; returns how many come from the state, -1 if it has none."""
    e = task // call.blocks
    q, spec = call.plan.window_request[e], call.layer.spec
    if q < 0 or call.layer.acc:
        return -1
    ratio = spec.ratio
    begin = call.plan.window_index[e] * ratio
    return window.candidates(call, q, larger(begin + ratio - spec.window, 0), begin + ratio, begin, room, table)


@kernel
def _window(call, task, stored, table, following, room):
    """Pool one block of channels of a window; finish the window if it was the last one.

    ``following``: a table of the rows to ask for meanwhile.
    """
    spec = call.layer.spec
    d, blocks = spec.head_dim, call.blocks
    e, block = task // blocks, task % blocks
    q, index = call.plan.window_request[e], call.plan.window_index[e]
    if q < 0:
        return
    if call.layer.acc:
        invoke(call.layer.online, call, room, e, block)
    else:
        first, last = window.channels(call, block)
        out, count = call.rows + 4 * d * e, smaller(spec.window, (index + 1) * spec.ratio)
        window.pooled(call, count, stored, table, following, first, last, room, out)
    if blocks > 1 and fetch_add(call.blocks_done + 8 * e, 1) < blocks - 1:
        return
    _finish(call, e, index, room)


@kernel
def _windows(call, room):
    """Take windows until there are none, the next one before one is pooled: its first rows are asked for meanwhile."""
    total, chunk, spec = call.windows * call.blocks, call.chunk, call.layer.spec
    task = take(call.next_window, total, chunk)
    table, following = room.table, room.following
    stored = _look(call, task, room, table) if task >= 0 else 0
    end = smaller(task + chunk, total)
    while task >= 0:
        coming = task + 1
        if coming >= end:
            coming = take(call.next_window, total, chunk)
            end = smaller(coming + chunk, total)
        ahead = table
        coming_stored = _look(call, coming, room, following) if coming >= 0 else -1
        if coming_stored >= 0:
            ahead = following
            if spec.ratio < spec.window and spec.window <= GROUP and coming_stored == 0:
                ahead = window.in_order(call, coming // call.blocks, following, room)
        room.later, room.later_rows = ahead, spec.window if coming_stored >= 0 and spec.window <= GROUP else 0
        room.later_halved = 0 if window.in_fp32(call, coming_stored) else 1
        _window(call, task, stored, table, ahead, room)
        table, following = following, table
        task, stored = coming, coming_stored


@kernel
def _room(call):
    """This thread's part of the scratch, laid out as ``Room`` lists it."""
    base = call.scratch + fetch_add(call.threads, 1) * call.scratch_bytes
    room = _room_at(base)
    spec = call.layer.spec
    row_bytes = 4 * spec.head_dim
    entries = (spec.window + GROUP - 1) // GROUP * GROUP * ENTRY
    room.zeros = base + ROOM
    room.nothing = room.zeros + row_bytes
    room.row = room.nothing + row_bytes
    room.factors = room.row + row_bytes
    room.scales = room.factors + row_bytes
    room.scales_away = row_bytes
    room.work = room.scales + 3 * row_bytes
    room.copies = room.work + 3 * row_bytes
    room.table = room.copies + 8 * GROUP * STAGED
    room.following = room.table + entries
    room.lines = room.following + entries
    room.copied = room.lines + GROUP * ENTRY
    for c in range(0, row_bytes, BYTES):
        store(room.zeros + c, splat(_ZERO))
        store(room.nothing + c, splat(_MINUS_INFINITY))
    return room


@kernel
def _work(call):
    """The phases that the launch has. None waits for another thread: what must come later comes in a later launch."""
    room, phases = _room(call), call.phases
    if phases & params.WINDOWS:
        _windows(call, room)
    if phases & params.OPEN:
        invoke(call.layer.online, call, room, -1, 0)
    while phases & params.KEEP:
        first = take(call.next_keep, call.keeps, 4)
        if first < 0:
            break
        for k in range(first, smaller(first + 4, call.keeps)):
            window.keep(call, k)


@functions.entry
def entry(p):
    """Run a call block; every thread of a launch enters here."""
    _work(_call_at(p))
