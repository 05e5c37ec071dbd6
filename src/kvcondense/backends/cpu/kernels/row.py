"""Stages 4 to 6 in Numba: RMS norm, RoPE and Hadamard of one row in place, with the reference's order of operations."""

from __future__ import annotations

import math

import numpy as np

from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.ahead import ask, wanted
from kvcondense.backends.cpu.kernels.bf16 import round_bf16
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.simd import BYTES, LANES, load, splat, store


@inlined
def _round_scalar(x):
    """``round_bf16`` of one number."""
    return simd.first_lane(round_bf16(splat(x)))


@inlined
def _halved(x, away):
    return load(x) + load(x + away)


@kernel
def tree_sum(x, n):
    """Sum of n fp32 by repeated halving, as ``numerics.tree_sum`` orders it. Overwrites them."""
    while n % (8 * LANES) == 0:  # three halvings at once
        n //= 8
        for i in range(x, x + 4 * n, BYTES):
            even = _halved(i, 16 * n) + _halved(i + 8 * n, 16 * n)
            store(i, even + (_halved(i + 4 * n, 16 * n) + _halved(i + 12 * n, 16 * n)))
    while n % (2 * LANES) == 0:
        n //= 2
        for i in range(x, x + 4 * n, BYTES):
            store(i, _halved(i, 4 * n))
    if n == LANES:
        return simd.halving_sum(load(x))
    while n > 1:
        half = n // 2
        for i in range(0, 4 * half, 4):
            simd.store_scalar(x + i, simd.load_scalar(x + i) + simd.load_scalar(x + 4 * half + i))
        if n % 2:
            simd.store_scalar(x + 4 * half, simd.load_scalar(x + 8 * half))
        n -= half
    return simd.load_scalar(x)


@kernel
def rms_norm(row, gamma, spec, room):
    """n = gamma * (u * rsqrt(mean(u^2) + eps)); u and n are rounded as the profile has it.

    Each loop asks for two of the rows that the room lists.
    """
    d, work = spec.head_dim, room.row
    asking = wanted(room, 0)
    for i in range(0, 4 * d, BYTES):
        if asking:
            ask(room, 0, i)
        u = load(row + i)
        if spec.round_pooled:
            u = round_bf16(u)
            store(row + i, u)
        store(work + i, u * u)
    mean = tree_sum(work, d) / np.float32(d)
    scale = splat(np.float32(1) / np.float32(math.sqrt(mean + spec.eps)))
    asking = wanted(room, 2)
    for i in range(0, 4 * d, BYTES):
        if asking:
            ask(room, 2, i)
        n = load(gamma + i) * (load(row + i) * scale)
        store(row + i, round_bf16(n) if spec.round_latent else n)


@kernel
def rope(row, cos, sin, spec):
    """(a, b) -> (a cos - b sin, a sin + b cos) on pairs of the last channels; rounded if the profile says so."""
    turn(row, cos, sin, spec, np.float32(1), spec.round_rotated)


@kernel
def turn(row, cos, sin, spec, way, rounding):
    """The rotation, or with ``way`` -1 its inverse."""
    size = spec.rope_dim
    first = row + 4 * (spec.head_dim - size)
    sign = simd.odd_signs() * splat(way)  # a cos + (-(b sin)) has the same bits as a cos - b sin
    whole = size // LANES * BYTES
    for i in range(0, whole, BYTES):
        x = load(first + i)
        out = x * simd.load_pairs(cos + i // 2) + sign * (simd.swap_neighbours(x) * simd.load_pairs(sin + i // 2))
        store(first + i, round_bf16(out) if rounding else out)
    for i in range(whole, 4 * size, 8):
        a, b = simd.load_scalar(first + i), simd.load_scalar(first + i + 4)
        c, s = simd.load_scalar(cos + i // 2), simd.load_scalar(sin + i // 2) * way
        even, odd_one = a * c - b * s, a * s + b * c
        simd.store_scalar(first + i, _round_scalar(even) if rounding else even)
        simd.store_scalar(first + i + 4, _round_scalar(odd_one) if rounding else odd_one)


@kernel
def hadamard(row, spec):
    """y = (H row) d^-0.5 by butterflies, neighbours first."""
    d = spec.head_dim
    for i in range(0, 4 * d, BYTES):
        store(row + i, simd.butterflies(load(row + i)))
    step = LANES
    while step < d:
        for block in range(0, d, 2 * step):
            for i in range(4 * block, 4 * (block + step), BYTES):
                a, b = load(row + i), load(row + i + 4 * step)
                store(row + i, a + b)
                store(row + i + 4 * step, a - b)
        step *= 2
    scale = splat(spec.hadamard_scale)
    for i in range(0, 4 * d, BYTES):
        store(row + i, load(row + i) * scale)
