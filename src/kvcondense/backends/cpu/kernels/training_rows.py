"""Training's norm, RoPE and Hadamard in Numba: rows of P forward, their gradients back, strip by strip.

Roundings of the REFERENCE profile pass gradients on as they are. gamma's gradient is added up row by row in a strip.
"""

from __future__ import annotations

import math

import numpy as np

from kvcondense.backends.cpu.kernels import fields, row
from kvcondense.backends.cpu.kernels.bf16 import round_bf16
from kvcondense.backends.cpu.kernels.functions import kernel
from kvcondense.backends.cpu.kernels.integers import fetch_add, smaller
from kvcondense.backends.cpu.kernels.simd import BYTES, load, splat, store
from kvcondense.backends.cpu.params import ROOM, Room

_room_at = fields.view(Room)


@kernel
def _tables(call, e, spec):
    """cos and sin of row e."""
    at = 2 * spec.rope_dim * call.position[e]
    return call.cos + at, call.sin + at


@kernel
def _forward(call, e, spec, room):
    d = spec.head_dim
    out, pooled = call.out + 4 * d * e, call.pooled + 4 * d * e
    for c in range(0, 4 * d, BYTES):
        store(out + c, load(pooled + c))
    row.rms_norm(out, call.gamma, spec, room)
    if spec.rope_dim:
        cos, sin = _tables(call, e, spec)
        row.rope(out, cos, sin, spec)
    if spec.rotate:
        row.hadamard(out, spec)


@kernel
def _backward(call, e, spec, scratch, sums):
    """y = u s, s = rsqrt(mean(u^2) + eps), g before RoPE: d gamma += g y, du = s (gamma g - y mean(gamma g y))."""
    d = spec.head_dim
    gamma = call.gamma
    out, pooled = call.out + 4 * d * e, call.pooled + 4 * d * e
    given, g, y, work = call.given + 4 * d * e, scratch, scratch + 4 * d, scratch + 8 * d
    for c in range(0, 4 * d, BYTES):
        u = load(pooled + c)
        if spec.round_pooled:
            u = round_bf16(u)
        store(g + c, load(given + c))
        store(y + c, u)
        store(work + c, u * u)
    if spec.rotate:
        row.hadamard(g, spec)
    if spec.rope_dim:
        cos, sin = _tables(call, e, spec)
        row.turn(g, cos, sin, spec, np.float32(-1), 0)
    s = splat(np.float32(1) / np.float32(math.sqrt(row.tree_sum(work, d) / np.float32(d) + spec.eps)))
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
def work(call):
    """Take strips of rows until there are none."""
    spec, count = call.spec, call.count
    d, strip = spec.head_dim, call.strip
    scratch = call.scratch + (12 * d + ROOM) * fetch_add(call.threads, 1)
    room = _room_at(scratch + 12 * d)
    room.row, room.later_rows = scratch, 0
    back = call.given != 0
    while True:
        at = fetch_add(call.next, 1)
        if at * strip >= count:
            break
        sums = call.gamma_gradient + 4 * d * at
        for e in range(at * strip, smaller((at + 1) * strip, count)):
            if back:
                _backward(call, e, spec, scratch, sums)
            else:
                _forward(call, e, spec, room)
