"""A decode or verify step from hidden states in one launch, for one compressor or for two that read the same ones.

All programs stream the weights: each multiplies all tokens with a block of projected channels over a span of the hidden
ones, and stores partial sums; whoever stores a block's last ones adds them up, in the order of the spans. Then all wait
for all, and go on with windows and kept rows. Neither tokens nor neighbours change a sum: shapes are those of ``M``
tokens always.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends.triton.kernels.arrive import arrive, grid_barrier, last_of, wait
from kvcondense.backends.triton.kernels.condense import keep, keep_at, request_at, window_at, window_task
from kvcondense.backends.triton.kernels.dependent import earlier_done, let_next_start, prefetch
from kvcondense.backends.triton.kernels.products import product
from kvcondense.layout.plan import BARRIERS as _BARRIERS

BARRIERS: tl.constexpr = tl.constexpr(_BARRIERS)
STREAM: tl.constexpr = tl.constexpr(1)
WINDOWS: tl.constexpr = tl.constexpr(2)
KEEPS: tl.constexpr = tl.constexpr(4)
ALL: tl.constexpr = tl.constexpr(7)
THREADS: tl.constexpr = tl.constexpr(128)
"""Of a program."""
SUMMED: tl.constexpr = tl.constexpr(16)
"""Tokens whose partial sums are added up at once: so few that registers hold the spans of all, whose loads wait
together."""


@triton.jit
def add_spans(target, tokens, sound, split_stride, P: tl.constexpr, S: tl.constexpr):
    """Partial sums [tokens, B] of S spans, which other programs have stored, to where the first one's stand, at
    ``target`` [1, B]; NaN if not sound. All spans of a few tokens are asked for at once.
    """
    for first in range(0, tokens, SUMMED):
        token = first + tl.arange(0, SUMMED)
        live = (token < tokens)[:, None]
        place = target + token[:, None] * P
        total = tl.load(place, mask=live, other=0.0, cache_modifier=".cg")
        for s in tl.static_range(1, S):
            total += tl.load(place + s * split_stride, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(place, tl.where(sound, total, float("nan")), mask=live)


@triton.jit
def span_of(task, hidden, K: tl.constexpr, S: tl.constexpr):
    """The hidden channels of product ``task``, from the first to behind the last: one of S spans, in steps of K."""
    span = tl.cdiv(hidden, K * S) * K
    first = (task % S) * span
    return first, tl.minimum(first + span, hidden)


@triton.jit
def stream(task, counter, launch, x, w, partials, tokens, hidden, x_stride, w_stride, split_stride, P: tl.constexpr,
           M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Sums of M tokens over span ``task % S`` of the hidden channels, for B of P projected channels.

    Those of all spans come to stand where the first one's stood; NaN, unless the block's counter counts them alone.
    """
    column = (task // S) * B + tl.arange(0, B)
    first, end = span_of(task, hidden, K, S)
    token = tl.arange(0, M)
    live = token < tokens
    k = tl.arange(0, K)
    source = x + tl.where(live, token, 0)[:, None].to(tl.int64) * x_stride + k[None, :]
    weight = w + column[None, :].to(tl.int64) * w_stride + k[:, None]
    total = tl.zeros([M, B], tl.float32)
    for i in range(first, end, K):
        total = product(tl.load(source + i, mask=live[:, None], other=0.0), tl.load(weight + i), total, WIDE)
    target = partials + token[:, None] * P + column[None, :]
    tl.store(target + (task % S) * split_stride, total, mask=live[:, None])
    if S > 1:
        last = last_of(counter, launch, S)
        if last != 0:
            add_spans(partials + column[None, :], tokens, last > 0, split_stride, P, S)


@triton.jit
def following(before):
    """The first item of this program's where items are dealt out in turn, and ``before`` others were before."""
    programs = tl.num_programs(0)
    first = tl.program_id(0) - before % programs
    return tl.where(first < 0, first + programs, first)


@triton.jit
def prefetch_all(before, own, hidden, c: tl.constexpr, B: tl.constexpr, K: tl.constexpr):
    """Ask for the weights of this program's share of a compressor's products; items so far."""
    P: tl.constexpr = c.value.projected
    S: tl.constexpr = c.value.splits
    ITEMS: tl.constexpr = P // B * S
    STEPS: tl.constexpr = THREADS // B  # of K channels, which are a line: one for each thread
    w, w_stride = own[0], own[2]
    for task in range(following(before), ITEMS, tl.num_programs(0)):
        first, end = span_of(task, hidden, K, S)
        column = (task // S) * B + tl.arange(0, B)
        row = w + column[:, None].to(tl.int64) * w_stride
        for i in range(first, end, K * STEPS):
            prefetch(row + tl.minimum(i + K * tl.arange(0, STEPS), end - K)[None, :])
    return before + ITEMS


@triton.jit
def stream_all(before, counters, launch, x, own, tokens, hidden, x_stride, c: tl.constexpr,
               M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """This program's share of a compressor's products; items so far. counters: one for each block of channels."""
    P: tl.constexpr = c.value.projected
    S: tl.constexpr = c.value.splits
    ITEMS: tl.constexpr = P // B * S
    w, partials, w_stride, split_stride = own[0], own[1], own[2], own[3]
    for task in range(following(before), ITEMS, tl.num_programs(0)):
        counter = counters + (before + task) // S
        stream(task, counter, launch, x, w, partials, tokens, hidden, x_stride, w_stride, split_stride,
               P, M, B, K, S, WIDE)  # fmt: skip
    return before + ITEMS


@triton.jit
def first_window(before, count, c: tl.constexpr):
    """This program's first item among a compressor's windows; items so far."""
    BLOCKS: tl.constexpr = c.value.blocks
    return following(before), before + count * BLOCKS


@triton.jit
def window_ahead(task, windows, count, c: tl.constexpr):
    """The window of item ``task``, if it is one."""
    BLOCKS: tl.constexpr = c.value.blocks
    return window_at(task // BLOCKS, task < count * BLOCKS, windows[0], windows[1], True)


@triton.jit
def window_item(task, window, request, own, layer, windows, stored, table_stride, launch, sound, c: tl.constexpr):
    """An item of a compressor's windows, of that window and request; nothing if there is none."""
    P: tl.constexpr = c.value.projected
    ape, gamma, cos, sin, query_start_loc, start_positions = layer
    window_request, window_index, window_slot, counters = windows
    rows, latent, state_table, state, cache, scales, page_stride, scales_stride = stored
    if window[0] >= 0:
        window_task(task, window[0], window[1], request[0], request[1], own[1], ape, gamma, cos, sin, rows, latent,
                    state_table, state, window_slot, cache, scales, counters,
                    P, table_stride, page_stride, scales_stride, launch, sound, c)  # fmt: skip


@triton.jit
def windows_all(first, window, request, own, layer, windows, stored, count, table_stride, launch, sound,
                c: tl.constexpr):  # fmt: skip
    """This program's share of a compressor's windows, from item ``first`` on, of which the rest was asked ahead."""
    BLOCKS: tl.constexpr = c.value.blocks
    AHEAD: tl.constexpr = c.value.holds
    for task in range(first, count * BLOCKS, tl.num_programs(0)):
        if AHEAD:
            if task != first:
                window = window_at(task // BLOCKS, True, windows[0], windows[1], False)
                request = request_at(window[0], window[0] >= 0, layer[4], layer[5], False)
            window_item(task, window, request, own, layer, windows, stored, table_stride, launch, sound, c)
        else:
            found = window_at(task // BLOCKS, True, windows[0], windows[1], False)
            asker = request_at(found[0], found[0] >= 0, layer[4], layer[5], False)
            window_item(task, found, asker, own, layer, windows, stored, table_stride, launch, sound, c)


@triton.jit
def keeps_all(first, kept, own, layer, keeps, stored, items, sound, c: tl.constexpr):
    """This program's share of a compressor's kept rows, from number ``first`` on, of which ``kept`` was asked ahead."""
    P: tl.constexpr = c.value.projected
    STATE: tl.constexpr = c.value.has_state
    AHEAD: tl.constexpr = c.value.holds
    if STATE:
        for k in range(first, items, tl.num_programs(0)):
            if AHEAD:
                if k != first:
                    kept = keep_at(k, True, keeps[0], keeps[1], keeps[2], False)
                keep(kept[0], kept[1], kept[2], own[1], layer[0], stored[3], P, sound, c)
            else:
                token, position, row = keep_at(k, True, keeps[0], keeps[1], keeps[2], False)
                keep(token, position, row, own[1], layer[0], stored[3], P, sound, c)


@triton.jit(do_not_specialize=["tokens", "launch", "ordered", "count", "kept", "table_stride",
                               "count_2", "kept_2", "table_stride_2"])  # fmt: skip
def decode_kernel(
    x, tokens, hidden, x_stride, launch, ordered,
    own, layer, windows, keeps, stored, count, kept, table_stride,
    own_2, layer_2, windows_2, keeps_2, stored_2, count_2, kept_2, table_stride_2,
    c: tl.constexpr, c_2: tl.constexpr, TWO: tl.constexpr, PHASE: tl.constexpr,
    M: tl.constexpr, B: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Step of one compressor, or of TWO. ordered: what is kept may replace what a window reads, and waits for it.

    The counters of barriers and blocks of channels lie behind those of the first one's windows. PHASE: ALL of it, or
    one part after the other, where programs cannot wait for one another. What counts, and so changes from step to step,
    is a number by itself: Triton compiles a tuple anew for other numbers in it.
    """
    AHEAD: tl.constexpr = c.value.holds
    sound = tl.full((), 1, tl.int1)
    blocks = windows[3] + count + BARRIERS
    if PDL:  # while earlier kernels run, so that the weights are in the last cache when x is there
        before = prefetch_all(0, own, hidden, c, B, K)
        if TWO:
            prefetch_all(before, own_2, hidden, c_2, B, K)
    earlier_done(PDL)
    if (PHASE == STREAM) | (PHASE == ALL):
        before = stream_all(0, blocks, launch, x, own, tokens, hidden, x_stride, c, M, B, K, WIDE)
        if TWO:
            stream_all(before, blocks, launch, x, own_2, tokens, hidden, x_stride, c_2, M, B, K, WIDE)
    let_next_start(PDL)  # what is left asks little of the memory: the next kernel may ask for its weights
    task, after = first_window(0, count, c)
    window, request, row, window_2, request_2, row_2 = None, None, None, None, None, None
    if TWO:
        task_2, after = first_window(after, count_2, c_2)
    k, k_2 = following(after), following(after + kept)
    if AHEAD:  # what the plan has of this program's first windows and rows is there behind the barrier
        window = window_ahead(task, windows, count, c)
        row = keep_at(k, k < kept, keeps[0], keeps[1], keeps[2], True)
        if TWO:
            window_2 = window_ahead(task_2, windows_2, count_2, c_2)
            row_2 = keep_at(k_2, k_2 < kept_2, keeps_2[0], keeps_2[1], keeps_2[2], True)
    if PHASE == ALL:
        arrival = arrive(windows[3] + count, launch)
    if AHEAD:
        request = request_at(window[0], window[0] >= 0, layer[4], layer[5], True)
        if TWO:
            request_2 = request_at(window_2[0], window_2[0] >= 0, layer_2[4], layer_2[5], True)
    if PHASE == ALL:
        sound = wait(windows[3] + count, arrival, launch)
    if (PHASE == WINDOWS) | (PHASE == ALL):
        windows_all(task, window, request, own, layer, windows, stored, count, table_stride, launch, sound, c)
        if TWO:
            windows_all(task_2, window_2, request_2, own_2, layer_2, windows_2, stored_2, count_2, table_stride_2,
                        launch, sound, c_2)  # fmt: skip
    if PHASE == ALL:
        if ordered != 0:
            sound = sound & grid_barrier(windows[3] + count + 1, launch)
    if (PHASE == KEEPS) | (PHASE == ALL):
        keeps_all(k, row, own, layer, keeps, stored, kept, sound, c)
        if TWO:
            keeps_all(k_2, row_2, own_2, layer_2, keeps_2, stored_2, kept_2, sound, c_2)
