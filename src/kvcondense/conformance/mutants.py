"""Wrong compressors on purpose: bugs that engines shipped, each as a backend that the scenarios must catch.

A mutant is the reference backend with one stage swapped, or with its step altered first. They are tests of the tests:
``kvcondense verify --mutant NAME`` must fail for every one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from kvcondense.backends import Step
from kvcondense.backends.reference import ReferenceBackend, Stages
from kvcondense.formats import CacheFormat, Channels
from kvcondense.formats.descriptor import PAD
from kvcondense.formats.elements import E2M1, E2M1_TIES_DOWN, Element
from kvcondense.formats.scales import ScaleRule
from kvcondense.layout.addresses import RingLayout, live_starts
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import KEEP_FIELDS, Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.stages import norm, pool, rope, store, window


@dataclass(frozen=True)
class Mutant:
    """A wrong backend: ``bug`` says in a line what is wrong with it."""

    name: str
    bug: str
    stages: Stages = field(default_factory=Stages)
    alter: Callable[[Step], Step] = lambda step: step
    kind: str = "ring"
    """Kind of state in which the bug shows: ring, paged or online."""

    def why_not(self, step: Step) -> str | None:
        return ReferenceBackend().why_not(step)

    def run(self, step: Step) -> None:
        ReferenceBackend(self.name, self.stages).run(self.alter(step))


Candidates = tuple[torch.Tensor, torch.Tensor]


def _pool_current(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return kv[:, -1]


def _pool_uniform(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return pool.two_pass(kv, torch.where(torch.isneginf(score), score, 0.0))


def _pool_scalar_gate(kv: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return pool.two_pass(kv, score.mean(-1, keepdim=True).expand_as(score))


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


def _gather_then(change: Callable[[CompressorSpec, Plan, StatePool | None, Candidates], Candidates]) -> Callable:
    def gather(
        spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
    ) -> Candidates:
        return change(spec, plan, state, window.gather(spec, plan, rows, state, ape))

    return gather


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
    request = plan.window_request[:, None]
    position = (plan.window_index[:, None] + 1) * spec.ratio - spec.window + torch.arange(spec.window)
    old = state.data[state.layout.address(plan.batch, request, position)]  # a negative position wraps into the ring
    old = old.view(*position.shape, 2, spec.halves, spec.head_dim)[:, :, :, 0]
    use = (position < 0)[:, :, None]
    return torch.where(use, old[:, :, 0], kv), torch.where(use, old[:, :, 1], score)


def _gather_swapped(
    spec: CompressorSpec, plan: Plan, rows: torch.Tensor, state: StatePool | None, ape: torch.Tensor | None
) -> Candidates:
    def swap(t: torch.Tensor) -> torch.Tensor:
        return t.view(t.shape[0], 2, spec.halves, spec.head_dim).flip(2).reshape(t.shape)

    swapped = None if state is None else StatePool(swap(state.data), state.layout)
    return window.gather(spec, plan, swap(rows), swapped, ape)


def _norm_with_eps(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    return norm.rms_norm(pooled, gamma, 10 * eps, rounding)


def _norm_unrounded(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    return norm.rms_norm(pooled, gamma, eps, Rounding.FUSED).bfloat16().to(pooled.dtype)


def _norm_without_gamma(pooled: torch.Tensor, gamma: torch.Tensor, eps: float, rounding: Rounding) -> torch.Tensor:
    return norm.rms_norm(pooled, torch.ones_like(gamma), eps, rounding)


def _rope_half_split(n: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    d = 2 * cos.shape[-1]
    low, high = n[..., -d:].chunk(2, dim=-1)
    paired = torch.stack([low, high], dim=-1).flatten(-2)
    out = rope.pairwise(torch.cat([n[..., :-d], paired], dim=-1), cos, sin, rounding)
    rotated = out[..., -d:].unflatten(-1, (-1, 2))
    return torch.cat([out[..., :-d], rotated[..., 0], rotated[..., 1]], dim=-1)


def _other_theta(theta: float) -> Callable[[Step], Step]:
    """Plain RoPE with base ``theta`` instead of the model's table."""

    def alter(step: Step) -> Step:
        assert step.rope is not None
        size, half = step.rope.cos.shape
        inv = 1.0 / (theta ** (torch.arange(half, dtype=torch.float32) / half))
        angle = torch.outer(torch.arange(size, dtype=torch.float32), inv)
        return replace(step, rope=RopeTable(angle.cos(), angle.sin()))

    return alter


def _emit_late(step: Step) -> Step:
    """Windows that end with the last token of a request's chunk wait for a next token (and are then forgotten)."""
    batch, plan = step.plan.batch, step.plan
    end = (batch.start_positions + batch.lengths)[plan.window_request]
    due = (plan.window_index + 1) * plan.ratio < end
    return replace(step, plan=replace(plan, window_slot=torch.where(due, plan.window_slot, -1)))


def _scatter_twice(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    store.scatter(rows, torch.where(slot + 1 < cache.num_rows, slot + 1, -1), cache, exact)
    store.scatter(rows, slot, cache, exact)


def _scatter_clamped(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    store.scatter(rows, slot.clamp(min=0), cache, exact)


def _scatter_int32(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    size = cache.format.row_bytes(cache.head_dim)
    offset = (slot * size).to(torch.int32).to(torch.int64)  # wraps
    store.scatter(rows, torch.where(slot < 0, -1, offset // size % cache.num_rows), cache, exact)


def _scatter_as(change: Callable[[CacheFormat], CacheFormat]) -> Callable[..., None]:
    """Store in another format than the cache's, of the same size."""

    def scatter(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
        store.scatter(rows, slot, replace(cache, format=change(cache.format)), exact)

    return scatter


def _with_channels(change: Callable[[Channels], Channels]) -> Callable[[CacheFormat], CacheFormat]:
    def other(fmt: CacheFormat) -> CacheFormat:
        return replace(fmt, channels=tuple(change(c) for c in fmt.channels))

    return other


class _RoundedDown(ScaleRule):
    def exponent(self, amax: torch.Tensor, element: Element) -> torch.Tensor:
        up = super().exponent(amax, element)
        exact = torch.ldexp(torch.full_like(amax, element.largest), up) == amax
        return up - (~exact).to(torch.int32)


def _floor_on_scale(c: Channels) -> Channels:
    return replace(c, scale=c.scale and replace(c.scale, floor_on_scale=True))


def _round_down(c: Channels) -> Channels:
    return replace(c, scale=c.scale and _RoundedDown(**vars(c.scale)))


def _ties_down(c: Channels) -> Channels:
    return replace(c, element=E2M1_TIES_DOWN if c.element == E2M1 else c.element)


def _scatter_without_pad(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    stored = cache.encode(rows[slot >= 0], exact)
    cache.put(slot[slot >= 0], {name: values for name, values in stored.items() if name != PAD})


def _scatter_nibbles_swapped(rows: torch.Tensor, slot: torch.Tensor, cache: PagedCache, exact: bool = False) -> None:
    stored = cache.encode(rows[slot >= 0], exact)
    for c in cache.format.channels:
        if c.element.bits == 4:
            stored[c.name] = (stored[c.name] << 4) | (stored[c.name] >> 4)
    cache.put(slot[slot >= 0], stored)


def _keep_first_writer(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """Rows that already hold their position are left alone: a rejected draft survives its replacement."""
    holds = vars(state).setdefault("holds", torch.full((state.layout.num_rows,), -1))  # its own book, beside tags
    new = holds[plan.keep_row] != plan.keep_position
    state.data[plan.keep_row[new]] = rows[plan.keep_token[new]]
    holds[plan.keep_row] = plan.keep_position


def _forget_drafts(step: Step) -> Step:
    """Keep what the next step needs if every draft is accepted, and no more."""
    plan, batch = step.plan, step.plan.batch
    low = live_starts(step.spec, batch.start_positions + batch.lengths)
    needed = plan.keep_position >= low[plan.keep_request]
    kept = {n: getattr(plan, n)[needed] for n in KEEP_FIELDS}
    return replace(step, plan=replace(plan, **kept))


def _keep_for_eight(step: Step) -> Step:
    """Keep what is needed if at most eight drafts are rejected."""
    plan, batch = step.plan, step.plan.batch
    ends = batch.start_positions + batch.lengths
    low = live_starts(step.spec, (ends - batch.draft_rows.clamp(max=8)).clamp(min=0))
    needed = plan.keep_position >= low[plan.keep_request]
    kept = {n: getattr(plan, n)[needed] for n in KEEP_FIELDS}
    return replace(step, plan=replace(plan, **kept))


def _fold_drafts(step: Step) -> Step:
    batch = step.plan.batch
    none = {n: getattr(step.plan, n)[:0] for n in KEEP_FIELDS}
    committed = replace(batch, draft_rows=torch.zeros_like(batch.draft_rows))
    if not isinstance(step.state, OnlineState):
        return step
    return replace(step, plan=replace(step.plan, batch=committed, **none))


def _keep_all_backwards(plan: Plan, rows: torch.Tensor, state: StatePool) -> None:
    """Every token of the chunk is written, the youngest first: in a long chunk old rows end up on top of new ones."""
    window.keep(plan, rows, state)
    batch = plan.batch
    for q in batch.active.nonzero()[:, 0].tolist():
        positions = batch.start_positions[q] + torch.arange(int(batch.lengths[q]))
        address = state.layout.address(batch, torch.full_like(positions, q), positions)
        for i in reversed(range(positions.shape[0])):
            state.data[address[i]] = rows[int(batch.query_start_loc[q]) + i]


_ALL = (
    Mutant("current-token-only", "uses the last token of the window alone", Stages(pool=_pool_current)),
    Mutant("uniform-average", "averages the window instead of weighing it", Stages(pool=_pool_uniform)),
    Mutant("scalar-gate", "one gate per token instead of one per channel", Stages(pool=_pool_scalar_gate)),
    Mutant("ape-dropped", "scores without ape", Stages(state_rows=_rows_with_ape(torch.zeros_like))),
    Mutant("ape-shifted", "ape of the next slot", Stages(state_rows=_rows_with_ape(lambda ape: ape.roll(-1, 0)))),
    Mutant("overlap-ignored", "the previous window has no weight", Stages(gather=_gather_then(_no_overlap))),
    Mutant("overlap-swapped", "channel halves of previous and current window swapped", Stages(gather=_gather_swapped)),
    Mutant(
        "neighbour-window", "previous window taken from the batch neighbour", Stages(gather=_gather_then(_neighbour))
    ),
    Mutant("rope-at-row-index", "rotates row w at w", Stages(rope_position=lambda plan: plan.window_index)),
    Mutant(
        "rope-at-last-position",
        "rotates at the window's last position",
        Stages(rope_position=lambda plan: (plan.window_index + 1) * plan.ratio - 1),
    ),
    Mutant("half-split-pairs", "rotates channels (i, i + rd/2)", Stages(rope=_rope_half_split)),
    Mutant("theta-1e4", "RoPE base of the uncompressed layers", alter=_other_theta(1e4)),
    Mutant("no-yarn", "frequencies without YaRN", alter=_other_theta(160000.0)),
    Mutant("eps-times-10", "eps 1e-5 instead of 1e-6", Stages(norm=_norm_with_eps)),
    Mutant("no-bf16-before-norm", "REFERENCE profile without its first rounding", Stages(norm=_norm_unrounded)),
    Mutant("gamma-dropped", "norm without its weight", Stages(norm=_norm_without_gamma)),
    Mutant("rotate-ignored", "no Hadamard although asked for", Stages(hadamard=lambda row: row)),
    Mutant("row-0-for-minus-1", "slot -1 is clamped to the legal row 0", Stages(scatter=_scatter_clamped)),
    Mutant(
        "state-not-reset",
        "a new request reads its slot's last occupant",
        Stages(gather=_gather_then(_previous_occupant)),
    ),
    Mutant("emission-late", "the row waits for one more token", alter=_emit_late),
    Mutant("emission-twice", "the row is emitted a second time, into the next slot", Stages(scatter=_scatter_twice)),
    Mutant("stale-draft-row", "a rejected draft's state row is not overwritten", Stages(keep=_keep_first_writer)),
    Mutant("drafts-not-kept-for", "keeps no rows for the case that drafts are rejected", alter=_forget_drafts),
    Mutant("eight-drafts-kept-for", "keeps no rows for more than eight rejected drafts", alter=_keep_for_eight),
    Mutant(
        "online-drafts-folded",
        "an online state folds drafts at once, and cannot take them back",
        alter=_fold_drafts,
        kind="online",
    ),
    Mutant("ring-race", "tokens of a long chunk overwrite each other's ring row", Stages(keep=_keep_all_backwards)),
    Mutant(
        "scale-floor-on-scale",
        "the scale has a floor where the format has one on amax",
        Stages(scatter=_scatter_as(_with_channels(_floor_on_scale))),
    ),
    Mutant(
        "scale-rounded-down",
        "power-of-two scales are rounded down, and the largest values saturate",
        Stages(scatter=_scatter_as(_with_channels(_round_down))),
    ),
    Mutant(
        "fp4-ties-down",
        "FP4 ties go down where the format rounds them to even",
        Stages(scatter=_scatter_as(_with_channels(_ties_down))),
    ),
    Mutant("fp4-nibbles-swapped", "the even channel is in the high nibble", Stages(scatter=_scatter_nibbles_swapped)),
    Mutant(
        "scales-inline",
        "scales follow their row instead of the page's rows",
        Stages(scatter=_scatter_as(lambda f: replace(f, sections=(tuple(n for s in f.sections for n in s),)))),
    ),
    Mutant("pad-unwritten", "the pad byte keeps what was there", Stages(scatter=_scatter_without_pad)),
    Mutant("int32-address", "byte offsets wrap at 2^31", Stages(scatter=_scatter_int32)),
)

MUTANTS: dict[str, Mutant] = {m.name: m for m in _ALL}
