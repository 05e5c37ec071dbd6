"""The step in Triton for an online state: windows and open windows are folded token by token, oldest to newest.

A request's first window and its open window belong to one program (per block of channels), which reads what the state
held before it writes: no other program looks at those channels of the request.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.arrive import last_of
from kvcondense.backends.triton.kernels.bits import exp
from kvcondense.backends.triton.kernels.condense import finish, needs_of
from kvcondense.backends.triton.kernels.dependent import in_turn
from kvcondense.backends.triton.kernels.pool import state_row


@triton.jit
def row_of(position, start, first_token, q, kv_score, ape, state_table, log, channel, kv_stride,
           c: tl.constexpr):  # fmt: skip
    """(K, z) of one position for ``channel``: from this step, or from the log of drafts."""
    R: tl.constexpr = c.value.ratio
    N: tl.constexpr = c.value.width
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    LOG: tl.constexpr = c.value.state_rows
    fresh = position >= start
    mask = channel < tl.where(fresh, N, 0)
    source = kv_score + tl.where(fresh, first_token + position, 0) * kv_stride + channel
    bias = tl.zeros_like(channel).to(tl.float32)
    if APE:
        bias = tl.load(ape + (position % R) * N + channel)
    kv = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    z = bias
    if GATE:
        z = tl.load(source + N, mask=mask, other=0.0).to(tl.float32) + bias
    if LOG > 0:
        logged = channel < tl.where(fresh, 0, N)
        old = log + state_row(position, position < start, q, state_table, 0, c) + channel
        kv = tl.where(fresh, kv, tl.load(old, mask=logged, other=0.0))
        if GATE:
            z = tl.where(fresh, z, tl.load(old + N, mask=logged, other=0.0))
    return kv, z


@triton.jit
def fold(begin, stop, start, first_token, folded, q, slot, kv_score, ape, state_table, acc, log, channel,
         kv_stride, c: tl.constexpr):  # fmt: skip
    """(m, l, o) of positions begin .. stop - 1: stored values, then the log, then this step.

    m' = max(m, z), l' = l e^(m - m') + e^(z - m'), o' = o e^(m - m') + K e^(z - m'). One of the two exponents is 0, so
    one exponential does for both. A score of -inf has weight 0 and is skipped.
    """
    D: tl.constexpr = c.value.head_dim
    UNROLL: tl.constexpr = c.value.unroll
    stored = (begin < start) & (folded > begin)
    mask = channel < tl.where(stored, D, 0)
    old = acc + slot * (3 * D) + channel
    m = tl.load(old, mask=mask, other=float("-inf"))
    l = tl.load(old + D, mask=mask, other=0.0)
    o = tl.load(old + 2 * D, mask=mask, other=0.0)
    cursor = tl.where(stored, folded, begin)
    for at in range(cursor, stop, UNROLL):
        for i in tl.static_range(UNROLL):
            here = at + i < stop
            position = tl.where(here, at + i, stop - 1)  # read twice rather than beyond the end
            kv, z = row_of(position, start, first_token, q, kv_score, ape, state_table, log, channel,
                           kv_stride, c)  # fmt: skip
            z = tl.where(here, z, float("-inf"))
            e = exp(-tl.abs(z - m))
            old_weight = tl.where(m < z, e, 1.0)
            new_weight = tl.where(m < z, 1.0, e) + (z - z)  # +inf has no weight: NaN
            l = tl.where(z == float("-inf"), l, l * old_weight + new_weight)
            o = tl.where(z == float("-inf"), o, o * old_weight + kv * new_weight)
            m = tl.where(m < z, z, m)
    return m, l, o


@triton.jit
def open_window(q, slot, start, end, first_token, folded, draft_rows, kv_score, ape, state_table, acc, log, channel,
                kv_stride, c: tl.constexpr):  # fmt: skip
    """Fold what request q commits beyond its last window, store it, and log the drafts: ``channel`` of each."""
    R: tl.constexpr = c.value.ratio
    D: tl.constexpr = c.value.head_dim
    N: tl.constexpr = c.value.width
    GATE: tl.constexpr = c.value.has_gate
    LOG: tl.constexpr = c.value.state_rows
    THREADS: tl.constexpr = c.value.counters
    committed = end - tl.load(draft_rows + q)
    m, l, o = fold(committed // R * R, committed, start, first_token, folded, q, slot, kv_score, ape, state_table,
                   acc, log, channel, kv_stride, c)  # fmt: skip
    if THREADS:
        tl.debug_barrier()  # all threads have read before one writes
    target = acc + slot * (3 * D) + channel
    tl.store(target, m)
    tl.store(target + D, l)
    tl.store(target + 2 * D, o)
    if LOG > 0:
        for position in range(committed, end):
            kv, z = row_of(position, start, first_token, q, kv_score, ape, state_table, log, channel,
                           kv_stride, c)  # fmt: skip
            row = log + state_row(position, position >= 0, q, state_table, 0, c) + channel
            tl.store(row, kv)
            if GATE:
                tl.store(row + N, z)
    return committed


@triton.jit(do_not_specialize=["window_programs", "launch"])
def online_kernel(
    kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions, draft_rows, state_table,
    acc, folded, log, window_request, window_index, window_slot, cache, scales, counters,
    window_programs, kv_stride, page_stride, scales_stride, launch, c: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The first ``window_programs`` programs fold and finish windows, the others the requests that complete none."""
    BLOCKS: tl.constexpr = c.value.blocks
    BLOCK: tl.constexpr = c.value.block
    D: tl.constexpr = c.value.head_dim
    R: tl.constexpr = c.value.ratio
    in_turn(PDL)
    program = tl.program_id(0)
    if program < window_programs:
        e = program // BLOCKS
        q = tl.load(window_request + e)
        if q >= 0:
            index = tl.load(window_index + e)
            channel = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
            start = tl.load(start_positions + q)
            first = tl.load(query_start_loc + q)
            end = start + tl.load(query_start_loc + q + 1) - first
            slot = tl.load(state_table + q)
            before = tl.load(folded + slot)
            m, l, o = fold(index * R, (index + 1) * R, start, first - start, before, q, slot, kv_score, ape,
                           state_table, acc, log, channel, kv_stride, c)  # fmt: skip
            pooled = tl.div_rn(o, l)
            owner = index == start // R
            committed = end
            if owner:
                committed = open_window(q, slot, start, end, first - start, before, draft_rows, kv_score, ape,
                                        state_table, acc, log, channel, kv_stride, c)  # fmt: skip
            last = tl.full((), 1, tl.int64)
            if BLOCKS > 1:
                tl.store(rows + e.to(tl.int64) * D + channel, pooled)
                last = last_of(counters + e, launch, BLOCKS)
            if last != 0:
                if owner:
                    tl.store(folded + slot, committed)
                whole = pooled
                if BLOCKS > 1:
                    whole = tl.load(rows + e.to(tl.int64) * D + tl.arange(0, D), cache_modifier=".cg")
                    whole = tl.where(last > 0, whole, float("nan"))
                weights, a, b, place = needs_of(e, index, gamma, cos, sin, window_slot, c)
                finish(whole, e, weights, a, b, place, rows, latent, cache, scales, page_stride, scales_stride, c)
    else:
        q = (program - window_programs).to(tl.int64)
        start = tl.load(start_positions + q)
        first = tl.load(query_start_loc + q)
        end = start + tl.load(query_start_loc + q + 1) - first
        if (start >= 0) & (end > start) & (start // R == end // R):
            slot = tl.load(state_table + q)
            committed = open_window(q, slot, start, end, first - start, tl.load(folded + slot), draft_rows, kv_score,
                                    ape, state_table, acc, log, tl.arange(0, D), kv_stride, c)  # fmt: skip
            tl.store(folded + slot, committed)
