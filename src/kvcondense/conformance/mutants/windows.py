"""Mutants of what a window reads: its candidates, where they come from, and the bias of their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from kvcondense.backends.reference import Stages
from kvcondense.conformance.mutants.mutant import (
    ALIASING,
    BOUNDARIES,
    CHUNKS,
    FIRST_WINDOW,
    NUMERICS,
    PREFIX,
    Mutant,
)
from kvcondense.layout.addresses import RingLayout
from kvcondense.layout.batch import spread
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec
from kvcondense.stages import window

Candidates = tuple[torch.Tensor, torch.Tensor]
Gather = Callable[
    [CompressorSpec, Plan, torch.Tensor, StatePool | None, torch.Tensor | None], Candidates
]  # as window.gather, without a step's own tokens in the state


def _rows_with_ape(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def rows(
        spec: CompressorSpec,
        kv_score: torch.Tensor,
        ape: torch.Tensor | None,
        positions: torch.Tensor,
        state_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        return window.state_rows(spec, kv_score, None if ape is None else change(ape), positions, state_dtype)

    return rows


def _gather_then(change: Callable[[CompressorSpec, Plan, StatePool | None, Candidates], Candidates]) -> Gather:
    def gather(
        spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
    ) -> Candidates:
        return change(spec, plan, state, window.gather(spec, plan, rows, state, ape))

    return gather


def positions(spec: CompressorSpec, plan: Plan) -> torch.Tensor:
    """Position of every candidate of every window [E, W]; negative where there is none."""
    return (plan.window_index[:, None] + 1) * spec.ratio - spec.window + torch.arange(spec.window)


def _chunk_offsets(plan: Plan, num_tokens: int) -> torch.Tensor:
    offsets = torch.zeros(num_tokens, dtype=torch.int64)
    _, within = spread(plan.batch.lengths)
    offsets[: within.shape[0]] = within
    return offsets


def _no_overlap(spec: CompressorSpec, plan: Plan, state: StatePool | None, c: Candidates) -> Candidates:
    kv, score = c
    if spec.overlap:
        score[:, : spec.ratio] = float("-inf")
    return kv, score


def _neighbour(spec: CompressorSpec, plan: Plan, state: StatePool | None, c: Candidates) -> Candidates:
    if not spec.overlap:
        return c
    for t in c:
        t[:, : spec.ratio] = t[:, : spec.ratio].roll(1, 0)
    return c


def _previous_occupant(spec: CompressorSpec, plan: Plan, state: StatePool | None, c: Candidates) -> Candidates:
    if state is None or not isinstance(state.layout, RingLayout) or not spec.overlap:
        return c
    kv, score = c
    request, position = plan.window_request[:, None], positions(spec, plan)
    old = state.data[state.layout.address(plan.batch, request, position)]  # a negative position wraps into the ring
    old = old.view(*position.shape, 2, spec.halves, spec.head_dim)[:, :, :, 0]
    use = (position < 0)[:, :, None]
    return torch.where(use, old[:, :, 0], kv), torch.where(use, old[:, :, 1], score)


def _weightless_is_zero(spec: CompressorSpec, plan: Plan, state: StatePool | None, c: Candidates) -> Candidates:
    kv, score = c
    return kv, torch.where((positions(spec, plan) < 0)[:, :, None], 0.0, score)


def _no_halo_at_start(spec: CompressorSpec, plan: Plan, state: StatePool | None, c: Candidates) -> Candidates:
    """A step that begins with a window has nothing of the window before it, though the state does."""
    kv, score = c
    start = plan.batch.start_positions[plan.window_request][:, None]
    lost = (positions(spec, plan) < start) & (start % spec.ratio == 0)
    return kv, score.masked_fill(lost[:, :, None], float("-inf"))


def _gather_swapped(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
) -> Candidates:
    def swap(t: torch.Tensor) -> torch.Tensor:
        return t.view(t.shape[0], 2, spec.halves, spec.head_dim).flip(2).reshape(t.shape)

    swapped = None if state is None else StatePool(swap(state.data), state.layout)
    return window.gather(spec, plan, swap(rows), swapped, ape)


def _gather_aligned(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
) -> Candidates:
    """A chunk's first token is taken for the first of a window: the open window is read from the chunk, shifted."""
    start = plan.batch.start_positions
    batch = replace(plan.batch, start_positions=torch.where(start < 0, start, start // spec.ratio * spec.ratio))
    longer = torch.cat([rows, rows.new_zeros(spec.ratio, rows.shape[1])])  # what is read past the last token
    return window.gather(spec, replace(plan, batch=batch), longer, state, ape)


def _gather_biased_twice(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
) -> Candidates:
    """Scores in the state have their ape; it is added again when they are read."""
    kv, score = window.gather(spec, plan, rows, state, ape)
    if ape is None:
        return kv, score
    position = positions(spec, plan)
    half = (torch.arange(spec.window) >= spec.window - spec.ratio).long() * (spec.halves - 1)
    bias = ape.to(score.dtype).view(spec.ratio, spec.halves, spec.head_dim)[position % spec.ratio, half]
    stored = (position >= 0) & (position < plan.batch.start_positions[plan.window_request][:, None])
    return kv, torch.where(stored[:, :, None], score + bias, score)


def _gather_across(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
) -> Candidates:
    """What stands before a request's first token in the step is taken for its previous window."""
    kv, score = window.gather(spec, plan, rows, state, ape)
    position = positions(spec, plan)
    token = plan.batch.query_start_loc[plan.window_request][:, None] + position
    foreign = ((position < 0) & (token >= 0))[:, :, None]
    parts = rows.view(rows.shape[0], 2, spec.halves, spec.head_dim)[token.clamp(0, rows.shape[0] - 1), :, 0]
    return torch.where(foreign, parts[:, :, 0], kv), torch.where(foreign, parts[:, :, 1], score)


MUTANTS = (
    Mutant("ape-dropped", "scores without ape", NUMERICS, Stages(state_rows=_rows_with_ape(torch.zeros_like))),
    Mutant(
        "ape-shifted",
        "ape of the next slot",
        NUMERICS,
        Stages(state_rows=_rows_with_ape(lambda ape: ape.roll(-1, 0))),
    ),
    Mutant(
        "ape-by-chunk-offset",
        "ape by a token's place in its chunk, not by its position",
        CHUNKS,
        Stages(token_positions=_chunk_offsets),
    ),
    Mutant(
        "bias-twice-from-state",
        "the ape is added again to scores that are read back from the state",
        CHUNKS,
        Stages(gather=_gather_biased_twice),
    ),
    Mutant("overlap-ignored", "the previous window has no weight", CHUNKS, Stages(gather=_gather_then(_no_overlap))),
    Mutant(
        "overlap-swapped",
        "channel halves of previous and current window swapped",
        NUMERICS,
        Stages(gather=_gather_swapped),
    ),
    Mutant(
        "neighbour-window",
        "previous window taken from the batch neighbour",
        ALIASING,
        Stages(gather=_gather_then(_neighbour)),
    ),
    Mutant(
        "halo-across-documents",
        "the first window reads the end of the document before it in the pack",
        BOUNDARIES,
        Stages(gather=_gather_across),
    ),
    Mutant(
        "first-halo-score-zero",
        "what is missing before the first window has score 0, and so a weight",
        FIRST_WINDOW,
        Stages(gather=_gather_then(_weightless_is_zero)),
    ),
    Mutant(
        "halo-lost-at-boundary",
        "a request that goes on at a window boundary has lost the window before",
        PREFIX,
        Stages(gather=_gather_then(_no_halo_at_start)),
    ),
    Mutant(
        "state-not-reset",
        "a new request reads its slot's last occupant",
        ALIASING,
        Stages(gather=_gather_then(_previous_occupant)),
    ),
    Mutant("chunk-start-aligned", "a chunk is taken to begin with a window", CHUNKS, Stages(gather=_gather_aligned)),
)
