"""Stages 4 to 6 in Triton: RMS norm, RoPE and Hadamard of one row, with the reference's order of operations."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.bits import partner, round_bf16, tree_sum


@triton.jit
def rms_norm(row, gamma, c: tl.constexpr):
    """n = gamma * (u * rsqrt(mean(u^2) + eps)), row and gamma [d]; u and n are rounded as the profile has it."""
    D: tl.constexpr = c.value.head_dim
    LEVELS: tl.constexpr = c.value.channel_levels
    EPS: tl.constexpr = c.value.eps
    POOLED: tl.constexpr = c.value.round_pooled
    LATENT: tl.constexpr = c.value.round_latent
    if POOLED:
        row = round_bf16(row, c)
    mean = tree_sum(row * row, D, LEVELS) * (1.0 / D)  # d is a power of two: exact
    n = gamma * (row * tl.div_rn(tl.full([1], 1.0, tl.float32), tl.sqrt_rn(mean + EPS)))
    if LATENT:
        n = round_bf16(n, c)
    return n


@triton.jit
def angles(table, position, c: tl.constexpr):
    """cos or sin [d] of each channel's pair; of any pair where none is rotated."""
    D: tl.constexpr = c.value.head_dim
    SIZE: tl.constexpr = c.value.rope_dim
    EARLY: tl.constexpr = c.value.early
    channel = tl.arange(0, D)
    pair = tl.where(channel >= D - SIZE, (channel - (D - SIZE)) // 2, 0)
    return tl.load(table + position * (SIZE // 2) + pair, volatile=EARLY)


@triton.jit
def rope(row, cos, sin, c: tl.constexpr):
    """(a, b) -> (a cos - b sin, a sin + b cos) on pairs of the last channels; rounded if the profile says so."""
    D: tl.constexpr = c.value.head_dim
    SIZE: tl.constexpr = c.value.rope_dim
    ROUND: tl.constexpr = c.value.round_rotated
    channel = tl.arange(0, D)
    other = partner(row, D, 1) * sin
    # a cos + (-(b sin)) has the same bits as a cos - b sin.
    out = row * cos + tl.where(channel % 2 == 0, -other, other)
    if ROUND:
        out = round_bf16(out, c)
    return tl.where(channel >= D - SIZE, out, row)


@triton.jit
def hadamard(row, c: tl.constexpr):
    """y = (H row) d^-0.5 by butterflies, neighbours first."""
    D: tl.constexpr = c.value.head_dim
    LEVELS: tl.constexpr = c.value.channel_levels
    SCALE: tl.constexpr = c.value.hadamard_scale
    channel = tl.arange(0, D)
    for i in tl.static_range(LEVELS):
        other = partner(row, D, 1 << i)
        row = tl.where((channel >> i) % 2 == 0, row + other, other - row)
    return row * SCALE
