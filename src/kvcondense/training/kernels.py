"""Pooling and its backward pass in Triton, for documents from position 0; sums over a window are halving trees."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.bits import rows_sum


@triton.jit
def candidates(kv_score, ape, e, first_token, window_index, channel, kv_stride,
               R: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
               BLOCK: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """kv and z [PADDED, block] of window e, and where each candidate is: offset [PADDED], whether it is one."""
    j = tl.arange(0, PADDED)
    own = j >= W - R
    live = (j < W) & (j >= tl.where(tl.load(window_index + e) > 0, 0, W - R))
    token = tl.load(first_token + e) + j - (W - R)
    half = tl.where(own, N - D, 0)
    offset = tl.where(live, token, 0).to(tl.int64) * kv_stride + half
    source = kv_score + offset[:, None] + channel[None, :]
    kv = tl.load(source, mask=live[:, None], other=0.0).to(tl.float32)
    z = tl.zeros([PADDED, BLOCK], tl.float32)
    if GATE:
        z = tl.load(source + N, mask=live[:, None], other=0.0).to(tl.float32)
    if ape is not None:
        bias = ape + ((j % R) * N + half)[:, None] + channel[None, :]
        z += tl.load(bias, mask=live[:, None], other=0.0)
    return kv, tl.where(live[:, None], z, float("-inf")), token, half, live


@triton.jit
def pool_kernel(
    kv_score, ape, first_token, window_index, pooled, lse, kv_stride,
    R: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr, LEVELS: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """P and log sum e^z of one window for a block of channels."""
    e = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kv, z, _, _, _ = candidates(kv_score, ape, e, first_token, window_index, channel, kv_stride,
                                R, W, PADDED, N, D, BLOCK, GATE)  # fmt: skip
    top = tl.max(z, axis=0)
    weight = tl.exp(z - top[None, :])
    total = rows_sum(weight, PADDED, BLOCK, LEVELS)
    at = e.to(tl.int64) * D + channel
    tl.store(pooled + at, rows_sum(weight * kv, PADDED, BLOCK, LEVELS) / total)
    tl.store(lse + at, top + tl.log(total))


@triton.jit
def unpool_kernel(
    kv_score, ape, first_token, window_index, pooled, lse, given, d_kv_score, d_ape, windows, kv_stride, d_stride,
    R: tl.constexpr, W: tl.constexpr, PADDED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, GATE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """dK_j = w_j g and dz_j = w_j g (K_j - P) of STRIP windows for a block of channels; the sum of their dz."""
    strip = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, PADDED)
    added = tl.zeros([PADDED, BLOCK], tl.float32)
    for e in range(strip * STRIP, tl.minimum((strip + 1) * STRIP, windows)):
        kv, z, token, half, live = candidates(kv_score, ape, e, first_token, window_index, channel, kv_stride,
                                              R, W, PADDED, N, D, BLOCK, GATE)  # fmt: skip
        at = e * D + channel
        weight = tl.exp(z - tl.load(lse + at)[None, :]) * tl.load(given + at)[None, :]
        dz = tl.where(live[:, None], weight * (kv - tl.load(pooled + at)[None, :]), 0.0)
        added += dz
        target = d_kv_score + (tl.where(live, token, 0).to(tl.int64) * d_stride + half)[:, None] + channel[None, :]
        tl.store(target, weight.to(d_kv_score.dtype.element_ty), mask=live[:, None])
        if GATE:
            tl.store(target + N, dz.to(d_kv_score.dtype.element_ty), mask=live[:, None])
    place = d_ape + (strip * W + tl.where(j < W, j, 0))[:, None] * D + channel[None, :]
    tl.store(place, added, mask=(j < W)[:, None])
