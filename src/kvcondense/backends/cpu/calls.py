"""A step as the condense kernel is told of it: a block for its layer and one for its plan, kept, and one each time.

The layer's is kept with the binding (``Step.made``), which ends when memory moves; the plan's with the plan.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.cpu import native, params, scratch, tables
from kvcondense.backends.cpu.blocks import address
from kvcondense.backends.cpu.threads import SERIAL, launch
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineLayout, OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec

KINDS = {torch.float32: params.FP32, torch.bfloat16: params.BF16, torch.float16: params.FP16}
_FP32 = torch.float32


@dataclass(frozen=True)
class _Kept:
    """A packed block, its address, what it was made of, and what must live as long."""

    block: array[int]
    address: int
    of: tuple[int, ...] | list[int]
    held: tuple[Any, ...]


@dataclass(frozen=True)
class _Layer(_Kept):
    """The block of a layer, and a packed ``Call`` of one of its steps, in which what steps differ in is zero."""

    call: array[int]
    scratch_bytes: int


@dataclass(frozen=True)
class _Work(_Kept):
    """The block of a plan, and how many windows, kept tokens and requests it has."""

    windows: int
    keeps: int
    requests: int


_PLAN, _SCRATCH, _KV_SCORE, _KV_STRIDE, _KV_KIND, _ROWS, _LATENT, _STORED, _STORE, _WINDOWS, _REQUESTS, _KEEPS = (
    params.Call.place(name)
    for name in ("plan", "scratch", "kv_score", "kv_stride", "kv_kind", "rows", "latent", "stored", "store", "windows",
                 "requests", "keeps")
)  # fmt: skip
_BLOCKS, _CHUNK, _PHASES, _LAYER, _SCRATCH_BYTES = (
    params.Call.place(name) for name in ("blocks", "chunk", "phases", "layer", "scratch_bytes")
)


def run(step: Step, *, windows: bool = True, store: bool = True, keeps: bool = True) -> None:
    """One launch for the windows, for what is kept, or for both; ``store``: rows go to the cache."""
    if step.kv_score.stride(1) != 1:
        step = replace(step, kv_score=step.kv_score.contiguous())
    layer = _layer(step)
    _launch(_filled(layer, step, store), layer, step, step.plan, windows=windows, keeps=keeps)


def prepare(step: Step) -> Callable[[Plan], None] | None:
    """``run`` of this step with other plans; None where a call differs in more than that."""
    layer = _layer(step)
    if step.kv_score.stride(1) != 1 or step.made is None or step.made.get("cpu") is not layer:
        return None
    filled = _filled(layer, step, store=True)

    def go(plan: Plan) -> None:
        _launch(filled[:], layer, step, plan)  # a block of its own: other threads may run the same

    return go


def _filled(layer: _Layer, step: Step, store: bool) -> array[int]:
    """The block of a call, but for what follows from its plan."""
    call, kv_score = layer.call[:], step.kv_score
    call[_KV_SCORE], call[_KV_STRIDE] = kv_score.data_ptr(), kv_score.stride(0) * kv_score.itemsize
    call[_KV_KIND], call[_ROWS] = KINDS[kv_score.dtype], step.rows.data_ptr()
    if step.latent is not None:
        call[_LATENT] = step.latent.data_ptr()
    call[_STORED], call[_STORE] = step.stored, store
    return call


def _launch(
    call: array[int], layer: _Layer, step: Step, plan: Plan, *, windows: bool = True, keeps: bool = True
) -> None:
    """Enter the kernel with a block that is filled but for its plan.

    Where what is kept may take the place of what windows read, a launch for each: no thread waits for another inside.
    """
    work, state = _work(plan), step.state
    count = work.windows if windows else 0
    kept = work.keeps if keeps and state is not None and not step.stored else 0
    requests = work.requests if keeps and type(state) is OnlineState else 0
    threads, blocks, chunk = _split(step.spec, count, requests, kept)
    call[_PLAN], call[_SCRATCH] = work.address, scratch.of(threads * layer.scratch_bytes)
    call[_WINDOWS], call[_REQUESTS], call[_KEEPS] = count, requests, kept
    call[_BLOCKS], call[_CHUNK] = blocks, chunk
    if blocks > 1:
        call.frombytes(bytes(8 * count))
    asked = (count and params.WINDOWS, requests and params.OPEN, kept and params.KEEP)
    apart = threads > 1 and (requests > 0 or plan.overwrites)
    for phases in filter(None, asked) if apart else (sum(asked),):
        block = call[:] if apart else call  # counters that a launch has left are not zero
        block[_PHASES] = phases
        launch(native.address("condense"), address(block), threads)


def kernels(state: object, cache: PagedCache | None) -> tuple[str, ...]:
    """What a step with these is compiled of: nobody waits for what another kind of state or cache needs."""
    online, cached = isinstance(state, OnlineState), cache is not None
    return ("condense", *("online",) * online, *("encode",) * cached)


def format_block(cache: PagedCache) -> array[int]:
    """How rows lie in the pages of a cache."""
    scale = None if cache.tensor_scale is None else float(cache.tensor_scale)
    return tables.format_block(cache.format, cache.head_dim, cache.page_rows, scale)


def _layer(step: Step) -> _Layer:
    """The block of what a step's layer has."""
    cache, state, rope = step.cache, step.state, step.rope
    of = (id(step.spec), id(step.ape), id(step.gamma), id(rope), id(state), id(cache))
    known: _Layer | None = None if step.made is None else step.made.get("cpu")
    if known is not None and known.of == of:
        return known
    given = (step.ape, step.gamma, None if rope is None else rope.cos, None if rope is None else rope.sin)
    ape, gamma, cos, sin = read = [t if t is None else _fp32(t) for t in given]
    rule, form = tables.spec_block(step.spec), None if cache is None else format_block(cache)
    scales = None if cache is None or cache.format.tensor_scale else cache.scales
    online = isinstance(state, OnlineState)
    data = None if state is None else state.log if isinstance(state, OnlineState) else state.blocks
    layer = params.Layer()
    layer.spec, layer.format = address(rule), 0 if form is None else address(form)
    layer.ape, layer.gamma, layer.cos, layer.sin = (0 if t is None else t.data_ptr() for t in (ape, gamma, cos, sin))
    layer.state, layer.state_stride, layer.state_page_stride, layer.state_score = 0, 0, 0, 0
    layer.state_kind, layer.state_raw = params.FP32, type(state) is StatePool and state.layout.raw_scores
    if data is not None:
        size, each = data.itemsize, state.layout.log_rows if online else 1
        layer.state, layer.state_kind = data.data_ptr(), KINDS[data.dtype]
        layer.state_stride, layer.state_page_stride = data.stride(-2) * size, data.stride(0) * each * size
        score = state.score if type(state) is StatePool else None
        layer.state_score = step.spec.width * size if score is None else score.data_ptr() - data.data_ptr()
    layer.acc, layer.folded = (state.acc.data_ptr(), state.folded.data_ptr()) if online else (0, 0)
    layer.cache, layer.page_stride = (0, 0) if cache is None else (cache.data.data_ptr(), cache.data.stride(0))
    layer.scales, layer.scales_stride = (0, 0) if scales is None else (scales.data_ptr(), 4 * scales.stride(0))
    second = None if cache is None else cache.second
    layer.second, layer.second_stride = (
        (0, 0) if second is None else (second.data_ptr(), second.itemsize * second.stride(0))
    )
    layer.encode = 0 if form is None else native.address("encode")
    layer.online = native.address("online") if online else 0
    block, call = layer.pack(), array("q", bytes(params.Call.size))
    at, room = address(block), params.Room.bytes(step.spec.head_dim, step.spec.window)
    call[_LAYER], call[_SCRATCH_BYTES] = at, room
    made = _Layer(block, at, of, (rule, form, *read), call, room)
    # What was converted, as the scale of a whole cache, may have another value by the next step.
    lasts = all(a is b for a, b in zip(given, read, strict=True)) and not (cache and cache.format.tensor_scale)
    if step.made is not None and lasts:
        step.made["cpu"] = made
    return made


def _work(plan: Plan) -> _Work:
    """The block of a plan."""
    known: _Work | None = plan.made.get("cpu")
    if known is not None and [place() for place in known.held] == known.of:
        return known
    batch, layout, work = plan.batch, plan.state_layout, params.Work()
    paged = isinstance(layout, PagedLayout)
    table = None if layout is None else batch.state_block_table if paged else batch.state_slots
    read = (batch.query_start_loc, batch.start_positions, batch.draft_rows, plan.window_request, plan.window_index,
            plan.window_slot, plan.keep_token, plan.keep_position, plan.keep_row, table)  # fmt: skip
    asked = tuple(t.data_ptr for t in read if t is not None)
    places = [place() for place in asked]
    work.query_start, work.start, work.drafts, *rest = places
    work.window_request, work.window_index, work.window_slot, *rest = rest
    work.keep_token, work.keep_position, work.keep_row, *rest = rest
    work.state_table, work.state_table_stride = (rest[0], table.stride(0)) if table is not None else (0, 0)
    rows = 0 if layout is None else layout.log_rows if isinstance(layout, OnlineLayout) else layout.block_rows
    work.state_page_rows, work.paged = max(rows, 1), paged
    work.state_page_tokens = layout.page_tokens if isinstance(layout, PagedLayout) else 1
    block = work.pack()
    made = plan.made["cpu"] = _Work(
        block, address(block), places, asked,
        windows=plan.window_request.shape[0], keeps=plan.keep_token.shape[0], requests=batch.start_positions.shape[0],
    )  # fmt: skip
    return made


def _split(spec: CompressorSpec, windows: int, requests: int, kept: int) -> tuple[int, int, int]:
    """(threads, channel blocks per window, windows taken at once) for this much work."""
    work = (windows + requests) * spec.window * spec.head_dim + kept * spec.state_dim
    threads = 1 if work < SERIAL else torch.get_num_threads()
    if threads == 1:
        return 1, 1, 1
    if windows < threads:
        return threads, min(-(-threads // max(windows, 1)), spec.head_dim // params.CHANNELS), 1
    return threads, 1, max(1, min(8, windows // (8 * threads)))


def _fp32(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype is _FP32 and t.is_contiguous() else t.float().contiguous()
