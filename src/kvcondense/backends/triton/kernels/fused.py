"""The projection in the step's kernels: tiles of whole windows accumulate kv and score and pool in their epilogue.

kv_score never reaches memory. The windows of a tile may belong to any requests; every product sums over the hidden
channels in the same steps, so that a token gives the same bits in any tile. Rows of x are read once for kv and score,
and for both halves of overlapping windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.bits import exp, round_bf16
from kvcondense.backends.triton.kernels.dependent import in_turn
from kvcondense.backends.triton.kernels.pool import as_stored, row_offset, scores_of, state_row, values_of
from kvcondense.backends.triton.kernels.products import accumulate, project_tile

NOWHERE: tl.constexpr = tl.constexpr(-(2**31))


@triton.jit
def biases(ape, position, half, channel, c: tl.constexpr):
    """ape [block, n] of each position."""
    R: tl.constexpr = c.value.ratio
    N: tl.constexpr = c.value.width
    return tl.load(ape + ((position % R).to(tl.int32) * N + half)[None, :] + channel[:, None])


@triton.jit
def each(window, G: tl.constexpr, R: tl.constexpr):
    """Of windows [G] and the numbers of their tokens, the sums [G R]."""
    return tl.reshape(window[:, None] + tl.arange(0, R)[None, :], (G * R,))


@triton.jit
def windows_of(first, end, back, plan, c: tl.constexpr, G: tl.constexpr):
    """Of windows ``first`` .. [G] of the plan, up to ``end``: request, its start, and the position ``back`` before the
    window's first. The last two are ``NOWHERE`` where there is no window.

    Looked up wherever it is needed: registers that would hold it are the products'.
    """
    R: tl.constexpr = c.value.ratio
    e = first + tl.arange(0, G)
    here = (e >= 0) & (e < end)
    entry = tl.where(here, e, 0)
    request = tl.load(plan[0] + entry, mask=here, other=-1).to(tl.int32)
    index = tl.load(plan[1] + entry, mask=here, other=0).to(tl.int32)  # positions and tokens are below 2^31
    q = tl.maximum(request, 0)
    start = tl.load(plan[2] + q, mask=request >= 0, other=0).to(tl.int32)
    start = tl.where(request >= 0, start, NOWHERE)
    return q, start, tl.where(request >= 0, index * R - back, NOWHERE)


@triton.jit
def pinned(t, M: tl.constexpr, c: tl.constexpr, PIN: tl.constexpr):
    """t [block, M] itself, in the registers where products are: a product of zeros is added.

    Else compilers lay out all that follows, or came before, as the loads are that went into it: windows across warps.
    """
    BLOCK: tl.constexpr = c.value.block
    if PIN:
        t = tl.dot(tl.zeros([BLOCK, 16], tl.bfloat16), tl.zeros([16, M], tl.bfloat16), t)
    return t


@triton.jit
def where_stored(t, source, stored, c: tl.constexpr):
    """t [n, M] with what is at ``source`` where ``stored`` [M]."""
    ROUND: tl.constexpr = c.value.state_bf16
    if ROUND:
        t = tl.where(stored[None, :], tl.load(source, mask=stored[None, :], other=0.0).to(tl.float32), t)
    else:
        t = tl.load(source, mask=stored[None, :], other=t)  # into the very registers
    return t


@triton.jit
def with_state(t, pointer, first, end, back, part, plan, state_table, table_stride,
               c: tl.constexpr, G: tl.constexpr, PIN: tl.constexpr, HALVES: tl.constexpr):  # fmt: skip
    """t [block, G R] of channels from ``part`` on, with the state's values of tokens before their request's start."""
    R: tl.constexpr = c.value.ratio
    BLOCK: tl.constexpr = c.value.block
    M: tl.constexpr = G * R
    HALF: tl.constexpr = BLOCK // 2
    EIGHTS: tl.constexpr = BLOCK // 16
    q, start, begin = windows_of(first, end, back, plan, c, G)
    position = each(begin, G, R)
    stored = (position >= 0) & (each(begin - start, G, R) < 0)
    request = tl.reshape(tl.broadcast_to(q[:, None], (G, R)), (M,)).to(tl.int64)
    row = state_row(position, stored, request, state_table, table_stride, c)
    t = pinned(t, M, c, PIN)
    if HALVES:  # one after the other, in half the registers: of 16 rows of products 8 and 8
        i = tl.arange(0, HALF)
        source = pointer + row[None, :] + (part + i // 8 * 16 + i % 8)[:, None]
        low, high = tl.split(tl.permute(tl.reshape(t, (EIGHTS, 2, 8, M)), (0, 2, 3, 1)))
        low = where_stored(tl.reshape(low, (HALF, M)), source, stored, c)
        high = where_stored(tl.reshape(high, (HALF, M)), source + 8, stored, c)
        both = tl.join(tl.reshape(low, (EIGHTS, 8, M)), tl.reshape(high, (EIGHTS, 8, M)))
        t = tl.reshape(tl.permute(both, (0, 3, 1, 2)), (BLOCK, M))
    else:
        t = where_stored(t, pointer + row[None, :] + (part + tl.arange(0, BLOCK))[:, None], stored, c)
    return t


@triton.jit
def tokens_of(kv, z, first, end, back, half, part, plan, ape, state_table, state, table_stride,
              c: tl.constexpr, G: tl.constexpr, PIN: tl.constexpr, HALVES: tl.constexpr):  # fmt: skip
    """kv and z [block, G R] as windows pool them, of the tokens ``back`` before those of windows ``first`` ..:
    projected ones with their bias, stored ones before the start; z is -inf where there is none.
    """
    R: tl.constexpr = c.value.ratio
    BLOCK: tl.constexpr = c.value.block
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    STATE: tl.constexpr = c.value.has_state
    RAW: tl.constexpr = c.value.raw_scores
    M: tl.constexpr = G * R
    q, start, begin = windows_of(first, end, back, plan, c, G)
    if STATE:
        if tl.max(((begin >= 0) & (begin < start)).to(tl.int32), axis=0) > 0:  # in few tiles
            kv = with_state(kv, values_of(state, c) + half, first, end, back, part, plan, state_table, table_stride,
                            c, G, PIN, HALVES)  # fmt: skip
            if GATE:
                z = with_state(z, scores_of(state, c) + half, first, end, back, part, plan, state_table, table_stride,
                               c, G, PIN, HALVES)  # fmt: skip
    valid = each(begin, G, R) >= 0
    fresh = each(begin - start, G, R) >= 0
    if not STATE and R > 1:  # what is not this step's would be a neighbour's
        kv = tl.where(fresh[None, :], kv, 0.0)
        if GATE:
            z = tl.where(fresh[None, :], z, 0.0)
    kv = tl.where(valid[None, :], as_stored(kv, c), 0.0)
    if APE:
        # A window begins at a multiple of the ratio: a token's place says its phase.
        bias = biases(ape, tl.arange(0, M), half, part + tl.arange(0, BLOCK), c)
        if not GATE:
            z = bias
        elif RAW:
            z = as_stored(z, c) + bias
        else:
            z = as_stored(tl.where(fresh[None, :], z + bias, z), c)
    else:
        z = as_stored(z, c)
    z = tl.where(valid[None, :], z, float("-inf"))
    return kv, pinned(z, M, c, PIN and APE)


@triton.jit
def tokens_sum(t, G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """t [block, G, R] -> [block, G] by halving, as ``rows_sum`` does it for one window."""
    for i in tl.static_range(LEVELS):
        t = tl.sum(tl.reshape(t, (BLOCK, G, 2, R >> (i + 1))), axis=2)
    return tl.reshape(t, (BLOCK, G))


@triton.jit
def pooled_alone(kv, z, G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """P [block, G] of windows of R tokens."""
    z = tl.reshape(z, (BLOCK, G, R))
    e = exp(z - tl.max(z, axis=2)[:, :, None])
    total = tokens_sum(e, G, R, BLOCK, LEVELS)
    return tl.div_rn(tokens_sum(e * tl.reshape(kv, (BLOCK, G, R)), G, R, BLOCK, LEVELS), total)


@triton.jit
def pooled_with(kv, z, kv_before, z_before,
                G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr):  # fmt: skip
    """P [block, G] of windows of R tokens and the R tokens before them."""
    z = tl.reshape(z, (BLOCK, G, R))
    z_before = tl.reshape(z_before, (BLOCK, G, R))
    top = tl.maximum(tl.max(z, axis=2), tl.max(z_before, axis=2))
    e_before = exp(z_before - top[:, :, None])
    e = exp(z - top[:, :, None])
    total = tokens_sum(e_before + e, G, R, BLOCK, LEVELS)
    kv = e_before * tl.reshape(kv_before, (BLOCK, G, R)) + e * tl.reshape(kv, (BLOCK, G, R))
    return tl.div_rn(tokens_sum(kv, G, R, BLOCK, LEVELS), total)


@triton.jit
def moved(t, M: tl.constexpr, c: tl.constexpr):
    """t [block, M] of the window before; nothing of value for the first."""
    R: tl.constexpr = c.value.ratio
    BLOCK: tl.constexpr = c.value.block
    place = tl.maximum(tl.arange(0, M) - R, 0)
    return tl.gather(t, tl.broadcast_to(place[None, :], (BLOCK, M)), axis=1)


@triton.jit
def keep_tile(kv, z, position, row, kept, at, channel, ape, state, c: tl.constexpr):
    """[kv | score + ape], or raw scores, of ``kept`` tokens for the state's channels ``at`` + ``channel``."""
    GATE: tl.constexpr = c.value.has_gate
    APE: tl.constexpr = c.value.has_ape
    RAW: tl.constexpr = c.value.raw_scores
    ROUND: tl.constexpr = c.value.state_bf16
    offset = (at + row_offset(row, c))[None, :] + channel[:, None]
    target = values_of(state, c)
    if ROUND:  # rounded before the cast, which therefore is exact
        kv = round_bf16(kv, c)
    tl.store(target + offset, kv.to(target.dtype.element_ty), mask=kept[None, :])
    if GATE:
        if APE and not RAW:
            z += biases(ape, position, at, channel, c)
        if ROUND:
            z = round_bf16(z, c)
        tl.store(scores_of(state, c) + offset, z.to(target.dtype.element_ty), mask=kept[None, :])


@triton.jit(do_not_specialize=["windows", "keeps", "window_programs", "table_stride"])
def tiles_kernel(
    x, x_box, w, ape, query_start_loc, start_positions, state_table, state, window_request, window_index, rows,
    keep_token, keep_position, keep_row, windows, keeps, window_programs, hidden, x_stride, w_stride, table_stride,
    c: tl.constexpr, G: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
    PIN: tl.constexpr, HALVES: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """The first ``window_programs`` programs pool windows to ``rows``, which ``finish_kernel`` ends; the others store
    kept rows, and skip padding (-1). Each does a block of channels of a tile.

    A tile is the tokens of G windows. With overlap the first is there for its tokens alone, which the next one reads:
    no window has to look into another tile. Where the window before is not of this step, the state has its tokens.
    """
    R: tl.constexpr = c.value.ratio
    W: tl.constexpr = c.value.window
    N: tl.constexpr = c.value.width
    D: tl.constexpr = c.value.head_dim
    BLOCK: tl.constexpr = c.value.block
    BLOCKS: tl.constexpr = c.value.blocks
    LEVELS: tl.constexpr = c.value.ratio_levels
    STATE: tl.constexpr = c.value.has_state
    OVERLAP: tl.constexpr = W > R
    M: tl.constexpr = G * R
    LEAD: tl.constexpr = 1 if OVERLAP else 0
    in_turn(PDL)
    program = tl.program_id(0)
    pooling = program < window_programs
    part = (program % BLOCKS) * BLOCK
    channel = part + tl.arange(0, BLOCK)
    own = N - D  # the last d channels of tokens in the window, the first of those before it
    first = (program // BLOCKS) * (G - LEAD) - LEAD
    end = tl.where(pooling, windows, 0)
    plan = (window_request, window_index, start_positions)
    q, start, begin = windows_of(first, end, 0, plan, c, G)
    m = tl.arange(0, M)
    token = each(tl.load(query_start_loc + q, mask=begin >= 0, other=0).to(tl.int32) - start + begin, G, R)
    live = each(tl.where(begin >= 0, begin - start, NOWHERE), G, R) >= 0
    if STATE:
        k = ((program - window_programs) // BLOCKS) * M + m
        entry = tl.where(k < keeps, k, 0)
        if not pooling:
            token = tl.load(keep_token + entry).to(tl.int32)
            live = ((k >= 0) & (k < keeps)) & (token >= 0)
    base = tl.max(tl.where(live, token - m, NOWHERE), axis=0)  # of tokens that lie side by side
    kv, z, kv_before, z_before = project_tile(x, x_box, w, token, live, base, own + part, part if OVERLAP else None,
                                              hidden, x_stride, w_stride, c, M, K, WIDE)  # fmt: skip
    if pooling:
        kv, z = tokens_of(kv, z, first, end, 0, own, part, plan, ape, state_table, state, table_stride,
                          c, G, PIN, HALVES)  # fmt: skip
        if OVERLAP:  # tokens of a window as the next one pools them; of the tile's last, the next is another tile's
            last = tl.minimum(first + G, end)
            kv_before, z_before = tokens_of(kv_before, z_before, first + 1, last, R, 0, part, plan, ape,
                                            state_table, state, table_stride, c, G, PIN, HALVES)  # fmt: skip
            pooled = pooled_with(kv, z, moved(kv_before, M, c), moved(z_before, M, c), G, R, BLOCK, LEVELS)
        else:
            pooled = pooled_alone(kv, z, G, R, BLOCK, LEVELS)
        q, start, begin = windows_of(first, end, 0, plan, c, G)
        g = tl.arange(0, G)
        target = rows + (first + g)[None, :].to(tl.int64) * D + channel[:, None]
        tl.store(target, pooled, mask=((begin >= 0) & (g >= LEAD))[None, :])
    elif STATE:
        row = tl.where(live, tl.load(keep_row + entry), 0)
        position = tl.where(live, tl.load(keep_position + entry), 0)
        keep_tile(kv, z, position, row, live, own, channel, ape, state, c)
        if OVERLAP:
            keep_tile(kv_before, z_before, position, row, live, 0, channel, ape, state, c)


@triton.jit(do_not_specialize=["tokens"])
def project_kernel(
    x, x_box, w, kv_score, tokens, hidden, x_stride, w_stride, out_stride,
    c: tl.constexpr, M: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """kv_score of M tokens for a block of channels, with the bits that tiles pool and keep."""
    N: tl.constexpr = c.value.width
    BLOCK: tl.constexpr = c.value.block
    BLOCKS: tl.constexpr = N // BLOCK
    BOXES: tl.constexpr = x_box is not None
    in_turn(PDL)
    program = tl.program_id(0)
    part = (program % BLOCKS) * BLOCK
    base = (program // BLOCKS) * M
    token = base + tl.arange(0, M)
    live = token < tokens
    if BOXES:
        x = x_box
    kv, z, kv_2, z_2 = accumulate(x, w, token, live, base, part, None, hidden, x_stride, w_stride,
                                  c, M, K, WIDE, BOXES, BOXES)  # fmt: skip
    target = kv_score + token[None, :].to(tl.int64) * out_stride + (part + tl.arange(0, BLOCK))[:, None]
    tl.store(target, kv, mask=live[None, :])
