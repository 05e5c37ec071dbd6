"""The projection in the step's kernels: tiles of whole windows accumulate kv and score and pool in their epilogue.

kv_score never reaches memory. A tile gathers its tokens row by row, so its windows may belong to any requests; every
product sums over the hidden channels in the same steps, so that a token gives the same bits in any tile. Rows of x are
read once for both halves of overlapping windows, or for two blocks of channels of others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.bits import exp, round_bf16
from kvcondense.backends.triton.kernels.dependent import in_turn
from kvcondense.backends.triton.kernels.pool import (
    as_stored,
    biases,
    row_offset,
    scores_of,
    state_row,
    tile,
    values_of,
)


@triton.jit
def product(a, b, total, WIDE: tl.constexpr):
    """total + a [M, K] @ b [K, N] of bf16 values, in fp32.

    WIDE: for the interpreter, whose own product is a BLAS's: on bits of bf16, and, in fp32, with an order of sums that
    depends on a row's place in the tile (OpenBLAS's AVX2 kernels). Here every row is summed alike.
    """
    if WIDE:
        total += tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    else:
        total = tl.dot(a, b, total)
    return total


@triton.jit
def project_tile(x, w, token, live, column, other, hidden, x_stride, w_stride,
                 c: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """kv, z [M, block] fp32 of tokens [M] (0 where not ``live``) for the kv channels ``column`` [block] of w.

    Then the same for the channels ``other``, unless that is None: x is read once.
    """
    N: tl.constexpr = c.value.width
    BLOCK: tl.constexpr = c.value.block
    GATE: tl.constexpr = c.value.has_gate
    TWO: tl.constexpr = other is not None
    k = tl.arange(0, K)
    source = x + tl.where(live, token, 0)[:, None] * x_stride + k[None, :]
    weight = w + column[None, :].to(tl.int64) * w_stride + k[:, None]
    kv = tl.zeros([M, BLOCK], tl.float32)
    z = tl.zeros([M, BLOCK], tl.float32)
    if TWO:
        weight_2 = w + other[None, :].to(tl.int64) * w_stride + k[:, None]
        kv_2 = tl.zeros([M, BLOCK], tl.float32)
        z_2 = tl.zeros([M, BLOCK], tl.float32)
    for i in range(0, hidden, K):
        a = tl.load(source + i, mask=live[:, None], other=0.0)
        kv = product(a, tl.load(weight + i), kv, WIDE)
        if GATE:
            z = product(a, tl.load(weight + N * w_stride + i), z, WIDE)
        if TWO:
            kv_2 = product(a, tl.load(weight_2 + i), kv_2, WIDE)
            if GATE:
                z_2 = product(a, tl.load(weight_2 + N * w_stride + i), z_2, WIDE)
    if TWO:
        return kv, z, kv_2, z_2
    else:  # noqa: RET505 - behind a return, Triton would take this for another of the same
        return kv, z


@triton.jit
def with_state(kv, z, m, q, position, start, half, channel, known, ape, state_table, state, table_stride,
               c: tl.constexpr):  # fmt: skip
    """What windows pool: projected tokens with their bias, stored ones before ``start``; -inf where there is none.

    m: of each row, any number with the phase of its position, which the compiler knows.
    """
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    STATE: tl.constexpr = c.value.has_state
    RAW: tl.constexpr = c.value.raw_scores
    valid = known & (position >= 0)
    fresh = valid & (position >= start)
    kv = as_stored(kv, c)
    if GATE:
        if APE and not RAW:
            z += biases(ape, m, half, channel, fresh, c)
        z = as_stored(z, c)
    elif APE:
        z = biases(ape, m, half, channel, valid, c)
    if STATE:
        stored = valid & (position < start)
        if tl.max(stored.to(tl.int32), axis=0) > 0:  # of few tiles
            row = state_row(position, stored, q, state_table, table_stride, c) + half
            kv = tl.where(stored[:, None], tile(values_of(state, c), row, channel, stored), kv)
            if GATE:
                z = tl.where(stored[:, None], tile(scores_of(state, c), row, channel, stored), z)
    if RAW and (GATE and APE):
        z += biases(ape, m, half, channel, valid, c)
    return kv, tl.where(valid[:, None], z, float("-inf"))


@triton.jit
def tokens_sum(t, G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """t [G, R, block] -> [G, block] by halving, as ``rows_sum`` does it for one window."""
    for i in tl.static_range(LEVELS):
        t = tl.sum(tl.reshape(t, (G, 2, R >> (i + 1), BLOCK)), axis=1)
    return tl.reshape(t, (G, BLOCK))


@triton.jit
def pooled_alone(kv, z, G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """P [G, block] of windows of R tokens."""
    z = tl.reshape(z, (G, R, BLOCK))
    e = exp(z - tl.max(z, axis=1)[:, None, :])
    total = tokens_sum(e, G, R, BLOCK, LEVELS)
    return tl.div_rn(tokens_sum(e * tl.reshape(kv, (G, R, BLOCK)), G, R, BLOCK, LEVELS), total)


@triton.jit
def pooled_with(kv, z, kv_before, z_before,
                G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """P [G, block] of windows of R tokens and the R tokens before them."""
    z = tl.reshape(z, (G, R, BLOCK))
    z_before = tl.reshape(z_before, (G, R, BLOCK))
    top = tl.maximum(tl.max(z, axis=1), tl.max(z_before, axis=1))
    e_before = exp(z_before - top[:, None, :])
    e = exp(z - top[:, None, :])
    total = tokens_sum(e_before + e, G, R, BLOCK, LEVELS)
    kv = e_before * tl.reshape(kv_before, (G, R, BLOCK)) + e * tl.reshape(kv, (G, R, BLOCK))
    return tl.div_rn(tokens_sum(kv, G, R, BLOCK, LEVELS), total)


@triton.jit
def moved(t, m, live, R: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    """t [M, block] of the token R rows before, where ``live``, else 0."""
    row = tl.broadcast_to(tl.maximum(m - R, 0)[:, None], (M, BLOCK))
    return tl.where(live[:, None], tl.gather(t, row, axis=0), 0.0)


@triton.jit(do_not_specialize=["windows", "table_stride"])
def project_pool_kernel(
    x, w, ape, query_start_loc, start_positions, state_table, state, window_request, window_index, rows,
    windows, hidden, x_stride, w_stride, table_stride,
    c: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Pooled rows of windows for ``PARTS`` blocks of channels to ``rows``; ``finish_kernel`` follows.

    A tile is the tokens of G windows. With overlap the first is there for its tokens alone, which the next one reads:
    no window has to look into another tile. Where the window before is not of this step, the state has its tokens.
    """
    R: tl.constexpr = c.value.ratio
    W: tl.constexpr = c.value.window
    N: tl.constexpr = c.value.width
    D: tl.constexpr = c.value.head_dim
    BLOCK: tl.constexpr = c.value.block
    ALL: tl.constexpr = c.value.blocks
    BLOCKS: tl.constexpr = ALL // PARTS
    LEVELS: tl.constexpr = c.value.ratio_levels
    M: tl.constexpr = G * R
    LEAD: tl.constexpr = 1 if W > R else 0
    in_turn(PDL)
    program = tl.program_id(0)
    channel = (program % BLOCKS) * (PARTS * BLOCK) + tl.arange(0, BLOCK)
    first = (program // BLOCKS) * (G - LEAD) - LEAD
    m = tl.arange(0, M)
    e = first + m // R
    here = (e >= 0) & (e < windows)
    entry = tl.where(here, e, 0)
    request = tl.load(window_request + entry)
    known = here & (request >= 0)
    q = tl.where(known, request, 0)
    start = tl.load(start_positions + q).to(tl.int32)  # positions are below 2^31
    first_token = tl.load(query_start_loc + q) - start
    position = tl.load(window_index + entry).to(tl.int32) * R + m % R
    token, fresh = first_token + position, known & (position >= start)
    g = tl.arange(0, G)
    row = first + g
    there = (row >= 0) & (row < windows)
    there = there & (tl.load(window_request + tl.where(there, row, 0)) >= 0)
    if W > R:
        there = there & (g > 0)
    target = rows + row[:, None].to(tl.int64) * D + channel[None, :]
    own = N - D  # the last d channels of tokens in the window, the first of those before it
    if W > R:
        kv, z, kv_before, z_before = project_tile(x, w, token, fresh, own + channel, channel, hidden,
                                                  x_stride, w_stride, c, M, K, WIDE)  # fmt: skip
        before = position - R
        known_before = known & (m >= R)
        fresh = known_before & (before >= start)
        kv_before = moved(kv_before, m, fresh, R, M, BLOCK)
        z_before = moved(z_before, m, fresh, R, M, BLOCK)
        kv, z = with_state(kv, z, m, q, position, start, own, channel, known, ape, state_table, state,
                           table_stride, c)  # fmt: skip
        kv_before, z_before = with_state(kv_before, z_before, m, q, before, start, 0, channel, known_before, ape,
                                         state_table, state, table_stride, c)  # fmt: skip
        pooled = pooled_with(kv, z, kv_before, z_before, G, R, BLOCK, LEVELS)
    elif PARTS == 2:
        kv, z, kv_2, z_2 = project_tile(x, w, token, fresh, channel, channel + BLOCK, hidden,
                                        x_stride, w_stride, c, M, K, WIDE)  # fmt: skip
        kv, z = with_state(kv, z, m, q, position, start, 0, channel, known, ape, state_table, state, table_stride, c)
        tl.store(target, pooled_alone(kv, z, G, R, BLOCK, LEVELS), mask=there[:, None])
        kv, z = with_state(kv_2, z_2, m, q, position, start, 0, channel + BLOCK, known, ape, state_table, state,
                           table_stride, c)  # fmt: skip
        target += BLOCK
        pooled = pooled_alone(kv, z, G, R, BLOCK, LEVELS)
    else:
        kv, z = project_tile(x, w, token, fresh, channel, None, hidden, x_stride, w_stride, c, M, K, WIDE)
        kv, z = with_state(kv, z, m, q, position, start, 0, channel, known, ape, state_table, state, table_stride, c)
        pooled = pooled_alone(kv, z, G, R, BLOCK, LEVELS)
    tl.store(target, pooled, mask=there[:, None])


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x, w, kv_score, tokens, hidden, x_stride, w_stride, out_stride,
    c: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """kv_score of M tokens for a block of channels, with the bits that the fused kernels pool and keep."""
    N: tl.constexpr = c.value.width
    BLOCK: tl.constexpr = c.value.block
    GATE: tl.constexpr = c.value.has_gate
    BLOCKS: tl.constexpr = N // BLOCK
    in_turn(PDL)
    program = tl.program_id(0)
    channel = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    token = (program // BLOCKS) * M + tl.arange(0, M)
    live = token < tokens
    kv, z = project_tile(x, w, token, live, channel, None, hidden, x_stride, w_stride, c, M, K, WIDE)
    target = kv_score + token[:, None].to(tl.int64) * out_stride + channel[None, :]
    tl.store(target, kv, mask=live[:, None])
    if GATE:
        tl.store(target + N, z, mask=live[:, None])


@triton.jit(do_not_specialize=["keeps"])
def project_keep_kernel(
    x, w, ape, keep_token, keep_position, keep_row, state, keeps, hidden, x_stride, w_stride,
    c: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """[kv | score + ape], or raw scores, of M kept tokens for a block of the state's channels; skips padding (-1)."""
    N: tl.constexpr = c.value.width
    BLOCK: tl.constexpr = c.value.block
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    RAW: tl.constexpr = c.value.raw_scores
    ROUND: tl.constexpr = c.value.state_bf16
    BLOCKS: tl.constexpr = N // BLOCK
    in_turn(PDL)
    program = tl.program_id(0)
    channel = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    k = (program // BLOCKS) * M + tl.arange(0, M)
    here = k < keeps
    entry = tl.where(here, k, 0)
    token = tl.load(keep_token + entry)
    kept = here & (token >= 0)
    kv, z = project_tile(x, w, token, kept, channel, None, hidden, x_stride, w_stride, c, M, K, WIDE)
    if GATE and (APE and not RAW):
        z += biases(ape, tl.load(keep_position + entry), 0, channel, kept, c)
    row = tl.where(kept, tl.load(keep_row + entry), 0)
    offset = row_offset(row, c)[:, None] + channel[None, :]
    target = values_of(state, c)
    if ROUND:  # rounded before the cast, which therefore is exact
        kv = round_bf16(kv, c)
        z = round_bf16(z, c)
    tl.store(target + offset, kv.to(target.dtype.element_ty), mask=kept[:, None])
    if GATE:
        tl.store(scores_of(state, c) + offset, z.to(target.dtype.element_ty), mask=kept[:, None])
