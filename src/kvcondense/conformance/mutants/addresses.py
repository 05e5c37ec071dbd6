"""Mutants of where rows go in the cache, and when: slots, pages, byte offsets, windows that are due."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcondense.backends import Step
from kvcondense.backends.reference import ReferenceBackend, Stages
from kvcondense.conformance.mutants.mutant import BOUNDARIES, BOUNDS, CHUNKS, PADDING, Mutant
from kvcondense.conformance.mutants.windows import Candidates, positions
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.plan import KEEP_FIELDS, Plan
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec
from kvcondense.stages import store, window


def _emit_late(step: Step) -> Step:
    """Windows that end with the last token of a request's chunk wait for a next token (and are then forgotten)."""
    batch, plan = step.plan.batch, step.plan
    end = (batch.start_positions + batch.lengths)[plan.window_request]
    due = (plan.window_index + 1) * plan.ratio < end
    return replace(step, plan=replace(plan, window_slot=torch.where(due, plan.window_slot, -1)))


def _emit_open(step: Step) -> Step:
    """Write what there is of every open window, too, before the step is done as it should be."""
    batch, plan, ratio = step.plan.batch, step.plan, step.spec.ratio
    table, rows = batch.block_table, plan.page_rows
    if table is None or rows is None or not isinstance(step.state, StatePool):
        return step
    end = batch.start_positions + batch.lengths
    request = (batch.active & (end % ratio > 0) & (end // ratio < table.shape[1] * rows)).nonzero()[:, 0]
    index = end[request] // ratio
    slot = table[request, index // rows] * rows + index % rows
    nothing = {n: getattr(plan, n)[:0] for n in KEEP_FIELDS}
    opened = replace(plan, window_request=request, window_index=index, window_slot=slot, **nothing)
    scratch = step.rows.new_empty(request.shape[0], step.spec.head_dim)
    ReferenceBackend(stages=Stages(gather=_gather_open)).run(replace(step, plan=opened, rows=scratch, latent=None))
    return step


def _gather_open(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
) -> Candidates:
    longer = torch.cat([rows, rows.new_zeros(spec.ratio, rows.shape[1])])
    kv, score = window.gather(spec, plan, longer, state, ape)
    end = (plan.batch.start_positions + plan.batch.lengths)[plan.window_request]
    missing = positions(spec, plan) >= end[:, None]
    return kv, score.masked_fill(missing[:, :, None], float("-inf"))


def _previous_plan(step: Step) -> Step:
    """Rows go where the last step with as many of them put its own: a replay without its new metadata."""
    if step.state is None:
        return step
    book = vars(step.state).setdefault("slots", {})
    slot = book.get(step.plan.num_windows, step.plan.window_slot)
    book[step.plan.num_windows] = step.plan.window_slot
    return replace(step, plan=replace(step.plan, window_slot=slot))


def _scatter_twice(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    store.scatter(rows, torch.where(slot + 1 < cache.num_rows, slot + 1, -1), cache, exact)
    store.scatter(rows, slot, cache, exact)


def _scatter_clamped(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    store.scatter(rows, slot.clamp(min=0), cache, exact)


def _wrapped(slot: torch.Tensor, cache: PagedCache) -> torch.Tensor:
    """The slot that a byte offset in 32 bits leads to."""
    size = cache.format.row_bytes(cache.head_dim)
    offset = (slot * size).to(torch.int32).to(torch.int64)
    return torch.where(slot < 0, -1, offset // size % cache.num_rows)


def _scatter_int32(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    store.scatter(rows, _wrapped(slot, cache), cache, exact)


def _scatter_int32_last(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    last = slot >= cache.num_rows - cache.page_rows
    store.scatter(rows, torch.where(last, _wrapped(slot, cache), slot), cache, exact)


MUTANTS = (
    Mutant("row-0-for-minus-1", "slot -1 is clamped to the legal row 0", PADDING, Stages(scatter=_scatter_clamped)),
    Mutant("emission-late", "the row waits for one more token", BOUNDARIES, alter=_emit_late),
    Mutant(
        "emission-twice",
        "the row is emitted a second time, into the next slot",
        BOUNDARIES,
        Stages(scatter=_scatter_twice),
    ),
    Mutant("partial-window-emitted", "a chunk's end emits the window that is still open", CHUNKS, alter=_emit_open),
    Mutant("previous-plan", "rows go to the cache slots of the step before", PADDING, alter=_previous_plan),
    Mutant("int32-address", "byte offsets wrap at 2^31", BOUNDS, Stages(scatter=_scatter_int32)),
    Mutant(
        "int32-last-page",
        "byte offsets wrap at 2^31 in the cache's last page alone",
        BOUNDS,
        Stages(scatter=_scatter_int32_last),
    ),
)
