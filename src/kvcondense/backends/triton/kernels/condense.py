"""The step in Triton, for rings, pages, or no state: one program per window (or block of its channels) or kept row.

Whoever pools the last block of a window finishes the row. Channels never meet before the norm and every sum has its
order, so blocks, warps and neighbours change no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.arrive import last_of
from kvcondense.backends.triton.kernels.bits import round_bf16
from kvcondense.backends.triton.kernels.dependent import in_turn
from kvcondense.backends.triton.kernels.encode import put
from kvcondense.backends.triton.kernels.pool import fresh_values, pool, row_offset, scores_of, values_of
from kvcondense.backends.triton.kernels.row import hadamard, rms_norm, rope


@triton.jit
def finish(pooled, e, index, gamma, cos, sin, rows, latent, window_slot, cache, scales,
           page_stride, scales_stride, c: tl.constexpr):  # fmt: skip
    """Norm, RoPE, Hadamard of P [d]; the row to ``rows`` and, encoded, to its slot."""
    D: tl.constexpr = c.value.head_dim
    R: tl.constexpr = c.value.ratio
    LATENT: tl.constexpr = c.value.latent
    ROPE: tl.constexpr = c.value.rope_dim
    ROTATE: tl.constexpr = c.value.rotate
    CACHE: tl.constexpr = c.value.has_cache
    channel = tl.arange(0, D)
    if CACHE:  # asked for while the row is formed
        slot = tl.load(window_slot + e)
    row = rms_norm(pooled, gamma, c)
    if LATENT:
        tl.store(latent + e.to(tl.int64) * D + channel, row)
    if ROPE > 0:
        row = rope(row, cos, sin, index * R, c)
    if ROTATE:
        row = hadamard(row, c)
    tl.store(rows + e.to(tl.int64) * D + channel, row)
    if CACHE:
        if slot >= 0:
            put(row, slot, cache, scales, page_stride, scales_stride, c)


@triton.jit
def keep(k, kv_score, ape, keep_token, keep_position, keep_row, state, kv_stride, sound,
         c: tl.constexpr):  # fmt: skip
    """Row k of those to keep: [kv | score + ape], or raw scores, of its token to its state row; skips padding (-1).

    NaN, unless kv_score is ``sound``.
    """
    R: tl.constexpr = c.value.ratio
    N: tl.constexpr = c.value.width
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    RAW: tl.constexpr = c.value.raw_scores
    # All that is asked for before anything is waited for: entries together, then rows together.
    token, position, row = tl.load(keep_token + k), tl.load(keep_position + k), tl.load(keep_row + k)
    if token >= 0:
        channel = tl.arange(0, N)
        source = kv_score + token * kv_stride + channel
        kv = fresh_values(source, None, None, c)
        if GATE:
            z = fresh_values(source + N, None, None, c)
            if APE and not RAW:
                z += tl.load(ape + (position % R) * N + channel)
        offset = row_offset(row, c) + channel
        store_as_state(values_of(state, c) + offset, tl.where(sound, kv, float("nan")), c)
        if GATE:
            store_as_state(scores_of(state, c) + offset, tl.where(sound, z, float("nan")), c)


@triton.jit
def store_as_state(target, x, c: tl.constexpr):
    """fp32 values to the state's type."""
    ROUND: tl.constexpr = c.value.state_bf16
    if ROUND:  # rounded before the cast, which therefore is exact
        tl.store(target, round_bf16(x, c).to(tl.bfloat16))
    else:
        tl.store(target, x)


@triton.jit
def window_task(
    task, kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions, state_table, state,
    window_request, window_index, window_slot, cache, scales, counters,
    kv_stride, table_stride, page_stride, scales_stride, launch, sound, c: tl.constexpr,
):  # fmt: skip
    """Pool a block of channels of window ``task // blocks``; whoever pools the last one finishes the row.

    The row is NaN unless kv_score is ``sound`` and the window's counter counts this launch alone.
    """
    BLOCKS: tl.constexpr = c.value.blocks
    BLOCK: tl.constexpr = c.value.block
    D: tl.constexpr = c.value.head_dim
    COUNTERS: tl.constexpr = c.value.counters
    e = task // BLOCKS
    q, index = tl.load(window_request + e), tl.load(window_index + e)
    if q >= 0:
        channel = (task % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        pooled = pool(kv_score, ape, q, index, channel, query_start_loc, start_positions, state_table, state,
                      kv_stride, table_stride, c)  # fmt: skip
        pooled = tl.where(sound, pooled, float("nan"))
        if BLOCKS == 1:
            finish(pooled, e, index, gamma, cos, sin, rows, latent, window_slot, cache, scales,
                   page_stride, scales_stride, c)  # fmt: skip
        else:
            tl.store(rows + e.to(tl.int64) * D + channel, pooled)
            if COUNTERS:  # else finish_kernel follows
                last = last_of(counters + e, launch, BLOCKS)
                if last != 0:
                    whole = tl.load(rows + e.to(tl.int64) * D + tl.arange(0, D), cache_modifier=".cg")
                    whole = tl.where(last > 0, whole, float("nan"))
                    finish(whole, e, index, gamma, cos, sin, rows, latent, window_slot, cache, scales,
                           page_stride, scales_stride, c)  # fmt: skip


@triton.jit(do_not_specialize=["window_programs", "table_stride", "launch"])
def condense_kernel(
    kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions, state_table, state,
    window_request, window_index, window_slot, keep_token, keep_position, keep_row, cache, scales, counters,
    window_programs, kv_stride, table_stride, page_stride, scales_stride, launch, c: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The first ``window_programs`` programs pool and finish windows, the others keep rows."""
    STATE: tl.constexpr = c.value.has_state
    in_turn(PDL)
    program = tl.program_id(0)
    sound = tl.full((), 1, tl.int1)
    if program < window_programs:
        window_task(program, kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions,
                    state_table, state, window_request, window_index, window_slot, cache, scales, counters,
                    kv_stride, table_stride, page_stride, scales_stride, launch, sound, c)  # fmt: skip
    elif STATE:
        keep(program - window_programs, kv_score, ape, keep_token, keep_position, keep_row, state,
             kv_stride, sound, c)  # fmt: skip


@triton.jit
def finish_kernel(
    gamma, cos, sin, rows, latent, window_request, window_index, window_slot, cache, scales,
    page_stride, scales_stride, c: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Finish what blocks have pooled into ``rows``, on devices whose atomics do not say who came last."""
    D: tl.constexpr = c.value.head_dim
    in_turn(PDL)
    e = tl.program_id(0)
    if tl.load(window_request + e) >= 0:
        pooled = tl.load(rows + e.to(tl.int64) * D + tl.arange(0, D))
        finish(pooled, e, tl.load(window_index + e), gamma, cos, sin, rows, latent, window_slot, cache, scales,
               page_stride, scales_stride, c)  # fmt: skip
