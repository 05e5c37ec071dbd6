"""The static plans of a step in Triton: one program per plan, in four passes over requests and what they own.

What ``sound`` and ``Plan.build_static`` do, integer for integer. Passes meet at barriers of the program's threads, and
leave each other per-request integers in memory that belongs to the plan; programs never meet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcondense.backends import jobs as _jobs
from kvcondense.backends.triton.kernels.dependent import in_turn
from kvcondense.layout.plan import COUNTERS as _COUNTERS

(
    AT,  # where the plan's memory begins, in integers
    REQUESTS,
    LEVELS,  # halvings that find one of them
    SPAN,  # the first step of such a search, 2^(LEVELS - 1)
    WINDOWS,
    KEEPS,
    TOKENS,
    QUERY_LEN,
    DRAFTS,
    POSITIONS,
    RATIO,
    HALVES,
    KIND,
    BLOCKS,  # slots or pages of the state
    ROWS,  # of each
    PAGE_TOKENS,
    KEEP_ALL,
    STATE_STRIDE,
    STATE_PAGES,  # columns of the table
    SOURCE,  # of cache rows: NOWHERE, MAPPING or TABLE
    ENTRIES,  # of the mapping, or columns of the table
    TABLE_STRIDE,
    PAGE_ROWS,
    LAST_PAGE,  # the first page whose rows may leave int64
    CACHE_ROWS,
) = map(tl.constexpr, range(25))
"""What a plan is made for, int64 all: its row of the kernel's ``jobs``."""
SIZE: tl.constexpr = tl.constexpr(25)
NOWHERE: tl.constexpr = tl.constexpr(0)
MAPPING: tl.constexpr = tl.constexpr(1)
TABLE: tl.constexpr = tl.constexpr(2)
STATELESS: tl.constexpr = tl.constexpr(_jobs.STATELESS)
PAGED: tl.constexpr = tl.constexpr(_jobs.PAGED)
ONLINE: tl.constexpr = tl.constexpr(_jobs.ONLINE)
COUNTERS: tl.constexpr = tl.constexpr(_COUNTERS)
ALIGNED: tl.constexpr = tl.constexpr(16)
"""Integers between which arrays begin, so that no kernel that reads a plan is compiled for odd addresses."""
PER_REQUEST: tl.constexpr = tl.constexpr(6)
PER_WINDOW: tl.constexpr = tl.constexpr(4)
PER_KEEP: tl.constexpr = tl.constexpr(4)
"""Arrays of a plan's memory: query_start_loc, start_positions, draft_rows, lost (whose slot or pages are no good), and
two for sums; the window fields and the counters; the keep fields. Behind them is an integer for each slot."""


@triton.jit
def larger(a, b):
    """What a running maximum combines."""
    return tl.maximum(a, b)


@triton.jit
def aligned(count):
    """Integers between the beginnings of two arrays of ``count``."""
    return (count + ALIGNED - 1) // ALIGNED * ALIGNED


@triton.jit
def live_start(length, ratio, halves):
    """``CompressorSpec.live_start`` of int32 lengths."""
    return tl.maximum((length // ratio - (halves - 1)) * ratio, 0)


@triton.jit
def keep_start(start, end, drafts, ratio, halves, kind, keep_all):
    """First position [..] int32 that is kept; ``end`` if none is."""
    low = end
    if kind == ONLINE:
        low = end - drafts
    elif kind != STATELESS:
        low = start
        if keep_all == 0:
            low = tl.maximum(start, live_start(end - drafts, ratio, halves))
    return low


@triton.jit
def pages_of(start, end, drafts, ratio, halves, kind, keep_all, page_tokens):
    """(column, number) of the state pages that a request reads, then of those that it keeps rows on."""
    read = live_start(start, ratio, halves)
    low = keep_start(start, end, drafts, ratio, halves, kind, keep_all)
    reads = tl.where(read < start, (start - 1) // page_tokens - read // page_tokens + 1, 0)
    keeps = tl.where(low < end, (end - 1) // page_tokens - low // page_tokens + 1, 0)
    return read // page_tokens, reads, low // page_tokens, keeps


@triton.jit
def owner_of(ends, item, requests, levels, span):
    """The request that each item belongs to, by the running sums ``ends`` [requests], and the owner's first item."""
    owner = item * 0
    step = span
    for _ in range(levels):
        probe = owner + step
        there = probe <= requests
        end = tl.load(ends + probe - 1, mask=there, other=0)
        owner = tl.where(there & (end <= item), probe, owner)
        step = step // 2
    return owner, tl.load(ends + owner - 1, mask=owner > 0, other=0)


@triton.jit
def request_of(out, side, owner, live):
    """(first token int64, start, end, drafts int32) of sound requests, 0 unless ``live``."""
    token = tl.load(out + owner, mask=live, other=0)
    count = tl.load(out + owner + 1, mask=live, other=0) - token
    start = tl.load(out + side + owner, mask=live, other=0)
    drafts = tl.load(out + 2 * side + owner, mask=live, other=0)
    return token, start.to(tl.int32), (start + count).to(tl.int32), drafts.to(tl.int32)


@triton.jit
def admit(job, out, side, marks, query_start_loc, start_positions, draft_rows, state_slots, BLOCK: tl.constexpr):
    """The sound batch, but for shared slots and missing pages; who marked a slot last, running sums of pages."""
    requests, tokens, query_len = tl.load(job + REQUESTS), tl.load(job + TOKENS), tl.load(job + QUERY_LEN)
    most_drafts, positions = tl.load(job + DRAFTS), tl.load(job + POSITIONS)
    kind, blocks, width = tl.load(job + KIND), tl.load(job + BLOCKS), tl.load(job + STATE_PAGES)
    ratio, halves = tl.load(job + RATIO).to(tl.int32), tl.load(job + HALVES).to(tl.int32)
    keep_all, page_tokens = tl.load(job + KEEP_ALL), tl.load(job + PAGE_TOKENS).to(tl.int32)
    reached = tl.minimum(tl.maximum(tl.load(query_start_loc), 0), tokens)
    tl.store(out, reached)
    pages = reached * 0
    for first in range(0, requests, BLOCK):
        q = (first + tl.arange(0, BLOCK)).to(tl.int64)
        here = q < requests
        given = tl.load(query_start_loc + q, mask=here, other=0)
        following = tl.load(query_start_loc + q + 1, mask=here, other=0)
        begin = tl.associative_scan(tl.minimum(tl.maximum(given, 0), tokens), 0, larger)
        begin = tl.maximum(begin, reached)
        end = tl.maximum(begin, tl.minimum(tl.maximum(following, 0), tokens))
        reached = tl.max(end, 0)
        count = end - begin
        start = tl.load(start_positions + q, mask=here, other=-1)
        drafts = tl.load(draft_rows + q, mask=here, other=0)
        good = here & (begin == given) & (end == following) & (count > 0) & (count <= query_len)
        good = good & (start >= 0) & (start <= positions - count)
        good = good & (drafts >= 0) & (drafts <= count) & (drafts <= most_drafts)
        if kind == PAGED:
            old, new = tl.where(good, start, 0).to(tl.int32), tl.where(good, start + count, 0).to(tl.int32)
            taken = tl.where(good, drafts, 0).to(tl.int32)
            read, reads, low, keeps = pages_of(old, new, taken, ratio, halves, kind, keep_all, page_tokens)
            good = good & (tl.where(reads > 0, read + reads, 0) <= width)
            good = good & (tl.where(keeps > 0, low + keeps, 0) <= width)
            needed = tl.where(good, reads + keeps, 0).to(tl.int64)
            tl.store(out + 5 * side + q, pages + tl.cumsum(needed, 0), mask=here)
            pages += tl.sum(needed, 0)
        elif kind != STATELESS:
            slot = tl.load(state_slots + q, mask=here, other=-1)
            good = good & (slot >= 0) & (slot < blocks)
            tl.store(marks + slot, q, mask=good)
            tl.store(out + 4 * side + q, slot, mask=here)
        tl.store(out + q + 1, end, mask=here)
        tl.store(out + side + q, tl.where(good, start, -1), mask=here)
        tl.store(out + 2 * side + q, tl.where(good, drafts, 0), mask=here)
        tl.store(out + 3 * side + q, q * 0, mask=here)


@triton.jit
def share(job, out, side, marks, BLOCK: tl.constexpr):
    """Requests whose slot another one has marked are lost, and so is that one."""
    requests = tl.load(job + REQUESTS)
    for first in range(0, requests, BLOCK):
        q = (first + tl.arange(0, BLOCK)).to(tl.int64)
        live = tl.load(out + side + q, mask=q < requests, other=-1) >= 0
        slot = tl.load(out + 4 * side + q, mask=live, other=0)
        other = tl.load(marks + slot, mask=live, other=0)
        shared = live & (other != q)
        tl.store(out + 3 * side + q, q * 0 + 1, mask=shared)
        tl.store(out + 3 * side + other, q * 0 + 1, mask=shared)


@triton.jit
def miss(job, out, side, state_table, BLOCK: tl.constexpr):
    """Requests that read or keep a row on a page that the state lacks are lost."""
    requests, levels, span = tl.load(job + REQUESTS), tl.load(job + LEVELS), tl.load(job + SPAN)
    kind, blocks, stride = tl.load(job + KIND), tl.load(job + BLOCKS), tl.load(job + STATE_STRIDE)
    ratio, halves = tl.load(job + RATIO).to(tl.int32), tl.load(job + HALVES).to(tl.int32)
    keep_all, page_tokens = tl.load(job + KEEP_ALL), tl.load(job + PAGE_TOKENS).to(tl.int32)
    ends = out + 5 * side
    last = tl.load(ends + requests - 1)
    for first in range(0, last, BLOCK):
        item = (first + tl.arange(0, BLOCK)).to(tl.int64)
        here = item < last
        owner, begin = owner_of(ends, item, requests, levels, span)
        token, start, end, drafts = request_of(out, side, owner, here)
        read, reads, low, keeps = pages_of(start, end, drafts, ratio, halves, kind, keep_all, page_tokens)
        i = item - begin
        column = tl.where(i < reads, read + i, low + i - reads)
        page = tl.load(state_table + owner * stride + column, mask=here, other=0)
        tl.store(out + 3 * side + owner, owner * 0 + 1, mask=here & ((page < 0) | (page >= blocks)))


@triton.jit
def total(job, out, side, BLOCK: tl.constexpr):
    """Those that are lost are inert; running sums of windows and kept rows of the others."""
    requests, kind, keep_all = tl.load(job + REQUESTS), tl.load(job + KIND), tl.load(job + KEEP_ALL)
    ratio, halves = tl.load(job + RATIO).to(tl.int32), tl.load(job + HALVES).to(tl.int32)
    windows, keeps = requests * 0, requests * 0
    for first in range(0, requests, BLOCK):
        q = (first + tl.arange(0, BLOCK)).to(tl.int64)
        here = q < requests
        lost = tl.load(out + 3 * side + q, mask=here, other=0)
        live = (tl.load(out + side + q, mask=here, other=-1) >= 0) & (lost == 0)
        token, start, end, drafts = request_of(out, side, q, live)
        tl.store(out + side + q, q * 0 - 1, mask=lost != 0)
        tl.store(out + 2 * side + q, q * 0, mask=lost != 0)
        ended = (end // ratio - start // ratio).to(tl.int64)
        kept = (end - keep_start(start, end, drafts, ratio, halves, kind, keep_all)).to(tl.int64)
        tl.store(out + 4 * side + q, windows + tl.cumsum(ended, 0), mask=here)
        tl.store(out + 5 * side + q, keeps + tl.cumsum(kept, 0), mask=here)
        windows += tl.sum(ended, 0)
        keeps += tl.sum(kept, 0)


@triton.jit
def plan_windows(job, out, side, target, gap, slot_mapping, block_table, BLOCK: tl.constexpr):
    """window_request, window_index, window_slot and zero counters, ``gap`` integers apart."""
    requests, levels, span = tl.load(job + REQUESTS), tl.load(job + LEVELS), tl.load(job + SPAN)
    size, ratio, source = tl.load(job + WINDOWS), tl.load(job + RATIO).to(tl.int32), tl.load(job + SOURCE)
    entries, stride, cache_rows = tl.load(job + ENTRIES), tl.load(job + TABLE_STRIDE), tl.load(job + CACHE_ROWS)
    page_rows, last_page = tl.load(job + PAGE_ROWS).to(tl.int32), tl.load(job + LAST_PAGE)
    ends = out + 4 * side
    last = tl.load(ends + requests - 1)
    for first in range(0, size + COUNTERS, BLOCK):
        item = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside, live = item < size, item < last
        owner, begin = owner_of(ends, item, requests, levels, span)
        token, start, stop, drafts = request_of(out, side, owner, live)
        window = start // ratio + (item - begin).to(tl.int32)
        slot = item * 0 - 1
        if source == MAPPING:
            end = token + ((window + 1) * ratio - 1 - start)
            slot = tl.load(slot_mapping + end, mask=live & (end >= 0) & (end < entries), other=-1)
        elif source == TABLE:
            column = window // page_rows
            page = tl.load(block_table + owner * stride + column, mask=live & (column < entries), other=-1).to(tl.int64)
            there = (page >= 0) & (page < last_page)
            slot = tl.where(there, tl.where(there, page, 0) * page_rows + window % page_rows, -1)
        slot = tl.where((slot >= 0) & (slot < cache_rows), slot, -1)
        tl.store(target + item, tl.where(live, owner, -1), mask=inside)
        tl.store(target + gap + item, tl.where(live, window, -1), mask=inside)
        tl.store(target + 2 * gap + item, tl.where(live, slot, -1), mask=inside)
        tl.store(target + 3 * gap + item, item * 0, mask=item < size + COUNTERS)


@triton.jit
def plan_keeps(job, out, side, target, gap, state_slots, state_table, BLOCK: tl.constexpr):
    """keep_token, keep_request, keep_position and keep_row, ``gap`` integers apart."""
    requests, levels, span = tl.load(job + REQUESTS), tl.load(job + LEVELS), tl.load(job + SPAN)
    size, kind, keep_all = tl.load(job + KEEPS), tl.load(job + KIND), tl.load(job + KEEP_ALL)
    ratio, halves = tl.load(job + RATIO).to(tl.int32), tl.load(job + HALVES).to(tl.int32)
    rows, page_tokens = tl.load(job + ROWS), tl.load(job + PAGE_TOKENS).to(tl.int32)
    stride, width = tl.load(job + STATE_STRIDE), tl.load(job + STATE_PAGES)
    ring = tl.maximum(rows, 1).to(tl.int32)  # an online state without drafts has no rows
    ends = out + 5 * side
    last = tl.load(ends + requests - 1)
    for first in range(0, size, BLOCK):
        item = (first + tl.arange(0, BLOCK)).to(tl.int64)
        inside, live = item < size, item < last
        owner, begin = owner_of(ends, item, requests, levels, span)
        token, start, end, drafts = request_of(out, side, owner, live)
        low = keep_start(start, end, drafts, ratio, halves, kind, keep_all)
        position = low + (item - begin).to(tl.int32)
        block = item * 0
        if kind == PAGED:
            column = position // page_tokens
            block = tl.load(state_table + owner * stride + column, mask=live & (column < width), other=0).to(tl.int64)
        elif kind != STATELESS:
            block = tl.load(state_slots + owner, mask=live, other=0)
        row = block * rows + position % ring
        tl.store(target + item, tl.where(live, token + (position - start), -1), mask=inside)
        tl.store(target + gap + item, tl.where(live, owner, -1), mask=inside)
        tl.store(target + 2 * gap + item, tl.where(live, position, -1), mask=inside)
        tl.store(target + 3 * gap + item, tl.where(live, row, -1), mask=inside)


@triton.jit(do_not_specialize=["jobs", "memory", "query_start_loc", "start_positions", "draft_rows", "state_slots",
                               "state_table", "slot_mapping", "block_table"])  # fmt: skip
def plan_kernel(
    jobs, memory, query_start_loc, start_positions, draft_rows, state_slots, state_table, slot_mapping, block_table,
    BLOCK: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """Plan ``program_id(0)`` of those that ``jobs`` [programs, SIZE] describes, into ``memory``.

    All are int64, tables perhaps int32. Work is O(R log R + (E + K + pages) log R) for R requests: slots are compared
    through memory, not with each other, and whoever owns a window, a kept row or a page is searched for in the running
    sums.
    """
    in_turn(PDL)
    job = jobs + tl.program_id(0) * SIZE
    kind = tl.load(job + KIND)
    side, gap = aligned(tl.load(job + REQUESTS) + 1), aligned(tl.load(job + WINDOWS) + COUNTERS)
    keep_gap = aligned(tl.load(job + KEEPS))
    out = memory + tl.load(job + AT)
    windows = out + PER_REQUEST * side
    keeps = windows + PER_WINDOW * gap
    marks = keeps + PER_KEEP * keep_gap
    admit(job, out, side, marks, query_start_loc, start_positions, draft_rows, state_slots, BLOCK)
    tl.debug_barrier()
    if kind == PAGED:
        miss(job, out, side, state_table, BLOCK)
    elif kind != STATELESS:
        share(job, out, side, marks, BLOCK)
    tl.debug_barrier()
    total(job, out, side, BLOCK)
    tl.debug_barrier()
    plan_windows(job, out, side, windows, gap, slot_mapping, block_table, BLOCK)
    plan_keeps(job, out, side, keeps, keep_gap, state_slots, state_table, BLOCK)
