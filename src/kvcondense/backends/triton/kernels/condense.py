"""The step in Triton, for rings, pages, or no state: one program per window (a block of its channels, or several
windows) or kept row.

Whoever pools the last block of a window finishes the row. Channels never meet before the norm and every sum has its
order, so blocks, warps and neighbours change no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.arrive import last_of
from kvcondense.backends.triton.kernels.bits import round_bf16, row_of
from kvcondense.backends.triton.kernels.dependent import in_turn
from kvcondense.backends.triton.kernels.encode import put
from kvcondense.backends.triton.kernels.pool import fresh_values, pool, pool_together, row_offset, scores_of, values_of
from kvcondense.backends.triton.kernels.row import angles, hadamard, rms_norm, rope


@triton.jit
def needs_of(e, index, gamma, cos, sin, window_slot, c: tl.constexpr):
    """What window e needs beside P to be finished, in the order of use: gamma, cos and sin [d]; its slot."""
    D: tl.constexpr = c.value.head_dim
    R: tl.constexpr = c.value.ratio
    ROPE: tl.constexpr = c.value.rope_dim
    CACHE: tl.constexpr = c.value.has_cache
    EARLY: tl.constexpr = c.value.early
    weights = tl.load(gamma + tl.arange(0, D), volatile=EARLY)
    a = weights
    b = weights
    slot = e
    if ROPE > 0:
        a = angles(cos, index * R, c)
        b = angles(sin, index * R, c)
    if CACHE:
        slot = tl.load(window_slot + e, volatile=EARLY)
    return weights, a, b, slot


@triton.jit
def finish(pooled, e, gamma, cos, sin, slot, rows, latent, cache, scales, page_stride, scales_stride,
           c: tl.constexpr):  # fmt: skip
    """Norm, RoPE, Hadamard of P [d]; the row to ``rows`` and, encoded, to its slot. gamma .. slot: of ``needs_of``."""
    D: tl.constexpr = c.value.head_dim
    LATENT: tl.constexpr = c.value.latent
    ROPE: tl.constexpr = c.value.rope_dim
    ROTATE: tl.constexpr = c.value.rotate
    CACHE: tl.constexpr = c.value.has_cache
    channel = tl.arange(0, D)
    row = rms_norm(pooled, gamma, c)
    if LATENT:
        tl.store(latent + e.to(tl.int64) * D + channel, row)
    if ROPE > 0:
        row = rope(row, cos, sin, c)
    if ROTATE:
        row = hadamard(row, c)
    tl.store(rows + e.to(tl.int64) * D + channel, row)
    if CACHE:
        if slot >= 0:
            put(row, slot, cache, scales, page_stride, scales_stride, c)


@triton.jit
def window_at(e, live, window_request, window_index, HOLDS: tl.constexpr):
    """Window e of the plan, if it is ``live``: its request, -1 if there is none, and its index there."""
    q = tl.load(window_request + e, mask=live, other=-1, volatile=HOLDS)
    return q, tl.load(window_index + e, mask=live, other=0, volatile=HOLDS)


@triton.jit
def request_at(q, live, query_start_loc, start_positions, HOLDS: tl.constexpr):
    """Request q, if it is ``live``: its first token, and that token's position."""
    token = tl.load(query_start_loc + q, mask=live, other=0, volatile=HOLDS)
    return token, tl.load(start_positions + q, mask=live, other=0, volatile=HOLDS)


@triton.jit
def keep_at(k, live, keep_token, keep_position, keep_row, HOLDS: tl.constexpr):
    """Row k of those to keep, if it is ``live``: its token, -1 for padding, position, and place in the state."""
    token = tl.load(keep_token + k, mask=live, other=-1, volatile=HOLDS)
    position = tl.load(keep_position + k, mask=live, other=0, volatile=HOLDS)
    return token, position, tl.load(keep_row + k, mask=live, other=0, volatile=HOLDS)


@triton.jit
def keep(token, position, row, kv_score, ape, state, kv_stride, sound, c: tl.constexpr):
    """[kv | score + ape], or raw scores, of a token to its state row, as ``keep_at`` says; skips padding.

    NaN, unless kv_score is ``sound``.
    """
    R: tl.constexpr = c.value.ratio
    N: tl.constexpr = c.value.width
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    RAW: tl.constexpr = c.value.raw_scores
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
    task, q, index, token, start, kv_score, ape, gamma, cos, sin, rows, latent, state_table, state,
    window_slot, cache, scales, counters, kv_stride, table_stride, page_stride, scales_stride, launch, sound,
    c: tl.constexpr,
):  # fmt: skip
    """Pool a block of channels of window ``task // blocks``; whoever pools the last one finishes the row.

    q, index; token, start: of ``window_at``, which found a window, and ``request_at``.

    The row is NaN unless kv_score is ``sound`` and the window's counter counts this launch alone.
    """
    BLOCKS: tl.constexpr = c.value.blocks
    BLOCK: tl.constexpr = c.value.block
    D: tl.constexpr = c.value.head_dim
    COUNTERS: tl.constexpr = c.value.counters
    EARLY: tl.constexpr = c.value.early
    e = task // BLOCKS
    channel = (task % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    pooled = pool(kv_score, ape, q, index, token, start, channel, state_table, state,
                  kv_stride, table_stride, c)  # fmt: skip
    pooled = tl.where(sound, pooled, float("nan"))
    if BLOCKS == 1:
        weights, a, b, slot = needs_of(e, index, gamma, cos, sin, window_slot, c)
        finish(pooled, e, weights, a, b, slot, rows, latent, cache, scales, page_stride, scales_stride, c)
    else:
        if EARLY:
            weights, a, b, slot = needs_of(e, index, gamma, cos, sin, window_slot, c)
        tl.store(rows + e.to(tl.int64) * D + channel, pooled)
        if COUNTERS:  # else finish_kernel follows
            last = last_of(counters + e, launch, BLOCKS)
            if last != 0:
                if not EARLY:
                    weights, a, b, slot = needs_of(e, index, gamma, cos, sin, window_slot, c)
                whole = tl.load(rows + e.to(tl.int64) * D + tl.arange(0, D), cache_modifier=".cg")
                whole = tl.where(last > 0, whole, float("nan"))
                finish(whole, e, weights, a, b, slot, rows, latent, cache, scales, page_stride, scales_stride, c)


@triton.jit
def one_window(
    task, kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions, state_table, state,
    window_request, window_index, window_slot, cache, scales, counters, kv_stride, table_stride, page_stride,
    scales_stride, launch, c: tl.constexpr,
):  # fmt: skip
    """``window_task``, of whatever window the plan has there; nothing if there is none."""
    BLOCKS: tl.constexpr = c.value.blocks
    q, index = window_at(task // BLOCKS, True, window_request, window_index, False)
    if q >= 0:
        token, start = request_at(q, True, query_start_loc, start_positions, False)
        sound = tl.full((), 1, tl.int1)
        window_task(task, q, index, token, start, kv_score, ape, gamma, cos, sin, rows, latent,
                    state_table, state, window_slot, cache, scales, counters,
                    kv_stride, table_stride, page_stride, scales_stride, launch, sound, c)  # fmt: skip


@triton.jit
def first_tokens(first, windows, query_start_loc, start_positions, window_request, window_index, c: tl.constexpr):
    """Of a program's windows ``first`` .., of which the plan has ``windows``: whether all are there, and all of their
    tokens are this step's; the first token of each in kv_score [G, 1, 1].
    """
    G: tl.constexpr = c.value.windows
    R: tl.constexpr = c.value.ratio
    W: tl.constexpr = c.value.window
    token = tl.zeros([G, 1, 1], tl.int64)
    whole = tl.full((), 1, tl.int1)
    for g in tl.static_range(G):
        q, index = window_at(first + g, first + g < windows, window_request, window_index, False)
        own, start = request_at(q, q >= 0, query_start_loc, start_positions, False)
        begin = (index + 1) * R - W
        whole = whole & (q >= 0) & (begin >= start)
        token = tl.where(tl.arange(0, G)[:, None, None] == g, own - start + begin, token)
    return whole, token


@triton.jit
def together(first, token, kv_score, ape, gamma, cos, sin, rows, latent, window_index, window_slot, cache, scales,
             kv_stride, page_stride, scales_stride, c: tl.constexpr):  # fmt: skip
    """Windows from ``first`` on, whose tokens begin at ``token`` [G, 1, 1]: pooled together, finished one by one."""
    G: tl.constexpr = c.value.windows
    D: tl.constexpr = c.value.head_dim
    pooled = pool_together(kv_score, ape, token, tl.arange(0, D), kv_stride, c)
    for g in tl.static_range(G):
        e = first + g
        weights, a, b, slot = needs_of(e, tl.load(window_index + e), gamma, cos, sin, window_slot, c)
        finish(row_of(pooled, g), e, weights, a, b, slot, rows, latent, cache, scales, page_stride, scales_stride, c)


@triton.jit
def one_by_one(
    first, end, kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions, state_table, state,
    window_request, window_index, window_slot, cache, scales, counters, kv_stride, table_stride, page_stride,
    scales_stride, launch, c: tl.constexpr,
):  # fmt: skip
    """Windows ``first`` .. ``end`` - 1."""
    for e in range(first, end):
        one_window(e, kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions, state_table,
                   state, window_request, window_index, window_slot, cache, scales, counters,
                   kv_stride, table_stride, page_stride, scales_stride, launch, c)  # fmt: skip


@triton.jit(do_not_specialize=["windows", "window_programs", "table_stride", "launch"])
def condense_kernel(
    kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions, state_table, state,
    window_request, window_index, window_slot, keep_token, keep_position, keep_row, cache, scales, counters,
    windows, window_programs, kv_stride, table_stride, page_stride, scales_stride, launch, c: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """The first ``window_programs`` programs pool and finish ``windows``, the others keep rows."""
    STATE: tl.constexpr = c.value.has_state
    G: tl.constexpr = c.value.windows
    in_turn(PDL)
    program = tl.program_id(0)
    if program < window_programs:
        if G == 1:
            one_window(program, kv_score, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions,
                       state_table, state, window_request, window_index, window_slot, cache, scales, counters,
                       kv_stride, table_stride, page_stride, scales_stride, launch, c)  # fmt: skip
        else:
            first = program * G
            whole, tokens = first_tokens(first, windows, query_start_loc, start_positions, window_request, window_index,
                                        c)  # fmt: skip
            if whole:
                together(first, tokens, kv_score, ape, gamma, cos, sin, rows, latent, window_index, window_slot,
                         cache, scales, kv_stride, page_stride, scales_stride, c)  # fmt: skip
            else:
                one_by_one(first, tl.minimum(first + G, windows), kv_score, ape, gamma, cos, sin, rows, latent,
                           query_start_loc, start_positions, state_table, state, window_request, window_index,
                           window_slot, cache, scales, counters, kv_stride, table_stride, page_stride, scales_stride,
                           launch, c)  # fmt: skip
    elif STATE:
        token, position, row = keep_at(program - window_programs, True, keep_token, keep_position, keep_row, False)
        keep(token, position, row, kv_score, ape, state, kv_stride, tl.full((), 1, tl.int1), c)


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
        weights, a, b, slot = needs_of(e, tl.load(window_index + e), gamma, cos, sin, window_slot, c)
        finish(pooled, e, weights, a, b, slot, rows, latent, cache, scales, page_stride, scales_stride, c)
