"""Mutants of the state between steps: which rows are kept, where, in what type, and what drafts leave behind."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcondense.backends import Step
from kvcondense.backends.reference import Stages
from kvcondense.conformance.mutants.mutant import ALIASING, BOUNDS, CHUNKS, RACES, SPECULATION, Mutant
from kvcondense.layout.addresses import PagedLayout, RingLayout, live_starts
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import KEEP_FIELDS, Plan
from kvcondense.layout.state import StatePool
from kvcondense.stages import window


def _keep_first_writer(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """Rows that already hold their position are left alone: a rejected draft survives its replacement."""
    holds = vars(state).setdefault("holds", torch.full((state.layout.num_rows,), -1))  # its own book, beside tags
    new = holds[plan.keep_row] != plan.keep_position
    state.data[plan.keep_row[new]] = rows[plan.keep_token[new]]
    holds[plan.keep_row] = plan.keep_position


def _needed_at(step: Step, length: torch.Tensor) -> Step:
    """Keep only what requests of these lengths [R] go on from."""
    plan = step.plan
    needed = plan.keep_position >= live_starts(step.spec, length)[plan.keep_request]
    return replace(step, plan=replace(plan, **{n: getattr(plan, n)[needed] for n in KEEP_FIELDS}))


def _forget_drafts(step: Step) -> Step:
    """Keep what the next step needs if every draft is accepted, and no more."""
    batch = step.plan.batch
    return _needed_at(step, batch.start_positions + batch.lengths)


def _keep_for_eight(step: Step) -> Step:
    """Keep what is needed if at most eight drafts are rejected."""
    batch = step.plan.batch
    ends = batch.start_positions + batch.lengths
    return _needed_at(step, (ends - batch.draft_rows.clamp(max=8)).clamp(min=0))


def _fold_drafts(step: Step) -> Step:
    batch = step.plan.batch
    none = {n: getattr(step.plan, n)[:0] for n in KEEP_FIELDS}
    committed = replace(batch, draft_rows=torch.zeros_like(batch.draft_rows))
    if not isinstance(step.state, OnlineState):
        return step
    return replace(step, plan=replace(step.plan, batch=committed, **none))


def _keep_drafts_at_committed(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """Every draft goes to the place of the first one, where the committed tokens end; the last one stays."""
    batch = plan.batch
    committed = (batch.start_positions + batch.lengths - batch.draft_rows)[plan.keep_request]
    row = state.layout.address(batch, plan.keep_request, torch.minimum(plan.keep_position, committed))
    for i in range(row.shape[0]):
        state.put(row[i : i + 1], rows[plan.keep_token[i : i + 1]].to(state.dtype))


def _keep_all_backwards(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """Every token of the chunk is written, the youngest first: in a long chunk old rows end up on top of new ones."""
    window.keep(plan, rows, state)
    batch = plan.batch
    for q in batch.active.nonzero()[:, 0].tolist():
        positions = batch.start_positions[q] + torch.arange(int(batch.lengths[q]))
        address = state.layout.address(batch, torch.full_like(positions, q), positions)
        for i in reversed(range(positions.shape[0])):
            state.data[address[i]] = rows[int(batch.query_start_loc[q]) + i]


def _keep_in_short_ring(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """In a ring of one row less, position p lies where p + 1 - R was in one of R rows: that one is gone, too."""
    if isinstance(state.layout, RingLayout):
        next_row = state.layout.address(plan.batch, plan.keep_request, plan.keep_position + 1)
        state.put(next_row, rows[plan.keep_token].to(state.dtype))
    window.keep(plan, rows, state)


def _keep_in_bf16(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    window.keep(plan, rows.bfloat16().to(rows.dtype), state)


def _addressed_by(step: Step, state: StatePool, batch: RaggedBatch) -> Step:
    """Read and write the state where ``batch`` has it."""
    plan = step.plan
    row = state.layout.address(batch, plan.keep_request, plan.keep_position)
    return replace(step, plan=replace(plan, batch=batch, keep_row=row))


def _previous_table(step: Step) -> Step:
    state, table = step.state, step.plan.batch.state_block_table
    if not isinstance(state, StatePool) or not isinstance(state.layout, PagedLayout) or table is None:
        return step
    before = vars(state).get("table", table)
    vars(state)["table"] = table
    if before.shape != table.shape:
        return step
    return _addressed_by(step, state, replace(step.plan.batch, state_block_table=before))


def _slots_by_order(step: Step) -> Step:
    state, slots = step.state, step.plan.batch.state_slots
    if not isinstance(state, StatePool) or slots is None:
        return step
    order = torch.where(slots < 0, slots, torch.arange(slots.shape[0]))
    return _addressed_by(step, state, replace(step.plan.batch, state_slots=order))


MUTANTS = (
    Mutant(
        "stale-draft-row",
        "a rejected draft's state row is not overwritten",
        SPECULATION,
        Stages(keep=_keep_first_writer),
    ),
    Mutant(
        "drafts-not-kept-for", "keeps no rows for the case that drafts are rejected", SPECULATION, alter=_forget_drafts
    ),
    Mutant(
        "eight-drafts-kept-for", "keeps no rows for more than eight rejected drafts", SPECULATION, alter=_keep_for_eight
    ),
    Mutant(
        "drafts-at-committed",
        "every draft is kept in the row where the committed tokens end",
        SPECULATION,
        Stages(keep=_keep_drafts_at_committed),
    ),
    Mutant(
        "online-drafts-folded",
        "an online state folds drafts at once, and cannot take them back",
        SPECULATION,
        alter=_fold_drafts,
        kind="online",
    ),
    Mutant(
        "ring-race", "tokens of a long chunk overwrite each other's ring row", RACES, Stages(keep=_keep_all_backwards)
    ),
    Mutant("ring-wraps-early", "a ring has one row less than it needs", BOUNDS, Stages(keep=_keep_in_short_ring)),
    Mutant("state-in-bf16", "rows lose bits on their way into an fp32 state", CHUNKS, Stages(keep=_keep_in_bf16)),
    Mutant(
        "stale-block-table",
        "the state's pages are those of the step before, whoever has them now",
        ALIASING,
        alter=_previous_table,
        kind="paged",
    ),
    Mutant(
        "state-slot-by-order",
        "a request's state is in the slot of its place in the batch",
        ALIASING,
        alter=_slots_by_order,
    ),
)
