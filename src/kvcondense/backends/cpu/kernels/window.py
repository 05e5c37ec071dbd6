"""Stage 2 in Numba: where the candidates of a window lie, how they are read, and which rows the state keeps."""

from __future__ import annotations

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import pool, simd
from kvcondense.backends.cpu.kernels.ahead import table_at
from kvcondense.backends.cpu.kernels.bf16 import bf16_code, load_bf16, round_bf16
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.integers import larger, smaller
from kvcondense.backends.cpu.kernels.simd import LANES, load, store
from kvcondense.backends.cpu.params import CHANNELS, ENTRY, GROUP, STAGED


@inlined
def load_as(kind, base, channel):
    """A vector of channels of a row of this element kind."""
    if kind == params.FP32:
        return load(base + 4 * channel)
    if kind == params.BF16:
        return load_bf16(base + 2 * channel)
    return simd.load_fp16(base + 2 * channel)


@inlined
def _size(kind):
    return 4 if kind == params.FP32 else 2


@inlined
def in_fp32(call, stored):
    """Whether rows, of which the first ``stored`` come from the state, are of fp32."""
    return (call.layer.state_kind if stored > 0 else call.kv_kind) == params.FP32


@inlined
def channels(call, block):
    """The bytes of fp32 channels, first .. last - 1, of one of the blocks that windows are pooled in."""
    parts = call.layer.spec.head_dim // CHANNELS
    return 4 * CHANNELS * (parts * block // call.blocks), 4 * CHANNELS * (parts * (block + 1) // call.blocks)


@kernel
def state_row(call, q, position):
    """Address of the state row (or log row) of a position."""
    entry = q * call.plan.state_table_stride
    if call.plan.paged:
        entry += position // call.plan.state_page_tokens
    return _row(call, call.plan.state_table[entry], position % call.plan.state_page_rows)


@kernel
def _row(call, page, row):
    """Address of a row of a slot or page."""
    rows = call.layer.state + page * call.layer.state_page_stride
    return rows + row * call.layer.state_stride


@kernel
def candidates(call, q, begin, end, current, room, address):
    """Fill the table at ``address`` with positions begin .. end - 1 of request q; returns how many come from the state.

    Positions from ``current`` on read the last channels, earlier ones (the window before, with overlap) the first.
    Entries are addresses of channel 0; up to a whole group, empty candidates follow.
    """
    table, zero = table_at(address), room.zeros
    spec = call.layer.spec
    ratio, width = spec.ratio, spec.width
    gate = spec.has_gate
    biased = gate and not call.layer.state_raw
    late = width - spec.head_dim
    start = call.plan.start[q]
    if call.stored:
        start = end
    first_token = call.plan.query_start[q] - start
    kv_score, stride = call.kv_score, call.kv_stride
    ape = call.layer.ape
    size, state_size = _size(call.kv_kind), _size(call.layer.state_kind)
    phase = begin % ratio
    for position in range(begin, end):
        channel = late if position >= current else 0
        bias = ape + 4 * (phase * width + channel) if ape else zero
        phase = phase + 1 if phase + 1 < ratio else 0
        if position >= start:
            kv = kv_score + (first_token + position) * stride + size * channel
            score = kv + size * width
        else:
            kv = state_row(call, q, position) + state_size * channel
            score = kv + call.layer.state_score
            if biased:  # a stored score has its ape
                bias = zero
        candidate = table[position - begin]
        candidate.kv = kv
        candidate.score = score if gate else zero
        candidate.bias = bias
    pool.pad(address, end - begin, zero, room.nothing)
    return smaller(larger(start - begin, 0), end - begin)


@kernel
def in_order(call, e, address, room):
    """List what window e, whose candidates are tokens at ``address``, adds to the rows that the window before reads.

    Of an overlapping window that is its own tokens, both halves of their channels: the first half is what the next
    window reads. So memory is asked for in the order in which it lies, not by half rows from two places: the first half
    of it stands as kv, for the pool to ask for, the second as scores, for what finishes a row.
    """
    spec = call.layer.spec
    ratio = spec.ratio
    half = _size(call.kv_kind) * (spec.width - spec.head_dim)
    own = address + ENTRY * (smaller(spec.window, (call.plan.window_index[e] + 1) * ratio) - ratio)
    table, lines = table_at(own), table_at(room.lines)
    for k in range(2 * ratio):  # rows of kv and of scores by turns
        row = table[k // 2].score if k % 2 else table[k // 2].kv
        early, late = lines[2 * (k % ratio)], lines[2 * (k % ratio) + 1]
        if k < ratio:
            early.kv = row - half
            late.kv = row
        else:
            early.score = row - half
            late.score = row
    pool.pad(room.lines, 2 * ratio, room.zeros, room.nothing)
    return room.lines


@inlined
def _narrow(call):
    """Whether there is a bf16 state, through whose type tokens pass as if they had been there."""
    return call.layer.state_kind == params.BF16 and call.layer.state != 0


@inlined
def _of_tokens(call):
    """How rows of the call are read: FP32, BF16, BF16_ROUNDED or WIDENED."""
    kind, gate = call.kv_kind, call.layer.spec.has_gate
    if kind == params.BF16 and gate:
        return params.BF16_ROUNDED if _narrow(call) and not call.layer.state_raw else params.BF16
    return params.FP32 if kind == params.FP32 and not _narrow(call) else params.WIDENED


@inlined
def _of_state(call):
    """How rows of the state are read."""
    if not _narrow(call):
        return params.FP32
    return params.BF16 if call.layer.spec.has_gate else params.WIDENED


@inlined
def _is_bf16(reading):
    return reading == params.BF16 or reading == params.BF16_ROUNDED


@inlined
def _reading(call, n, stored):
    """How n rows are read of which the first ``stored`` come from the state."""
    tokens, rows = _of_tokens(call), _of_state(call)
    if stored <= 0 or tokens == rows:
        return tokens
    if stored >= n:
        return rows
    # A stored score is a bf16 already: rounding it again changes nothing.
    return params.BF16_ROUNDED if _is_bf16(tokens) and _is_bf16(rows) else params.WIDENED


@kernel
def pooled(call, n, stored, table, following, begin, end, room, out):
    """P of the n candidates at ``table`` for channel bytes begin .. end - 1, to out + begin ...

    The first ``stored`` come from the state. ``following``: a table of the rows to ask for while the last are pooled.
    """
    span = end - begin
    for index in range((n + GROUP - 1) // GROUP):
        first = GROUP * index
        here, ahead = table + ENTRY * first, table + ENTRY * (first + GROUP)
        if first + GROUP >= n:
            ahead = following
        kind = _reading(call, GROUP, stored - first)
        if kind != params.WIDENED:
            pool.group(kind, index, n, here, ahead, begin, end, room.work, span, out)
            continue
        many = smaller(n - first, GROUP)
        pool.pad(room.copied, many, room.zeros, room.nothing)
        for at in range(begin, end, 4 * STAGED):
            size = smaller(4 * STAGED, end - at)
            widen(call, many, stored - first, here, at // 4, size // 4, room)
            target = room.work + at - begin
            pool.group(params.FP32, index, n, room.copied, room.copied, 0, size, target, span, out + at)


@kernel
def fold(call, n, logged, first, last, room):
    """Fold the n candidates of the room's table into (m, l, o) at its ``work``."""
    row_bytes = 4 * call.layer.spec.head_dim
    for j in range(0, n, GROUP):
        count, here = smaller(GROUP, n - j), room.table + ENTRY * j
        if _of_tokens(call) == params.FP32:
            pool.fold(table_at(here), count, first, last, room.work, row_bytes)
            continue
        for at in range(first, last, 4 * STAGED):
            size = smaller(4 * STAGED, last - at)
            widen(call, count, logged - j, here, at // 4, size // 4, room)
            pool.fold(table_at(room.copied), count, 0, size, room.work + at, row_bytes)


@kernel
def widen(call, n, stored, address, channel, channels, room):
    """Copy ``channels`` channels of the n rows at a table to the room, in fp32, and list them in its ``copied``.

    The first ``stored`` rows come from the state. Tokens are rounded to the state's type, as if they had been there.
    """
    spec = call.layer.spec
    gate, zero = spec.has_gate, room.zeros
    state_kind = call.layer.state_kind
    rounding = _narrow(call)
    raw = gate and call.layer.state_raw
    table, copied, buffer = table_at(address), table_at(room.copied), room.copies
    for j in range(n):
        kind = state_kind if j < stored else call.kv_kind
        kv, score, bias = table[j].kv, table[j].score, table[j].bias
        for c in range(0, channels, LANES):
            x = load_as(kind, kv, channel + c)
            if rounding:
                x = round_bf16(x)
            store(buffer + 4 * c, x)
            z = load_as(kind if gate else params.FP32, score, channel + c if gate else 0)
            if raw and rounding:
                z = round_bf16(z)
            z = z + load(bias + (4 * (channel + c) if bias != zero else 0))
            if rounding and gate and not raw:
                z = round_bf16(z)
            store(buffer + 4 * (channels + c), z)
        candidate = copied[j]
        candidate.kv = buffer
        candidate.score = buffer + 4 * channels
        candidate.bias = zero
        buffer += 8 * channels


@kernel
def keep(call, k):
    """Write entry k of the plan's rows to keep: [kv | score + ape], or [kv | score], of its token to its state row."""
    token = call.plan.keep_token[k]
    if token < 0:
        return
    spec = call.layer.spec
    width, gate = spec.width, spec.has_gate
    ape, kind = call.layer.ape, call.kv_kind
    bias_wanted = ape and not call.layer.state_raw
    row = call.plan.keep_row[k]
    page_rows = call.plan.state_page_rows
    target = _row(call, row // page_rows, row % page_rows)
    source = call.kv_score + token * call.kv_stride
    narrow = call.layer.state_kind == params.BF16
    for c in range(0, width, LANES):
        _put(target, c, load_as(kind, source, c), narrow)
    if gate:
        position = call.plan.keep_position[k]
        bias = ape + 4 * width * (position % spec.ratio)
        target += call.layer.state_score
        for c in range(0, width, LANES):
            z = load_as(kind, source, width + c)
            if bias_wanted:
                z = z + load(bias + 4 * c)
            _put(target, c, z, narrow)


@inlined
def _put(target, channel, x, narrow):
    if narrow:
        simd.store_16(target + 2 * channel, bf16_code(x))
    else:
        store(target + 4 * channel, x)
