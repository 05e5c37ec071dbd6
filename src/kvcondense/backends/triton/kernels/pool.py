"""Stages 2 and 3 in Triton: a window's tokens, from this step or from the state, and the softmax over them."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.bits import exp, round_bf16, rows_sum


@triton.jit
def state_row(position, live, q, state_table, table_stride, c: tl.constexpr):
    """Where the row of each position of request q lies in the state (or draft log), in elements; 0 if not ``live``."""
    PAGED: tl.constexpr = c.value.paged
    TOKENS: tl.constexpr = c.value.page_tokens
    ROWS: tl.constexpr = c.value.state_rows
    STRIDE: tl.constexpr = c.value.state_stride
    PAGE_STRIDE: tl.constexpr = c.value.state_page_stride
    MULTIPLE: tl.constexpr = c.value.state_multiple
    p = tl.where(live, position, 0).to(tl.int32)
    if PAGED:
        page = tl.load(state_table + q * table_stride + p // TOKENS, mask=live, other=0)
    else:
        page = tl.load(state_table + q)
    row = tl.where(live, page.to(tl.int64) * PAGE_STRIDE + p % ROWS * STRIDE, 0)
    # tl.where hides from the compiler what rows are multiples of, and with it loads of 16 bytes.
    return tl.multiple_of(row, [MULTIPLE])


@triton.jit
def row_offset(row, c: tl.constexpr):
    """Where rows of the state lie, by number."""
    ROWS: tl.constexpr = c.value.state_rows
    STRIDE: tl.constexpr = c.value.state_stride
    PAGE_STRIDE: tl.constexpr = c.value.state_page_stride
    return row // ROWS * PAGE_STRIDE + row % ROWS * STRIDE


@triton.jit
def values_of(state, c: tl.constexpr):
    """Where kv of the state's rows begins."""
    APART: tl.constexpr = c.value.state_apart
    if APART:
        pointer = state[0]
    else:
        pointer = state
    return pointer


@triton.jit
def scores_of(state, c: tl.constexpr):
    """Where their scores begin."""
    APART: tl.constexpr = c.value.state_apart
    N: tl.constexpr = c.value.width
    if APART:
        pointer = state[1]
    else:
        pointer = state + N
    return pointer


@triton.jit
def as_stored(x, c: tl.constexpr):
    """Values as they would come back from the state."""
    ROUND: tl.constexpr = c.value.state_bf16
    if ROUND:
        x = round_bf16(x, c)
    return x


@triton.jit
def tile(pointer, offset, channel, live):
    """fp32 [n, channels] at offset [n] of live rows, 0 elsewhere."""
    return tl.load(pointer + offset[:, None] + channel[None, :], mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def biases(ape, position, half, channel, live, c: tl.constexpr):
    """ape [n, channels] of each position."""
    R: tl.constexpr = c.value.ratio
    N: tl.constexpr = c.value.width
    phase = (position % R).to(tl.int32)
    return tile(ape, phase * N + half, channel, live)


@triton.jit
def fresh_values(source, live, other, c: tl.constexpr):
    """kv_score at ``source`` where ``live``, else ``other``, as fp32."""
    SPLITS: tl.constexpr = c.value.splits
    if SPLITS > 0:  # other programs of this launch wrote it: not from a cache of one's own
        x = tl.load(source, mask=live, other=other, cache_modifier=".cg")
    else:
        x = tl.load(source, mask=live, other=other)
    return x.to(tl.float32)


@triton.jit
def either(one, other, first, channel, live, nothing, c: tl.constexpr):
    """fp32 [n, channels] at the pointers ``one`` [n] where ``first``, else at ``other``; ``nothing`` where not live.

    Past the first cache, since other programs of this launch may have stored it.
    """
    ALIGNED: tl.constexpr = c.value.aligned
    # Chosen as numbers: compilers for AMD (Triton 3.6) end on pointers that are chosen.
    rows = tl.where(first, one.to(tl.int64), other.to(tl.int64)).to(one.dtype)
    if ALIGNED:  # which tl.where hides from the compiler, and with it loads of 16 bytes
        rows = tl.multiple_of(rows, [16])
    return tl.load(rows[:, None] + channel[None, :], mask=live[:, None], other=nothing, cache_modifier=".cg")


@triton.jit
def whole_window(kv_score, ape, first, channel, kv_stride, c: tl.constexpr):
    """kv and z [window, block] of a window all of whose tokens are this step's, from token ``first`` on: no masks.

    [G, window, block] of several, whose first tokens are [G, 1, 1].
    """
    R: tl.constexpr = c.value.ratio
    W: tl.constexpr = c.value.window
    N: tl.constexpr = c.value.width
    D: tl.constexpr = c.value.head_dim
    BLOCK: tl.constexpr = c.value.block
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    RAW: tl.constexpr = c.value.raw_scores
    j = tl.arange(0, W)
    half = (j >= W - R).to(tl.int32) * (N - D)
    source = kv_score + first * kv_stride + ((j * kv_stride + half)[:, None] + channel[None, :])
    kv = as_stored(tl.load(source).to(tl.float32), c)
    z = tl.zeros([W, BLOCK], tl.float32)
    if APE:
        z = tl.load(ape + ((j % R * N + half)[:, None] + channel[None, :]))
    if GATE:
        score = tl.load(source + N).to(tl.float32)
        z = as_stored(score, c) + z if RAW else as_stored(score + z, c)
    return kv, z


@triton.jit
def candidates(kv_score, ape, q, begin, start, first_token, channel, state_table, state,
               kv_stride, table_stride, c: tl.constexpr):  # fmt: skip
    """kv and z [padded, block] of positions begin .., from this step or, before ``start``, from the state."""
    R: tl.constexpr = c.value.ratio
    W: tl.constexpr = c.value.window
    PADDED: tl.constexpr = c.value.window_padded
    N: tl.constexpr = c.value.width
    D: tl.constexpr = c.value.head_dim
    BLOCK: tl.constexpr = c.value.block
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    STATE: tl.constexpr = c.value.has_state
    RAW: tl.constexpr = c.value.raw_scores
    ALIKE: tl.constexpr = c.value.alike
    j = tl.arange(0, PADDED)
    position = begin + j
    valid = (position >= 0) & (j < W)
    fresh = valid & (position >= start)
    # Channels [0, d) are read of tokens before the window, the last d of those in it.
    half = (j >= W - R).to(tl.int64) * (N - D)
    offset = tl.where(fresh, first_token + position, 0) * kv_stride + half
    if ALIKE and GATE:  # one load from either place takes half the time and the registers of two
        stored = valid & (position < start)
        row = state_row(position, stored, q, state_table, table_stride, c) + half
        kv = either(values_of(state, c) + row, kv_score + offset, stored, channel, valid, 0.0, c)
        z = either(scores_of(state, c) + row, kv_score + N + offset, stored, channel, valid, float("-inf"), c)
        if APE:
            z += biases(ape, j, half, channel, valid if RAW else fresh, c)
        return kv, z
    source = kv_score + offset[:, None] + channel[None, :]
    kv = as_stored(fresh_values(source, fresh[:, None], 0.0, c), c)  # [PADDED, block]
    z = tl.zeros([PADDED, BLOCK], tl.float32)
    # A window begins at a multiple of the ratio: j has the phase of its position, and is known to the compiler.
    if GATE:
        z = fresh_values(source + N, fresh[:, None], 0.0, c)
        if APE and not RAW:
            z += biases(ape, j, half, channel, fresh, c)
        z = as_stored(z, c)
    elif APE:
        z = biases(ape, j, half, channel, valid, c)
    if STATE:
        if (begin < start) & (start > 0):
            stored = valid & (position < start)
            row = state_row(position, stored, q, state_table, table_stride, c) + half
            kv = tl.where(stored[:, None], tile(values_of(state, c), row, channel, stored), kv)
            if GATE:
                z = tl.where(stored[:, None], tile(scores_of(state, c), row, channel, stored), z)
    if RAW and (GATE and APE):
        z += biases(ape, j, half, channel, valid, c)
    return kv, tl.where(valid[:, None], z, float("-inf"))


@triton.jit
def softmax(kv, z, c: tl.constexpr, G: tl.constexpr):
    """P [block] of kv and z [padded, block]: sum e^(z - m) K / sum e^(z - m), by halving trees. [G, block] of G."""
    PADDED: tl.constexpr = c.value.window_padded
    LEVELS: tl.constexpr = c.value.window_levels
    BLOCK: tl.constexpr = c.value.block
    kv, z = tl.reshape(kv, (G, PADDED, BLOCK)), tl.reshape(z, (G, PADDED, BLOCK))
    # The maximum does not depend on an order.
    e = exp(z - tl.max(z, axis=1)[:, None, :])
    total = rows_sum(e, PADDED, BLOCK, LEVELS, G)
    return tl.div_rn(rows_sum(e * kv, PADDED, BLOCK, LEVELS, G), total)


@triton.jit
def pool(kv_score, ape, q, index, token, start, channel, state_table, state, kv_stride, table_stride,
         c: tl.constexpr):  # fmt: skip
    """P of window ``index`` of request q for ``channel`` [block].

    token, start: the request's first token in kv_score, and that token's position.
    """
    R: tl.constexpr = c.value.ratio
    W: tl.constexpr = c.value.window
    WHOLE: tl.constexpr = c.value.whole
    STORED: tl.constexpr = c.value.stored
    if STORED:
        start = start * 0 + (index + 1) * R  # none of the tokens is this step's
    first_token = token - start
    begin = (index + 1) * R - W
    if WHOLE:
        if (begin >= start) & (begin >= 0):
            kv, z = whole_window(kv_score, ape, first_token + begin, channel, kv_stride, c)
        else:
            kv, z = candidates(kv_score, ape, q, begin, start, first_token, channel, state_table, state,
                               kv_stride, table_stride, c)  # fmt: skip
    else:
        kv, z = candidates(kv_score, ape, q, begin, start, first_token, channel, state_table, state,
                           kv_stride, table_stride, c)  # fmt: skip
    return softmax(kv, z, c, 1)


@triton.jit
def pool_together(kv_score, ape, first, channel, kv_stride, c: tl.constexpr):
    """P [G, block] of windows all of whose tokens are this step's, from ``first`` [G, 1, 1] on; ``pool``'s bits."""
    G: tl.constexpr = c.value.windows
    kv, z = whole_window(kv_score, ape, first, channel, kv_stride, c)
    kv, z = tl.broadcast(kv, z)  # a bias alone is that of any window
    return softmax(kv, z, c, G)
