"""Stage 2 in Numba: where the candidates of a window lie, and which rows the state keeps. Tokens are read in place."""

from __future__ import annotations

from kvcondense.backends.cpu import params
from kvcondense.backends.cpu.kernels import simd
from kvcondense.backends.cpu.kernels.pool import ENTRY, inlined, kernel
from kvcondense.backends.cpu.kernels.row import bf16_code, round_bf16
from kvcondense.backends.cpu.kernels.simd import LANES, load, load_i64, store, store_i64


@inlined
def load_as(kind, base, channel):
    """16 channels of a row of this element kind."""
    if kind == params.FP32:
        return load(base + 4 * channel)
    if kind == params.BF16:
        return simd.load_bf16(base + 2 * channel)
    return simd.load_fp16(base + 2 * channel)


@inlined
def _size(kind):
    return 4 if kind == params.FP32 else 2


@kernel
def state_row(p, q, position):
    """Address of the state row (or log row) of a position."""
    table = load_i64(p + 8 * params.STATE_TABLE) + 8 * q * load_i64(p + 8 * params.STATE_TABLE_STRIDE)
    if load_i64(p + 8 * params.PAGED):
        page = load_i64(table + 8 * (position // load_i64(p + 8 * params.STATE_TOKENS)))
    else:
        page = load_i64(table)
    return _row(p, page, position % load_i64(p + 8 * params.STATE_PAGE))


@kernel
def _row(p, page, row):
    """Address of a row of a slot or page."""
    rows = load_i64(p + 8 * params.STATE) + page * load_i64(p + 8 * params.STATE_PAGE_STRIDE)
    return rows + row * load_i64(p + 8 * params.STATE_STRIDE)


@kernel
def candidates(p, q, begin, end, current, table, zero):
    """Fill the table with positions begin .. end - 1 of request q; returns how many of them come from the state.

    Positions from ``current`` on read the last channels, earlier ones (the window before, with overlap) the first.
    Addresses are those of channel 0; entries of rows that are not fp32 are only good for ``stage``.
    """
    spec = load_i64(p + 8 * params.SPEC)
    ratio, width = load_i64(spec + 8 * params.RATIO), load_i64(spec + 8 * params.WIDTH)
    gate = load_i64(spec + 8 * params.HAS_GATE)
    biased = gate and not load_i64(p + 8 * params.STATE_RAW)
    late = width - load_i64(spec + 8 * params.HEAD_DIM)
    start = load_i64(load_i64(p + 8 * params.START) + 8 * q)
    first_token = load_i64(load_i64(p + 8 * params.QUERY_START) + 8 * q) - start
    kv_score, stride = load_i64(p + 8 * params.KV_SCORE), load_i64(p + 8 * params.KV_STRIDE)
    ape = load_i64(p + 8 * params.APE)
    size, state_size = _size(load_i64(p + 8 * params.KV_KIND)), _size(load_i64(p + 8 * params.STATE_KIND))
    phase = begin % ratio
    for position in range(begin, end):
        channel = late if position >= current else 0
        bias = ape + 4 * (phase * width + channel) if ape else zero
        phase = phase + 1 if phase + 1 < ratio else 0
        if position >= start:
            kv = kv_score + (first_token + position) * stride + size * channel
            score = kv + size * width
        else:
            kv = state_row(p, q, position) + state_size * channel
            score = kv + state_size * width
            if biased:  # a stored score has its ape
                bias = zero
        store_i64(table, kv)
        store_i64(table + 8, score if gate else zero)
        store_i64(table + 16, bias)
        table += ENTRY
    return min(max(start - begin, 0), end - begin)


@kernel
def stage(p, n, stored, table, staged, channel, channels, buffer, zero):
    """Widen ``channels`` channels of the table's n rows into ``buffer`` and make ``staged`` their table.

    The first ``stored`` rows come from the state. Tokens are rounded to the state's type, as if they had been there.
    """
    spec = load_i64(p + 8 * params.SPEC)
    gate = load_i64(spec + 8 * params.HAS_GATE)
    state_kind = load_i64(p + 8 * params.STATE_KIND)
    rounding = state_kind == params.BF16 and load_i64(p + 8 * params.STATE) != 0
    raw = gate and load_i64(p + 8 * params.STATE_RAW)
    for j in range(n):
        kind = state_kind if j < stored else load_i64(p + 8 * params.KV_KIND)
        kv, score, bias = load_i64(table), load_i64(table + 8), load_i64(table + 16)
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
        store_i64(staged, buffer)
        store_i64(staged + 8, buffer + 4 * channels)
        store_i64(staged + 16, zero)
        buffer += 8 * channels
        table += ENTRY
        staged += ENTRY


@kernel
def keep(p, k):
    """Write entry k of the plan's rows to keep: [kv | score + ape], or [kv | score], of its token to its state row."""
    token = load_i64(load_i64(p + 8 * params.KEEP_TOKEN) + 8 * k)
    if token < 0:
        return
    spec = load_i64(p + 8 * params.SPEC)
    width, gate = load_i64(spec + 8 * params.WIDTH), load_i64(spec + 8 * params.HAS_GATE)
    ape, kind = load_i64(p + 8 * params.APE), load_i64(p + 8 * params.KV_KIND)
    bias_wanted = ape and not load_i64(p + 8 * params.STATE_RAW)
    row = load_i64(load_i64(p + 8 * params.KEEP_ROW) + 8 * k)
    page_rows = load_i64(p + 8 * params.STATE_PAGE)
    target = _row(p, row // page_rows, row % page_rows)
    source = load_i64(p + 8 * params.KV_SCORE) + token * load_i64(p + 8 * params.KV_STRIDE)
    narrow = load_i64(p + 8 * params.STATE_KIND) == params.BF16
    for c in range(0, width, LANES):
        _put(target, c, load_as(kind, source, c), narrow)
    if gate:
        position = load_i64(load_i64(p + 8 * params.KEEP_POSITION) + 8 * k)
        bias = ape + 4 * width * (position % load_i64(spec + 8 * params.RATIO))
        for c in range(0, width, LANES):
            z = load_as(kind, source, width + c)
            if bias_wanted:
                z = z + load(bias + 4 * c)
            _put(target, width + c, z, narrow)


@inlined
def _put(target, channel, x, narrow):
    if narrow:
        simd.store_16(target + 2 * channel, bf16_code(x))
    else:
        store(target + 4 * channel, x)
