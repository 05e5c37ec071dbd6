"""A step's metadata in Numba: the batch's own copy, checked, then the plan of each ratio. One thread, time linear.

Entered twice: first it takes the batch and counts, so that the host can allocate; then it fills the plans from the
batch's copy, which nobody else writes. Whatever the builders in torch raise for ends in status 1 and no more: they are
asked to raise it.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from kvcondense.backends import jobs
from kvcondense.backends.cpu import plan_params as params
from kvcondense.backends.cpu.kernels import fields, functions
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.integers import larger, smaller
from kvcondense.backends.cpu.kernels.simd import operation, read

_step_at = fields.view(params.Step)

_I64, _LARGEST = ir.IntType(64), 2**63 - 1
_SPREAD = 0x9E3779B97F4A7C15 - 2**64
"""An odd number whose products have well mixed high bits."""


@operation(types.int64, types.int64)
def _load_i32(b, address):
    """One int32, widened."""
    return b.sext(read(b, address, ir.IntType(32), 4), _I64)


@kernel
def _take(column):
    """Copy a column, widened, row by row."""
    rows, width, stride = column.rows, column.width, column.stride
    if width == 1:
        rows, width, stride = 1, rows, column.row_stride
    size, to = column.bytes, column.to
    for i in range(rows):
        source = column.source + size * column.row_stride * i
        if size == 8:
            values = fields.integers(source)
            for j in range(width):
                to[width * i + j] = values[stride * j]
        else:
            for j in range(width):
                to[width * i + j] = _load_i32(source + 4 * stride * j)


@kernel
def _least(column):
    """The lowest entry of a column, 0 if all are higher."""
    low, to = 0, column.to
    for i in range(column.rows):
        low = smaller(low, to[i])
    return low


@kernel
def _columns(step):
    """Whether the columns that there are belong together; then the batch has them, and says where."""
    requests = step.query_start.rows - 1
    for i in range(params.COLUMNS):
        column = step.query_start[i]
        rows = column.rows
        per_request = i != 0 and i != 5
        if (rows < 0 and i < 3) or (rows >= 0 and per_request and rows != requests):
            return False
        # 0 says that there is none; an empty one may lie anywhere else.
        column.to = fields.integers(0 if rows < 0 else larger(1, step.base + column.offset))
        if column.bytes:
            _take(column)
    both = step.slots.to and step.state_table.to
    return requests >= 0 and not both and not (step.mapping.to and step.table.to)


@kernel
def _batch(step):
    """Take the columns and check them against each other; False if anything is irregular."""
    if not _columns(step):
        return False
    requests = step.start.rows
    bounds, starts = step.query_start.to, step.start.to
    drafts, slots = step.draft.to, step.slots.to
    given, most, uniform = step.start.bytes == 0, step.most, step.drafts
    if bounds[0] != 0:
        return False
    for q in range(requests):
        length = bounds[q + 1] - bounds[q]
        if slots and slots[q] < 0:
            if slots[q] != -1 or (given and starts[q] >= 0):
                return False
            if not given:
                starts[q] = -1
        if uniform >= 0:
            drafts[q] = smaller(uniform, length)
        start, draft = starts[q], drafts[q]
        if length < 0 or start < -1 or start > most - length or draft < 0 or draft > length:
            return False
    step.tokens = bounds[requests]
    if step.mapping.to:
        enough = step.mapping.rows >= bounds[requests]
        return enough and _least(step.mapping) >= -1
    return True


@inlined
def _live_start(windows, ratio, halves):
    return larger(0, (windows - (halves - 1)) * ratio)


@kernel
def _span(job, start, length, draft):
    """First window that ends in a request's tokens, the window behind the last one, and the first position kept."""
    ratio, halves, kind = job.ratio, job.halves, job.kind
    first = start // ratio
    behind = start - first * ratio + length
    last = first if behind < ratio else first + behind // ratio
    if kind == jobs.STATELESS:
        return first, last, start + length
    if kind == jobs.ONLINE:
        return first, last, start + length - draft
    if job.keep_all:
        return first, last, start
    settled = last if draft == 0 else (start + length - draft) // ratio
    return first, last, larger(start, _live_start(settled, ratio, halves))


@kernel
def _count(step, job):
    """Windows and kept rows of a plan; False if its state cannot take this step, or the table has too few pages.

    The latter before anything is allocated for each window that a batch claims to have.
    """
    pages, page_rows = step.table.to, job.page_rows
    if pages and page_rows == 0:
        return False
    requests = step.start.rows
    bounds, starts = step.query_start.to, step.start.to
    drafts = step.draft.to
    windows = keeps = most = 0
    for q in range(requests):
        start, length = starts[q], bounds[q + 1] - bounds[q]
        if start >= 0 and length > 0:
            first, last, low = _span(job, start, length, drafts[q])
            if pages and last > first and (last - 1) // page_rows >= step.table.width:
                return False
            windows += last - first
            keeps += start + length - low
            most = larger(most, drafts[q])
    job.windows = windows
    job.keeps = keeps
    kind, rows, halves = job.kind, job.block_rows, job.halves
    if kind == jobs.ONLINE:
        return halves == 1 and most <= rows
    if kind == jobs.RING or (kind == jobs.PAGED and job.page_tokens > rows):
        return rows >= halves * job.ratio - 1 + larger(1, most)
    return True


@kernel
def _forget(step):
    table = step.seen
    for i in range(step.seen_size):
        table[i] = -1


@kernel
def _seen(step, value, add):
    """Whether the hash table has a value (at least 0); afterwards it has, if ``add``."""
    table, mask = step.seen, step.seen_size - 1
    i = (value * _SPREAD >> 32) & mask
    while True:
        there = table[i]
        if there == value:
            return True
        if there < 0:
            if add:
                table[i] = value
            return False
        i = (i + 1) & mask


@kernel
def _cache_row(step, q, window, token, page_rows):
    """The cache row of a window whose last token this is, -1 for none, -2 if the table does not have it."""
    mapping, table = step.mapping.to, step.table.to
    if mapping:
        return mapping[token]
    if not table:
        return -1
    page, width = window // page_rows, step.table.width
    if page >= width:
        return -2
    entry = table[q * width + page]
    return -2 if entry < 0 or entry > _LARGEST // page_rows - 1 else entry * page_rows + window - page * page_rows


@kernel
def _has_pages(step, job, q, low, high):
    """Whether all pages of positions low .. high - 1 of a request are there."""
    if low >= high:
        return True
    table, width = step.state_table.to, step.state_table.width
    tokens, pages = job.page_tokens, job.blocks
    last = (high - 1) // tokens
    if last >= width:
        return False
    for i in range(low // tokens, last + 1):
        entry = table[q * width + i]
        if entry < 0 or entry >= pages:
            return False
    return True


@inlined
def _page_row(step, job, q, position):
    """The state row of a position whose page is there."""
    table, width = step.state_table.to, step.state_table.width
    rows = job.block_rows
    return table[q * width + position // job.page_tokens] * rows + position % rows


@kernel
def _windows(step, job):
    """Write window_request, window_index and window_slot [E each] and what they reach."""
    requests, page_rows = step.start.rows, job.page_rows
    bounds, starts = step.query_start.to, step.start.to
    out, count, ratio = job.window_fields, job.windows, job.ratio
    _forget(step)
    e, largest, lowest, highest, shared = 0, -1, _LARGEST, -1, False
    for q in range(requests):
        start, token = starts[q], bounds[q]
        length = bounds[q + 1] - token
        if start < 0 or length <= 0:
            continue
        first, last, _ = _span(job, start, length, 0)
        if e + last - first > count:
            return False
        for window in range(first, last):
            slot = _cache_row(step, q, window, token + (window + 1) * ratio - 1 - start, page_rows)
            if slot < -1:
                return False
            out[e] = q
            out[count + e] = window
            out[2 * count + e] = slot
            e += 1
            largest, lowest, highest = larger(largest, window), smaller(lowest, slot), larger(highest, slot)
            if slot >= 0 and _seen(step, slot, True):
                shared = True
    job.last_window = largest
    job.lowest = lowest if e else -1
    job.highest = highest
    job.shared = 1 if shared else 0
    return e == count


@kernel
def _keeps(step, job):
    """Write keep_token, keep_request, keep_position and keep_row [K each], no row twice, and whether one overwrites."""
    requests, kind, rows = step.start.rows, job.kind, job.block_rows
    bounds, starts = step.query_start.to, step.start.to
    drafts, slots = step.draft.to, step.slots.to
    out, count, ratio, halves = job.keep_fields, job.keeps, job.ratio, job.halves
    paged = kind == jobs.PAGED
    if kind != jobs.STATELESS and not (step.state_table.to if paged else slots):
        return False
    _forget(step)
    k, overwrites = 0, False
    for q in range(requests):
        start, token = starts[q], bounds[q]
        length = bounds[q + 1] - token
        if start < 0 or length <= 0 or kind == jobs.STATELESS:
            continue
        first, last, low = _span(job, start, length, drafts[q])
        end, oldest, row = start + length, _live_start(first, ratio, halves), 0
        if k + end - low > count:
            return False
        if paged:
            if not (_has_pages(step, job, q, oldest, start) and _has_pages(step, job, q, low, end)):
                return False
        else:
            slot = slots[q]
            if slot < 0 or slot >= job.blocks or _seen(step, slot, True):
                return False
            row = slot * rows + low % larger(rows, 1)
            far = oldest < start and end - oldest > rows  # else no stored row is read
            overwrites = overwrites or (kind == jobs.RING and last > first and far)
        for position in range(low, end):
            if paged:
                row = _page_row(step, job, q, position)
                if _seen(step, row, True):
                    return False
            out[k] = token + position - start
            out[count + k] = q
            out[2 * count + k] = position
            out[3 * count + k] = row
            k += 1
            if not paged:
                row += 1
                if row == (slots[q] + 1) * rows:
                    row -= rows
    if paged and job.windows:
        overwrites = _reads_kept(step, job)
    job.overwrites = 1 if overwrites else 0
    return k == count


@kernel
def _reads_kept(step, job):
    """Whether a row that a request goes on from is one of the kept rows, which the hash table has."""
    bounds, starts = step.query_start.to, step.start.to
    ratio, halves = job.ratio, job.halves
    for q in range(step.start.rows):
        start = starts[q]
        if start < 0 or bounds[q + 1] == bounds[q]:
            continue
        for position in range(_live_start(start // ratio, ratio, halves), start):
            if _seen(step, _page_row(step, job, q, position), False):
                return True
    return False


@kernel
def _step(step):
    if not step.fill and not _batch(step):
        return False
    for i in range(step.count):
        job = step.jobs[i]
        if step.fill:
            good = _windows(step, job) and _keeps(step, job)
        else:
            good = _count(step, job)
        if not good:
            return False
    return True


@functions.entry
def entry(p):
    """Take a batch and count its plans, or fill them."""
    step = _step_at(p)
    step.status = 0 if _step(step) else 1
