"""Mutants of steps with several requests: who is padding, whose tokens are whose, what the batch's shape decides."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcondense.backends import Step
from kvcondense.backends.reference import Stages
from kvcondense.conformance.mutants.mutant import BATCH, BOUNDARIES, PADDING, Mutant
from kvcondense.conformance.mutants.windows import Candidates
from kvcondense.layout.addresses import RingLayout
from kvcondense.layout.batch import spread
from kvcondense.layout.plan import KEEP_FIELDS, Plan
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec
from kvcondense.stages import window


def _drop_documents(step: Step) -> Step:
    """A request that starts at 0 behind another one looks like the zeros that fill up a batch."""
    plan = step.plan
    dropped = plan.batch.start_positions == 0
    dropped[:1] = False
    slot = torch.where(dropped[plan.window_request], -1, plan.window_slot)
    left = ~dropped[plan.keep_request]
    kept = {n: getattr(plan, n)[left] for n in KEEP_FIELDS}
    return replace(step, plan=replace(plan, window_slot=slot, **kept))


def _take_for_empty(step: Step) -> Step:
    """A request without tokens takes one, and those behind it begin a token late."""
    lengths = step.plan.batch.lengths
    request, _ = spread(lengths)
    token = torch.arange(request.shape[0]) + (lengths == 0).cumsum(0)[request]
    taken = step.kv_score[token.clamp(max=step.kv_score.shape[0] - 1)]
    return replace(step, kv_score=torch.cat([taken, step.kv_score[request.shape[0] :]]))


def _keep_inert_in_slot_0(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    window.keep(plan, rows, state)
    batch, layout = plan.batch, state.layout
    if not isinstance(layout, RingLayout):
        return
    for q in ((batch.start_positions < 0) & (batch.lengths > 0)).nonzero()[:, 0].tolist():
        last = rows[int(batch.query_start_loc[q]) : int(batch.query_start_loc[q + 1])][-layout.ring_rows :]
        state.put(torch.arange(last.shape[0]), last.to(state.dtype))


def _keep_spare_tokens(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """Tokens behind the last request are kept as tokens of it."""
    window.keep(plan, rows, state)
    batch, active = plan.batch, plan.batch.active.nonzero()[:, 0]
    if not isinstance(state.layout, RingLayout) or not active.shape[0]:
        return
    spare = rows[int(batch.query_start_loc[-1]) :][: state.layout.ring_rows]
    owner = active[-1:].expand(spare.shape[0])
    position = (batch.start_positions + batch.lengths)[owner] + torch.arange(spare.shape[0])
    state.put(state.layout.address(batch, owner, position), spare.to(state.dtype))


def _gather_in_halves(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
) -> Candidates:
    """With several requests, a window is pooled in two parts, whose results meet in bf16."""
    kv, score = window.gather(spec, plan, rows, state, ape)
    if plan.batch.lengths.shape[0] < 2:
        return kv, score
    kv, score = (t.unflatten(1, (2, -1)) for t in (kv, score))  # [E, 2, W / 2, d]
    weight = torch.logsumexp(score, dim=2)
    part = (torch.softmax(score, dim=2) * kv).sum(2).bfloat16().to(kv.dtype)
    return torch.where(torch.isneginf(weight), 0.0, part), weight


MUTANTS = (
    Mutant(
        "second-document-as-padding",
        "a request that starts at 0 behind another one is taken for padding",
        BOUNDARIES,
        alter=_drop_documents,
    ),
    Mutant(
        "empty-takes-a-token",
        "a request without tokens takes the next one's first",
        PADDING,
        alter=_take_for_empty,
    ),
    Mutant(
        "inert-slot-clamped",
        "state slot -1 is clamped to the legal slot 0",
        PADDING,
        Stages(keep=_keep_inert_in_slot_0),
    ),
    Mutant(
        "spare-tokens-to-last",
        "spare tokens are counted to the last request",
        PADDING,
        Stages(keep=_keep_spare_tokens),
    ),
    Mutant(
        "split-by-batch-size",
        "with more than one request, windows are pooled in two parts that meet in bf16",
        BATCH,
        Stages(gather=_gather_in_halves),
    ),
)
