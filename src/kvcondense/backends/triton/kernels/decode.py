"""A decode or verify step from hidden states in one launch, for one compressor or for two that read the same ones.

All programs stream the weights: each multiplies all tokens with a block of projected channels over a span of the hidden
ones, and stores partial sums. Then all wait for all, and go on with windows and kept rows, which add the partial sums
up in the order of the spans. Neither tokens nor neighbours change a sum: shapes are those of ``M`` tokens always.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.condense import keep, window_task
from kvcondense.backends.triton.kernels.fused import operand

STREAM: tl.constexpr = tl.constexpr(1)
WINDOWS: tl.constexpr = tl.constexpr(2)
KEEPS: tl.constexpr = tl.constexpr(4)
ALL: tl.constexpr = tl.constexpr(7)


@triton.jit
def grid_barrier(counters):
    """Wait until every program of a cooperative launch is here; what they stored before is visible after.

    counters [2] int32, zero before and after.
    """
    programs = tl.num_programs(0)
    tl.debug_barrier()
    tl.atomic_add(counters, 1)
    while tl.atomic_add(counters, 0) < programs:
        pass
    tl.debug_barrier()
    if tl.atomic_add(counters + 1, 1) == programs - 1:  # all have seen it: zero for the next one
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit
def stream(task, x, w, partials, tokens, hidden, x_stride, w_stride, split_stride, P: tl.constexpr,
           M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Sums of M tokens over span ``task % S`` of the hidden channels, for B of P projected channels."""
    column = (task // S) * B + tl.arange(0, B)
    span = tl.cdiv(hidden, K * S) * K
    first = (task % S) * span
    token = tl.arange(0, M)
    live = token < tokens
    k = tl.arange(0, K)
    source = x + tl.where(live, token, 0)[:, None].to(tl.int64) * x_stride + k[None, :]
    weight = w + column[None, :].to(tl.int64) * w_stride + k[:, None]
    total = tl.zeros([M, B], tl.float32)
    for i in range(first, tl.minimum(first + span, hidden), K):
        a = operand(tl.load(source + i, mask=live[:, None], other=0.0), WIDE)
        total = tl.dot(a, operand(tl.load(weight + i), WIDE), total)
    target = partials + (task % S) * split_stride + token[:, None] * P + column[None, :]
    tl.store(target, total, mask=live[:, None])


@triton.jit
def following(before):
    """The first item of this program's where items are dealt out in turn, and ``before`` others were before."""
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - before % programs) % programs


@triton.jit
def stream_all(before, x, own, tokens, hidden, x_stride, c: tl.constexpr,
               M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """This program's share of a compressor's products; items so far."""
    P: tl.constexpr = c.value.projected
    S: tl.constexpr = c.value.splits
    ITEMS: tl.constexpr = P // B * S
    w, partials, w_stride, split_stride = own[0], own[1], own[2], own[3]
    for task in range(following(before), ITEMS, tl.num_programs(0)):
        stream(task, x, w, partials, tokens, hidden, x_stride, w_stride, split_stride, P, M, B, K, S, WIDE)
    return before + ITEMS


@triton.jit
def windows_all(before, own, layer, windows, stored, c: tl.constexpr):
    """This program's share of a compressor's windows; items so far."""
    P: tl.constexpr = c.value.projected
    BLOCKS: tl.constexpr = c.value.blocks
    partials, split_stride = own[1], own[3]
    ape, gamma, cos, sin, query_start_loc, start_positions = layer
    window_request, window_index, window_slot, counters, count = windows
    rows, latent, state_table, state, cache, scales, table_stride, page_stride, scales_stride = stored
    items = count * BLOCKS
    for task in range(following(before), items, tl.num_programs(0)):
        window_task(task, partials, ape, gamma, cos, sin, rows, latent, query_start_loc, start_positions,
                    state_table, state, window_request, window_index, window_slot, cache, scales, counters,
                    P, split_stride, table_stride, page_stride, scales_stride, c)  # fmt: skip
    return before + items


@triton.jit
def keeps_all(before, own, layer, keeps, stored, c: tl.constexpr):
    """This program's share of a compressor's kept rows; items so far."""
    P: tl.constexpr = c.value.projected
    STATE: tl.constexpr = c.value.has_state
    partials, split_stride = own[1], own[3]
    keep_token, keep_position, keep_row, items = keeps
    if STATE:
        for k in range(following(before), items, tl.num_programs(0)):
            keep(k, partials, layer[0], keep_token, keep_position, keep_row, stored[3],
                 P, split_stride, c)  # fmt: skip
    return before + items


@triton.jit
def decode_kernel(
    x, tokens, hidden, x_stride,
    own, layer, windows, keeps, stored, own_2, layer_2, windows_2, keeps_2, stored_2,
    c: tl.constexpr, c_2: tl.constexpr, TWO: tl.constexpr, ORDERED: tl.constexpr, PHASE: tl.constexpr,
    M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Step of one compressor, or of TWO. ORDERED: what is kept may replace what a window reads, and waits for it.

    The barriers' counters lie behind those of the first one's windows. PHASE: ALL of it, or one part after the other,
    where programs cannot wait for one another.
    """
    if (PHASE == STREAM) | (PHASE == ALL):
        before = stream_all(0, x, own, tokens, hidden, x_stride, c, M, B, K, WIDE)
        if TWO:
            stream_all(before, x, own_2, tokens, hidden, x_stride, c_2, M, B, K, WIDE)
    if PHASE == ALL:
        grid_barrier(windows[3] + windows[4])
    after = tl.program_id(0) * 0
    if (PHASE == WINDOWS) | (PHASE == ALL):
        after = windows_all(after, own, layer, windows, stored, c)
        if TWO:
            after = windows_all(after, own_2, layer_2, windows_2, stored_2, c_2)
    if PHASE == ALL and ORDERED:
        grid_barrier(windows[3] + windows[4] + 2)
    if (PHASE == KEEPS) | (PHASE == ALL):
        after = keeps_all(after, own, layer, keeps, stored, c)
        if TWO:
            keeps_all(after, own_2, layer_2, keeps_2, stored_2, c_2)
