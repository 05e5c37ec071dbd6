"""A step's metadata in Numba: the batch's own copy, checked, then the plan of each ratio. One thread, time linear.

Entered twice: without OUT it takes the batch and counts, so that the host can allocate; then it fills the plans from
the batch's copy, which nobody else writes. Whatever the builders in torch raise for ends in STATUS 1 and no more: they
are asked to raise it.
"""

from __future__ import annotations

from llvmlite import ir
from numba import cfunc, types

from kvcondense.backends.cpu import plan_params as params
from kvcondense.backends.cpu.kernels.pool import inlined, kernel
from kvcondense.backends.cpu.kernels.simd import operation, pointer, read, write

_I64, _LARGEST = ir.IntType(64), 2**63 - 1
_SPREAD = 0x9E3779B97F4A7C15 - 2**64
"""An odd number whose products have well mixed high bits."""


@operation(types.int64, types.int64)
def _load_i32(b, address):
    """One int32, widened."""
    return b.sext(b.load(pointer(b, address, ir.IntType(32)), align=4), _I64)


@operation(types.int64, types.int64, types.int64)
def _at(b, base, i):
    """Integer i of a list."""
    return read(b, _entry(b, base, i), _I64, 8)


@operation(types.void, types.int64, types.int64, types.int64)
def _put(b, base, i, x):
    """Write integer i of a list."""
    write(b, _entry(b, base, i), x, 8)


@operation(types.int64, types.int64, types.int64)
def _from(b, base, i):
    """The list that begins at integer i of another."""
    return _entry(b, base, i)


def _entry(b, base, i):
    return b.add(base, b.mul(i, ir.Constant(_I64, 8)))


@kernel
def _take(column):
    """Copy a column, widened, row by row."""
    base, rows, width, size = (_at(column, params.FROM), _at(column, params.ROWS), _at(column, params.WIDTH),
                               _at(column, params.BYTES))  # fmt: skip
    row_stride, stride, to = _at(column, params.ROW_STRIDE), _at(column, params.STRIDE), _at(column, params.TO)
    if width == 1:
        rows, width, stride = 1, rows, row_stride
    for i in range(rows):
        source = base + size * row_stride * i
        if size == 8:
            for j in range(width):
                _put(to, j, _at(source, stride * j))
        else:
            for j in range(width):
                _put(to, j, _load_i32(source + 4 * stride * j))
        to += 8 * width


@kernel
def _least(column):
    """The lowest entry of a column, 0 if all are higher."""
    low, to = 0, _at(column, params.TO)
    for i in range(_at(column, params.ROWS)):
        low = min(low, _at(to, i))
    return low


@kernel
def _columns(p):
    """Whether the columns that there are belong together; then the batch has them, and says where."""
    requests = _at(p, params.QUERY_START + params.ROWS) - 1
    for i in range(7):
        column = _from(p, params.HEAD_SIZE + params.COLUMN_SIZE * i)
        rows = _at(column, params.ROWS)
        per_request = i != 0 and i != 5
        if (rows < 0 and i < 3) or (rows >= 0 and per_request and rows != requests):
            return False
        # 0 says that there is none; an empty one may lie anywhere else.
        _put(column, params.TO, 0 if rows < 0 else max(1, _at(p, params.BASE) + _at(column, params.TO)))
        if _at(column, params.BYTES):
            _take(column)
    both = _at(p, params.SLOTS + params.TO) and _at(p, params.STATE_TABLE + params.TO)
    return requests >= 0 and not both and not (_at(p, params.MAPPING + params.TO) and _at(p, params.TABLE + params.TO))


@kernel
def _batch(p):
    """Take the columns and check them against each other; False if anything is irregular."""
    if not _columns(p):
        return False
    requests = _at(p, params.START + params.ROWS)
    bounds, starts = _at(p, params.QUERY_START + params.TO), _at(p, params.START + params.TO)
    drafts, slots = _at(p, params.DRAFT + params.TO), _at(p, params.SLOTS + params.TO)
    given, most, uniform = _at(p, params.START + params.BYTES) == 0, _at(p, params.MOST), _at(p, params.DRAFTS)
    if _at(bounds, 0) != 0:
        return False
    for q in range(requests):
        length = _at(bounds, q + 1) - _at(bounds, q)
        if slots and _at(slots, q) < 0:
            if _at(slots, q) != -1 or (given and _at(starts, q) >= 0):
                return False
            if not given:
                _put(starts, q, -1)
        if uniform >= 0:
            _put(drafts, q, min(uniform, length))
        start, draft = _at(starts, q), _at(drafts, q)
        if length < 0 or start < -1 or start > most - length or draft < 0 or draft > length:
            return False
    _put(p, params.TOKENS, _at(bounds, requests))
    if _at(p, params.MAPPING + params.TO):
        enough = _at(p, params.MAPPING + params.ROWS) >= _at(bounds, requests)
        return enough and _least(_from(p, params.MAPPING)) >= -1
    return True


@inlined
def _live_start(windows, ratio, halves):
    return max(0, (windows - (halves - 1)) * ratio)


@kernel
def _span(job, start, length, draft):
    """First window that ends in a request's tokens, the window behind the last one, and the first position kept."""
    ratio, halves, kind = _at(job, params.RATIO), _at(job, params.HALVES), _at(job, params.KIND)
    first = start // ratio
    behind = start - first * ratio + length
    last = first if behind < ratio else first + behind // ratio
    if kind == params.STATELESS:
        return first, last, start + length
    if kind == params.ONLINE:
        return first, last, start + length - draft
    if _at(job, params.KEEP_ALL):
        return first, last, start
    settled = last if draft == 0 else (start + length - draft) // ratio
    return first, last, max(start, _live_start(settled, ratio, halves))


@kernel
def _count(p, job):
    """Windows and kept rows of a plan; False if its state cannot take this step, or the table has too few pages.

    The latter before anything is allocated for each window that a batch claims to have.
    """
    table, page_rows = _at(p, params.TABLE + params.TO), _at(job, params.PAGE_ROWS)
    if table and page_rows == 0:
        return False
    requests = _at(p, params.START + params.ROWS)
    bounds, starts = _at(p, params.QUERY_START + params.TO), _at(p, params.START + params.TO)
    drafts = _at(p, params.DRAFT + params.TO)
    windows = keeps = most = 0
    for q in range(requests):
        start, length = _at(starts, q), _at(bounds, q + 1) - _at(bounds, q)
        if start >= 0 and length > 0:
            first, last, low = _span(job, start, length, _at(drafts, q))
            if table and last > first and (last - 1) // page_rows >= _at(p, params.TABLE + params.WIDTH):
                return False
            windows += last - first
            keeps += start + length - low
            most = max(most, _at(drafts, q))
    _put(job, params.WINDOWS, windows)
    _put(job, params.KEEPS, keeps)
    kind, rows, halves = _at(job, params.KIND), _at(job, params.BLOCK_ROWS), _at(job, params.HALVES)
    if kind == params.ONLINE:
        return halves == 1 and most <= rows
    if kind == params.RING or (kind == params.PAGED and _at(job, params.PAGE_TOKENS) > rows):
        return rows >= halves * _at(job, params.RATIO) - 1 + max(1, most)
    return True


@kernel
def _forget(p):
    table = _at(p, params.SEEN)
    for i in range(_at(p, params.SEEN_SIZE)):
        _put(table, i, -1)


@kernel
def _seen(p, value, add):
    """Whether the hash table has a value (at least 0); afterwards it has, if ``add``."""
    table, mask = _at(p, params.SEEN), _at(p, params.SEEN_SIZE) - 1
    i = (value * _SPREAD >> 32) & mask
    while True:
        there = _at(table, i)
        if there == value:
            return True
        if there < 0:
            if add:
                _put(table, i, value)
            return False
        i = (i + 1) & mask


@kernel
def _cache_row(p, q, window, token, page_rows):
    """The cache row of a window whose last token this is, -1 for none, -2 if the table does not have it."""
    mapping, table = _at(p, params.MAPPING + params.TO), _at(p, params.TABLE + params.TO)
    if mapping:
        return _at(mapping, token)
    if not table:
        return -1
    page, width = window // page_rows, _at(p, params.TABLE + params.WIDTH)
    if page >= width:
        return -2
    entry = _at(table, q * width + page)
    return -2 if entry < 0 or entry > _LARGEST // page_rows - 1 else entry * page_rows + window - page * page_rows


@kernel
def _has_pages(p, job, q, low, high):
    """Whether all pages of positions low .. high - 1 of a request are there."""
    if low >= high:
        return True
    table, width = _at(p, params.STATE_TABLE + params.TO), _at(p, params.STATE_TABLE + params.WIDTH)
    tokens, pages = _at(job, params.PAGE_TOKENS), _at(job, params.BLOCKS)
    last = (high - 1) // tokens
    if last >= width:
        return False
    for i in range(low // tokens, last + 1):
        entry = _at(table, q * width + i)
        if entry < 0 or entry >= pages:
            return False
    return True


@inlined
def _page_row(p, job, q, position):
    """The state row of a position whose page is there."""
    table, width = _at(p, params.STATE_TABLE + params.TO), _at(p, params.STATE_TABLE + params.WIDTH)
    rows = _at(job, params.BLOCK_ROWS)
    return _at(table, q * width + position // _at(job, params.PAGE_TOKENS)) * rows + position % rows


@kernel
def _windows(p, job, out):
    """Write window_request, window_index and window_slot [E each] and what they reach."""
    requests, page_rows = _at(p, params.START + params.ROWS), _at(job, params.PAGE_ROWS)
    bounds, starts = _at(p, params.QUERY_START + params.TO), _at(p, params.START + params.TO)
    count, ratio = _at(job, params.WINDOWS), _at(job, params.RATIO)
    _forget(p)
    e, largest, lowest, highest, shared = 0, -1, _LARGEST, -1, False
    for q in range(requests):
        start, token = _at(starts, q), _at(bounds, q)
        length = _at(bounds, q + 1) - token
        if start < 0 or length <= 0:
            continue
        first, last, _ = _span(job, start, length, 0)
        if e + last - first > count:
            return False
        for window in range(first, last):
            slot = _cache_row(p, q, window, token + (window + 1) * ratio - 1 - start, page_rows)
            if slot < -1:
                return False
            _put(out, e, q)
            _put(out, count + e, window)
            _put(out, 2 * count + e, slot)
            e += 1
            largest, lowest, highest = max(largest, window), min(lowest, slot), max(highest, slot)
            if slot >= 0 and _seen(p, slot, True):
                shared = True
    _put(job, params.LAST_WINDOW, largest)
    _put(job, params.LOWEST, lowest if e else -1)
    _put(job, params.HIGHEST, highest)
    _put(job, params.SHARED, 1 if shared else 0)
    return e == count


@kernel
def _keeps(p, job, out):
    """Write keep_token, keep_request, keep_position and keep_row [K each], no row twice, and whether one overwrites."""
    requests, kind, rows = _at(p, params.START + params.ROWS), _at(job, params.KIND), _at(job, params.BLOCK_ROWS)
    bounds, starts = _at(p, params.QUERY_START + params.TO), _at(p, params.START + params.TO)
    drafts, slots = _at(p, params.DRAFT + params.TO), _at(p, params.SLOTS + params.TO)
    count, ratio, halves = _at(job, params.KEEPS), _at(job, params.RATIO), _at(job, params.HALVES)
    paged = kind == params.PAGED
    if kind != params.STATELESS and not (_at(p, params.STATE_TABLE + params.TO) if paged else slots):
        return False
    _forget(p)
    k, overwrites = 0, False
    for q in range(requests):
        start, token = _at(starts, q), _at(bounds, q)
        length = _at(bounds, q + 1) - token
        if start < 0 or length <= 0 or kind == params.STATELESS:
            continue
        first, last, low = _span(job, start, length, _at(drafts, q))
        end, oldest, row = start + length, _live_start(first, ratio, halves), 0
        if k + end - low > count:
            return False
        if paged:
            if not (_has_pages(p, job, q, oldest, start) and _has_pages(p, job, q, low, end)):
                return False
        else:
            slot = _at(slots, q)
            if slot < 0 or slot >= _at(job, params.BLOCKS) or _seen(p, slot, True):
                return False
            row = slot * rows + low % max(rows, 1)
            overwrites = overwrites or (kind == params.RING and last > first and end - oldest > rows)
        for position in range(low, end):
            if paged:
                row = _page_row(p, job, q, position)
                if _seen(p, row, True):
                    return False
            _put(out, k, token + position - start)
            _put(out, count + k, q)
            _put(out, 2 * count + k, position)
            _put(out, 3 * count + k, row)
            k += 1
            if not paged:
                row += 1
                if row == (_at(slots, q) + 1) * rows:
                    row -= rows
    if paged and _at(job, params.WINDOWS):
        overwrites = _reads_kept(p, job)
    _put(job, params.OVERWRITES, 1 if overwrites else 0)
    return k == count


@kernel
def _reads_kept(p, job):
    """Whether a row that a request goes on from is one of the kept rows, which the hash table has."""
    bounds, starts = _at(p, params.QUERY_START + params.TO), _at(p, params.START + params.TO)
    ratio, halves = _at(job, params.RATIO), _at(job, params.HALVES)
    for q in range(_at(p, params.START + params.ROWS)):
        start = _at(starts, q)
        if start < 0 or _at(bounds, q + 1) == _at(bounds, q):
            continue
        for position in range(_live_start(start // ratio, ratio, halves), start):
            if _seen(p, _page_row(p, job, q, position), False):
                return True
    return False


@kernel
def _step(p):
    out = _at(p, params.OUT)
    if not out and not _batch(p):
        return False
    for i in range(_at(p, params.COUNT)):
        job = _from(p, params.JOBS + params.JOB_SIZE * i)
        if not out:
            if not _count(p, job):
                return False
            continue
        windows = _at(job, params.WINDOWS)
        if not _windows(p, job, out) or not _keeps(p, job, out + 24 * windows):
            return False
        out += 24 * windows + 32 * _at(job, params.KEEPS)
    return True


@cfunc("void(int64)", error_model="numpy")
def entry(p):
    """Take a batch and count its plans, or fill them."""
    _put(p, params.STATUS, 0 if _step(p) else 1)
