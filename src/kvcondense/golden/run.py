"""Run a golden case: the decode reference on one side, a backend through the public API on the other, then compare."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from kvcondense.api import compress, condense, project
from kvcondense.backends import Backend, get_backend
from kvcondense.formats import CacheFormat
from kvcondense.golden import pages
from kvcondense.golden.compare import Comparator, Comparison, allclose, row_bounds, same_bytes
from kvcondense.golden.decode import DecodeCompressor
from kvcondense.golden.inputs import GoldenInputs
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import FP32_LOWEST
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights

TENSOR_SCALE = 0.05
"""Scale of a golden run in formats that have one for the whole cache; rows of unit RMS stay below 448 times that."""
CANARY = 0xA5
"""What the bytes of a quantised cache hold before the run; those that nobody owns must hold it afterwards."""


def comparators(inputs: GoldenInputs) -> dict[str, Comparator]:
    """The bounds of each output: states as in PR 270, rows without its outlier budget, bytes exact.

    With history 99 % of a bf16 cache's bits must be equal: another order of the projection's sum flips 0.03 %, some of
    1024 elements on one processor and none on the next; a rounding that is missing, 26 %. Not after a rotation: PR
    270's Hadamard is a bf16 matrix, off by 1e-4, where kvcondense scales butterflies in fp32. A quantised cache is read
    back and compared with the reference's row before quantisation: half a step more, and twice that where a flip
    doubles a scale.
    """
    spec, fmt = inputs.spec, inputs.format
    states, rows = allclose(atol=1e-3, rtol=1e-3), row_bounds(spec)
    history = max(h.shape[0] for h in inputs.x_history) >= 2 * spec.window
    cache = row_bounds(spec, 0.99 if history and not spec.rotate else 0.0)
    if fmt.name != "bf16":
        scale = torch.tensor(TENSOR_SCALE) if fmt.tensor_scale else None

        def step(expected: torch.Tensor) -> torch.Tensor:
            flat = expected.flatten(0, -2)
            return 2 * fmt.error_bound(flat, fmt.encode(flat, scale), scale).view(expected.shape)

        cache = row_bounds(spec, quantisation=step)
    batch, rows_per_page, d = inputs.kv_cache.shape
    bytes_of = same_bytes(functools.partial(name_byte, fmt, d, rows_per_page, batch))
    return {"kv": rows, "kv_state": states, "score_state": states, "kv_cache": cache, "kv_bytes": bytes_of}


def rules(inputs: GoldenInputs) -> dict[str, str]:
    """What ``comparators`` allow each element of an output, in words; e: the reference's."""
    spec, fmt = inputs.spec, inputs.format
    rows = "1e-3 + 1e-3 |e|, two bf16 steps of e, "
    rows += "or 2^-7 of the row's RMS" if spec.rotate else "or, on RoPE channels, 3.3 * 2^-8 of the pair's length"
    cache = rows if fmt.name == "bf16" else f"{rows}, and two steps of {fmt.name}"
    states = "1e-3 + 1e-3 |e|"
    return {"kv": rows, "kv_state": states, "score_state": states, "kv_cache": cache, "kv_bytes": "nothing"}


@dataclass(frozen=True)
class GoldenOutputs:
    """Outputs in PR 270's layout: kv [B, 1, d] fp32 (0 if no window ends), states [B, c * r, N], kv_cache bf16.

    For a quantised format kv_cache is fp32: the reference's row, and what a reader gets from the backend's bytes.
    kv_bytes: all bytes of the cache, and what they must be given the rows that the backend returned.
    """

    kv: torch.Tensor
    kv_state: torch.Tensor
    score_state: torch.Tensor
    kv_cache: torch.Tensor
    kv_bytes: tuple[torch.Tensor, torch.Tensor] | None = None


def run_reference(inputs: GoldenInputs) -> GoldenOutputs:
    """Decode every row token by token with ``DecodeCompressor``."""
    spec = inputs.spec
    kv_out = torch.zeros(inputs.x.shape[0], 1, spec.head_dim)
    kv_state, score_state = inputs.kv_state.clone(), inputs.score_state.clone()
    kv_cache = inputs.kv_cache.to(_cache_dtype(inputs))
    wkv, wgate = inputs.wkv.float(), inputs.wgate.float()
    for b, start in enumerate(inputs.start_pos):
        decode = DecodeCompressor(spec, inputs.ape, inputs.norm_w, inputs.cos, inputs.sin, inputs.hadamard)
        x = torch.cat([inputs.x_history[b], inputs.x[b]]).float()  # [h + 1, D]
        kv, score = x @ wkv, x @ wgate  # [h + 1, N]
        row = None
        for i, position in enumerate(range(start - inputs.x_history[b].shape[0], start + 1)):
            row = decode.step(kv[i], score[i], position)
            if row is not None:
                kv_cache[b, position // spec.ratio] = row.to(_row_dtype(inputs)).to(kv_cache.dtype)
        if row is not None:
            kv_out[b, 0] = row
        kv_state[b], score_state[b] = decode.kv_state, decode.score_state
    return _comparable(inputs, GoldenOutputs(kv_out, kv_state, score_state, kv_cache))


def run_backend(inputs: GoldenInputs, impl: str | Backend) -> GoldenOutputs:
    """The same through ``project`` and ``condense``: history in three ragged chunks, then one decode step.

    A backend whose kernel projects (``from_hidden``) gets the hidden states, through ``compress``.
    """
    spec, batch = inputs.spec, inputs.x.shape[0]
    backend = get_backend(impl) if isinstance(impl, str) and impl != "auto" else impl
    weights = CompressorWeights.from_parts(inputs.wkv.t(), inputs.wgate.t(), inputs.ape, inputs.norm_w)
    rope = RopeTable(inputs.cos, inputs.sin)
    state = StatePool.ring(spec, batch)
    first = [s - h.shape[0] for s, h in zip(inputs.start_pos, inputs.x_history, strict=True)]
    _seed_empty(inputs, state, first)
    cache = _cache(inputs)
    done = [0] * batch
    kv = torch.zeros(batch, 1, spec.head_dim)
    returned: dict[int, torch.Tensor] = {}  # cache slot -> row

    def step(counts: list[int], x: torch.Tensor, drafts: int) -> None:
        starts = [f + n for f, n in zip(first, done, strict=True)]
        metadata = RaggedBatch.build(
            [0, *torch.tensor(counts).cumsum(0).tolist()],
            start_positions=starts,
            state_slots=list(range(batch)),
            block_table=[[b] for b in range(batch)],
            draft_rows=drafts,
        )
        if getattr(backend, "from_hidden", False):
            rows = compress(spec, x, weights, rope, metadata, state=state, cache=cache, impl=impl)
        else:
            kv_score = project(spec, x, weights)
            rows = condense(spec, kv_score, weights, rope, metadata, state=state, cache=cache, impl=impl)
        returned.update(zip(rows.slot.tolist(), rows.values, strict=True))
        if drafts:
            kv[rows.request, 0] = rows.values
        for b, n in enumerate(counts):
            done[b] += n

    for part in range(3):
        counts = [(h.shape[0] * (part + 1) // 3) - n for h, n in zip(inputs.x_history, done, strict=True)]
        chunk = [h[n : n + c] for h, n, c in zip(inputs.x_history, done, counts, strict=True)]
        if sum(counts):
            step(counts, torch.cat(chunk), drafts=0)
    # The last token is marked as one that may be rejected, so that its window stays in the state, as it does in
    # PR 270; otherwise nothing of a finished window is kept.
    step([1] * batch, inputs.x[:, 0], drafts=1)
    kv_state, score_state = _original_layout(inputs, state)
    expected = golden_bytes(_cache(inputs), returned, not spec.rounding.row)
    outputs = GoldenOutputs(kv, kv_state, score_state, _read(inputs, cache, returned), (all_bytes(cache), expected))
    return _comparable(inputs, outputs)


def golden_bytes(cache: PagedCache, rows: dict[int, torch.Tensor], exact: bool = False) -> torch.Tensor:
    """All bytes of ``cache`` once ``golden.pages`` has written rows [d] to their slots; ``cache`` is left alone.

    ``exact``: rows are quantised as they are, not their bf16.
    """
    cache = cache.copy()
    data, scales = cache.data, cache.scales
    target, name, scale = data.numpy(), cache.format.name, _tensor_scale(cache)
    for slot, row in rows.items():
        page, at = divmod(slot, cache.page_rows)
        first, second = _encoded(name, row.contiguous().view(torch.uint8).numpy().tobytes(), row.dtype, scale, exact)
        offsets = pages.place(name, cache.head_dim, cache.page_rows, at)
        if cache.format.scales_outside and not cache.format.tensor_scale:
            assert scales is not None
            scales[page, at] = torch.from_numpy(np.frombuffer(second, np.float32).copy())[0]
            second = b""
        if (beside := pages.second_bytes(name, cache.head_dim)) and cache.second is not None:
            cache.second.view(torch.uint8)[page, at] = torch.from_numpy(np.frombuffer(first[-beside:], np.uint8).copy())
            first = first[:-beside]
        for offset, part in zip(offsets, (first, second), strict=True):
            target[page, offset[: len(part)]] = np.frombuffer(part, np.uint8)
    return all_bytes(cache)


@functools.lru_cache(1024)
def _encoded(name: str, row: bytes, dtype: torch.dtype, scale: float, exact: bool) -> tuple[bytes, bytes]:
    """``pages.encode_row`` of a row's bytes; the kit, which tries many backends, asks for the same rows again."""
    return pages.encode_row(name, torch.frombuffer(bytearray(row), dtype=dtype), scale, exact)


def all_bytes(cache: PagedCache) -> torch.Tensor:
    """Bytes of the pages, one after the other, then those of what lies beside them."""
    return torch.cat([t.flatten().view(torch.uint8) for t in cache.memory])


def compare(inputs: GoldenInputs, actual: GoldenOutputs, expected: GoldenOutputs) -> dict[str, Comparison]:
    """Compare the outputs, in order; the bytes with those that follow from the rows of ``actual`` itself."""
    assert actual.kv_bytes is not None
    checks = comparators(inputs)
    bytes_of = checks.pop("kv_bytes")
    results = {name: c(getattr(actual, name), getattr(expected, name)) for name, c in checks.items()}
    return {**results, "kv_bytes": bytes_of(*actual.kv_bytes)}


def _cache(inputs: GoldenInputs) -> PagedCache:
    """The empty cache of a run: one page per row of the batch; bf16 is PR 270's tensor of zeros."""
    if inputs.format.name == "bf16":
        return PagedCache.wrap(inputs.kv_cache.clone())
    batch, rows, d = inputs.kv_cache.shape
    scale = TENSOR_SCALE if inputs.format.tensor_scale else None
    cache = PagedCache.allocate(d, batch, rows, format=inputs.format, tensor_scale=scale)
    cache.fill(CANARY)
    return cache


def _read(inputs: GoldenInputs, cache: PagedCache, written: dict[int, torch.Tensor]) -> torch.Tensor:
    """The cache as ``golden.pages`` reads it, [B, maxlen / r, d]; rows that nobody wrote are 0."""
    if inputs.format.name == "bf16":
        return cache.rows
    out = torch.zeros(inputs.kv_cache.shape)
    name, scale, data = cache.format.name, _tensor_scale(cache), cache.data.numpy()
    for slot in written:
        page, at = divmod(slot, cache.page_rows)
        offsets = pages.place(name, cache.head_dim, cache.page_rows, at)
        first, second = (data[page, places].tobytes() for places in offsets)
        if cache.scales is not None and not cache.format.tensor_scale:
            second = cache.scales[page, at].numpy().tobytes()
        if cache.second is not None:
            first += cache.second[page, at].view(torch.uint8).numpy().tobytes()
        out[page, at] = torch.from_numpy(pages.decode_row(name, first, second, scale))
    return out


def _tensor_scale(cache: PagedCache) -> float:
    return 1.0 if cache.tensor_scale is None else float(cache.tensor_scale)


def _cache_dtype(inputs: GoldenInputs) -> torch.dtype:
    return torch.bfloat16 if inputs.format.name == "bf16" else torch.float32


def _row_dtype(inputs: GoldenInputs) -> torch.dtype:
    kept = inputs.format.keeps_row(exact=not inputs.spec.rounding.row)
    return torch.float32 if kept else torch.bfloat16


def name_byte(fmt: CacheFormat, head_dim: int, page_rows: int, num_pages: int, byte: int) -> str:
    """Where byte ``byte`` of ``all_bytes`` lies."""
    page, offset = divmod(byte, fmt.page_bytes(head_dim, page_rows))
    if page >= num_pages:
        return "what lies beside the pages"
    return f"page {page} byte {offset} ({fmt.name_byte(head_dim, page_rows, offset)})"


def _seed_empty(inputs: GoldenInputs, state: StatePool, first: list[int]) -> None:
    """Make every position before a row's first token an empty slot of PR 270: kv 0, score -FLT_MAX."""
    spec = inputs.spec
    before = RaggedBatch.build([0] * (len(first) + 1), start_positions=first, state_slots=list(range(len(first))))
    rows = torch.zeros(sum(p - spec.live_start(p) for p in first), spec.state_dim)
    rows[:, spec.width :] = FP32_LOWEST
    import_live(spec, state, before, rows)


def _original_layout(inputs: GoldenInputs, state: StatePool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ring rows by position -> PR 270's slots after the step (previous window first, shifted when a window ended)."""
    spec = inputs.spec
    ring = state.data.view(len(inputs.start_pos), -1, 2, spec.width)
    out = torch.stack([inputs.kv_state, inputs.score_state], dim=2).clone()  # [B, slots, 2, N]
    for b, start in enumerate(inputs.start_pos):
        for slot, position in _slot_positions(inputs, start):
            if position >= 0:
                out[b, slot] = ring[b, position % ring.shape[1]]
    return out[:, :, 0], out[:, :, 1]


def _slot_positions(inputs: GoldenInputs, start: int) -> list[tuple[int, int]]:
    """(slot, position) of every slot that still means something after the token at ``start``."""
    r, overlap = inputs.spec.ratio, inputs.spec.overlap
    base = start // r * r
    current = [(j + (r if overlap else 0), base + j) for j in range(start - base + 1)]
    if not overlap:
        return current
    ended = (start + 1) % r == 0
    return current + [(j, base + j - (0 if ended else r)) for j in range(r)]


def _comparable(inputs: GoldenInputs, outputs: GoldenOutputs) -> GoldenOutputs:
    """Reset slots left over from an earlier window to the empty state: nobody reads them before they are rewritten."""
    for b, start in enumerate(inputs.start_pos):
        meaningful = {slot for slot, _ in _slot_positions(inputs, start)}
        stale = [s for s in range(inputs.spec.window) if s not in meaningful]
        if inputs.x_history[b].shape[0]:
            outputs.kv_state[b, stale] = inputs.kv_state[b, stale]
            outputs.score_state[b, stale] = inputs.score_state[b, stale]
    return outputs
