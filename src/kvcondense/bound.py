"""A compressor bound to what it works on: checked when it is made, then run with tokens and a plan.

Every way into a step leads through here: from above comes kv_score or x, below are the backends. A call compares a
handful of integers (``validate.geometry``, ``validate.admitted``), marks the state rows that it is about to write,
runs one backend, and says what the rows hold.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvcondense import marks, validate
from kvcondense.backends import Backend, Step, fused_form, select, select_projector
from kvcondense.errors import DeviceError, KvCondenseError, require
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.extremes import Layout
from kvcondense.layout.memory import check_apart, span
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.numerics import TILE, compute_dtype
from kvcondense.planning import Planner
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights


@dataclass(frozen=True)
class CondensedRows:
    """Finished rows of a step.

    values [E, head_dim] fp32 (fp64 for fp64 kv_score), before the cache's encoding: bf16-valued in the REFERENCE
    profile, except that a Hadamard product is not rounded yet. latent: the rows before RoPE, if asked for. request,
    window, slot [E]: whose row it is, its index in that request, and its cache row (-1: none).
    """

    values: torch.Tensor
    request: torch.Tensor
    window: torch.Tensor
    slot: torch.Tensor
    latent: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Form:
    """What a plan is compared with: the same object for all layers of a kind, so that it is compared once for them.

    device: of the weights. positions: of the RoPE table; page_rows, cache_rows: of the cache; None where there is none.
    """

    spec: CompressorSpec
    device: torch.device
    layout: Layout | None
    positions: int | None
    page_rows: int | None
    cache_rows: int | None


_form = functools.lru_cache(maxsize=256)(_Form)


@dataclass
class _Checked:
    """What ``bind`` has found out of a combination of objects; kept with its weights, which hold the others weakly.

    places: of all tensors that steps read and write; spans: first and last address of each that they write; form: what
    plans are admitted for; backends: the choice for each type of tokens; made: what backends keep (``Step.made``).
    """

    fixed: tuple[Any, ...]
    state: Callable[[], object]
    cache: Callable[[], object]
    places: tuple[Any, ...]
    spans: tuple[tuple[int, int], ...]
    form: _Form
    backends: dict[torch.dtype, Backend] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    def covers(self, fixed: tuple[Any, ...], state: object, cache: object, places: tuple[Any, ...]) -> bool:
        """True if these are the very objects, with their memory where it was."""
        same = all(a is b for a, b in zip(self.fixed, fixed, strict=True))
        return same and self.state() is state and self.cache() is cache and self.places == places


@dataclass(frozen=True, eq=False)
class Bound:
    """One compressor with its weights, RoPE table, state and cache, all shared with the caller; made by ``bind``."""

    spec: CompressorSpec
    weights: CompressorWeights
    rope: RopeTable | None
    state: StatePool | OnlineState | None
    cache: PagedCache | None
    latent: bool
    impl: str | Backend
    checked: _Checked

    def plan(self, batch: RaggedBatch) -> Plan:
        """The plan of a batch for this compressor, and for all that have its ratio, layout and pages."""
        layout = None if self.state is None else self.state.layout
        pages = None if self.cache is None else self.cache.page_rows
        return Planner([(self.spec, layout, pages)]).plans(batch)[0]

    def condense(self, kv_score: torch.Tensor, plan: Plan) -> CondensedRows:
        """A step from kv_score [T, projected]. Mutates state and cache; raises before anything is written."""
        step = self.step(kv_score, plan)
        backend = self.backend(step)
        return _run([step], lambda: backend.run(step))[0]

    def compress(self, x: torch.Tensor, plan: Plan) -> CondensedRows:
        """A step from hidden states x [T, D]. Mutates state and cache; raises before anything is written."""
        return compress_together([self], x, [plan])[0]

    def pool(self, plan: Plan) -> CondensedRows:
        """A step whose tokens are in the state already: its windows are pooled from there, and nothing is kept.

        For states that somebody else fills, token by token, as vLLM's first kernel does: pages with a row for every
        position (``StatePool.wrap(..., paged=True, keep_all=True)``). Where a caller knows a slot for each position
        instead, pages of one row take them: state_block_table[q, p]. Mutates the cache; raises before anything is
        written.
        """
        state = self.state
        paged = isinstance(state, StatePool) and isinstance(state.layout, PagedLayout) and state.layout.keep_all
        if not isinstance(state, StatePool) or not paged or state.tags is not None:
            wanted = "pages that others write, a row for every position"
            hint = "StatePool.wrap(..., paged=True, keep_all=True)"
            raise KvCondenseError("state", wanted, "none" if state is None else f"{state.layout}", hint)
        nothing = state.data.new_zeros(1, self.spec.projected)
        step = replace(self.step(nothing, plan, rows=plan.extremes.tokens), stored=True)
        backend = self.backend(step)
        return _run([step], lambda: backend.run(step))[0]

    def step(self, kv_score: torch.Tensor, plan: Plan, name: str = "kv_score", rows: int | None = None) -> Step:
        """The step that kv_score, called ``name``, and a plan make, admitted; ``rows``: as if it had so many."""
        self.take(kv_score, name)
        self.ready(plan, kv_score.shape[0] if rows is None else rows, name)
        # Backends leave rows of padding entries alone.
        make = kv_score.new_empty if plan.extremes.dense else kv_score.new_zeros
        shape, dtype = (plan.num_windows, self.spec.head_dim), compute_dtype(kv_score.dtype)
        return Step(
            spec=self.spec,
            plan=plan,
            kv_score=kv_score,
            ape=self.weights.ape,
            gamma=self.weights.norm,
            rope=self.rope,
            state=self.state,
            cache=self.cache,
            rows=make(shape, dtype=dtype),
            latent=make(shape, dtype=dtype) if self.latent else None,
            made=self.checked.made,
        )

    def take(self, kv_score: torch.Tensor, name: str = "kv_score") -> None:
        """Raise unless these are tokens [T, projected] that a step can read, in memory that it does not write."""
        validate.tokens(self.spec, name, kv_score, self.weights.norm.device)
        self.beside(name, kv_score)

    def beside(self, name: str, t: torch.Tensor) -> None:
        """Raise unless a tensor, called ``name``, lies beside all memory that steps write."""
        if self._near(t):
            check_apart(validate.written(self.state, self.cache), {name: t})

    def ready(self, plan: Plan, rows: int, name: str = "kv_score") -> None:
        """Raise unless a step by this plan, of so many tokens, finds all it needs where it was when it was bound.

        ``take`` looks at the tokens themselves. Together they ask for no value, but where the state has tags.
        """
        if self.checked.places != _places(self.weights, self.rope, self.state, self.cache):
            wanted = "the memory that was bound"
            raise KvCondenseError("weights, rope, state, cache", wanted, "other memory", "bind them again")
        self.admit(plan, rows, name)
        if self.state is None:
            if self.spec.window > 1:  # else nothing is read, and no value is asked for
                plan.facts(self.spec).reads.check_none(plan.batch)
        elif self.state.tags is not None:
            marks.check(self.spec, self.state, plan, plan.facts(self.spec))

    def _near(self, t: torch.Tensor) -> bool:
        """Whether a tensor lies, in part, between the first and last byte of one that steps write."""
        first, last = span(t)
        for begin, end in self.checked.spans:  # noqa: SIM110 - a generator takes twice the time
            if begin < last and first < end:
                return True
        return False

    def backend(self, step: Step) -> Backend:
        """The backend for a step; one that was named, or is the table's choice, is asked once for a type of tokens."""
        if not isinstance(self.impl, str):
            return select(self.impl, step)
        chosen = self.checked.backends.get(step.kv_score.dtype)
        if chosen is None:
            chosen = self.checked.backends[step.kv_score.dtype] = select(self.impl, step)
        return chosen

    def admit(self, plan: Plan, rows: int, name: str = "kv_score") -> None:
        """Raise unless every address that the plan's step forms, with this many tokens, lies in the buffers bound here.

        Asks for no value. The plan remembers: it is compared once for all layers of a kind, and ``Plan.copy_`` takes
        over no plan that would not be admitted.
        """
        form, passed = self.checked.form, plan.passed
        if passed.get(form, rows + 1) <= rows:
            return
        if plan.batch.query_start_loc.device != form.device:
            raise DeviceError("plan", f"device {form.device} as the weights", plan.batch.query_start_loc.device)
        validate.geometry(self.spec, plan, self.state, self.cache)
        validate.admitted(plan, rows, self.rope, self.cache, name)
        plan.admitted_to(rows, form.positions, form.cache_rows)
        passed[form] = rows

    def unprojected(self, x: torch.Tensor) -> torch.Tensor:
        """kv_score's shape and type without its memory: what a step is checked with before anything is projected."""
        validate.projection(self.spec, x, self.weights)
        dtype = compute_dtype(torch.promote_types(x.dtype, self.w.dtype))
        return x.new_empty(1, self.spec.projected, dtype=dtype).expand(x.shape[0], -1)

    @property
    def shared_blocks(self) -> bool:
        """As ``bind`` was told."""
        return bool(self.checked.fixed[-1])

    @property
    def w(self) -> torch.Tensor:
        """The merged weight of the projection."""
        assert self.weights.w is not None
        return self.weights.w


def bind(
    spec: CompressorSpec,
    weights: CompressorWeights,
    rope: RopeTable | None,
    *,
    state: StatePool | OnlineState | None = None,
    cache: PagedCache | None = None,
    latent: bool = False,
    impl: str | Backend = "auto",
    shared_blocks: bool = False,
) -> Bound:
    """A compressor with all that it works on, checked once: shapes, types, devices, and that no two share memory.

    ``condense`` and ``compress`` of the result run steps; ``latent``: rows before RoPE are returned, too. Weights,
    table, state and cache are shared, not copied. Raises a KvCondenseError that names the argument.

    ``shared_blocks``: state and cache are views of one memory whose blocks an engine deals out, to the state or to the
    cache, at one stride. They may lie over one another then; that no block is both is the engine's to see to.
    """
    require("spec", spec, CompressorSpec)
    require("weights", weights, CompressorWeights)
    if state is not None:
        require("state", state, (StatePool, OnlineState))
    if cache is not None:
        require("cache", cache, PagedCache)
    known: _Checked | None = vars(weights).get("_bound")
    fixed, places = (spec, rope, impl, shared_blocks), _places(weights, rope, state, cache)
    if known is None or not known.covers(fixed, state, cache, places):
        validate.layer(spec, weights, rope, state, cache, weights.norm.device, shared_blocks)
        spans = tuple(span(t) for t in validate.written(state, cache).values())
        of_cache = (None, None) if cache is None else (cache.page_rows, cache.num_rows)
        layout, positions = None if state is None else state.layout, None if rope is None else rope.cos.shape[0]
        form = _form(spec, weights.norm.device, layout, positions, *of_cache)
        known = vars(weights)["_bound"] = _Checked(fixed, _weakly(state), _weakly(cache), places, spans, form)
    return Bound(spec, weights, rope, state, cache, latent, impl, known)


def _places(weights: CompressorWeights, rope: Any, state: Any, cache: Any) -> tuple[Any, ...]:
    """Where what a step reads and writes lies, and in which form."""
    found: list[Any] = []
    for t in (weights.norm, weights.ape, *((rope.cos, rope.sin) if type(rope) is RopeTable else ())):
        if t is not None:
            found += (t.data_ptr(), t.shape)
    if state is not None:
        found.append(state.layout)
    if cache is not None:
        found += (cache.format, cache.page_rows)
    for owner in (state, cache):
        if owner is not None:
            for t in owner.memory:
                found += (t.data_ptr(), t.shape, t.stride(), t.dtype)
    return tuple(found)


def _weakly(owner: object) -> Callable[[], object]:
    return (lambda: None) if owner is None else weakref.ref(owner)


def compress_together(bounds: Sequence[Bound], x: torch.Tensor, plans: Sequence[Plan]) -> tuple[CondensedRows, ...]:
    """``compress`` of compressors that read the same x [T, D]; a backend may do two of them in one launch.

    All are checked before anything is written; no two may share a state or a cache. Of those that were bound with
    ``shared_blocks``, memory may be one as within each of them.
    """
    steps, ways = [], []
    for bound, plan in zip(bounds, plans, strict=True):
        unprojected = bound.unprojected(x)
        validate.no_gradients("x", x)
        step = bound.step(unprojected, plan, "x")
        backend: Any = bound.backend(step)
        form = fused_form(backend, step, x, bound.w)
        steps.append(step)
        ways.append((backend, form, None if form is not None else select_projector(bound.impl, x, bound.w)))
    _check_together(bounds, plans, x)

    def run() -> None:
        for way in dict.fromkeys(ways):
            backend, form, projector = way
            mine = [(s, b.w) for s, b, w in zip(steps, bounds, ways, strict=True) if w == way]
            if projector is None:
                backend.run_fused(form, [s for s, _ in mine], x, [w for _, w in mine])
                continue
            for step, w in mine:
                step.kv_score = projector.project(x, w, TILE)
                backend.run(step)

    return _run(steps, run)


def _check_together(bounds: Sequence[Bound], plans: Sequence[Plan], x: torch.Tensor) -> None:
    """Raise if a layer writes what another one writes, or x."""
    if len(bounds) == 1:
        bounds[0].beside("x", x)
        return
    jobs = [
        {f"{name} of job {i}": t for name, t in validate.written(bound.state, bound.cache).items()}
        for i, bound in enumerate(bounds)
    ]
    for i, mine in enumerate(jobs):
        for name, t in mine.items():
            check_apart({name: t}, {"x": x})
        for j, other in enumerate(jobs[:i]):
            one_memory = validate.apart(mine, other, bounds[i].shared_blocks and bounds[j].shared_blocks)
            table = plans[i].batch.state_block_table
            if one_memory and table is not None and table is plans[j].batch.state_block_table:
                raise KvCondenseError(f"batch of job {i}", "blocks of its own", f"the state_block_table of job {j}")


def _run(steps: Sequence[Step], run: Callable[[], None]) -> tuple[CondensedRows, ...]:
    """Run steps; their rows."""
    marked([(s.spec, s.state, s.plan) for s in steps], run)
    return tuple([_rows(step) for step in steps])


def marked(
    jobs: Sequence[tuple[CompressorSpec, StatePool | OnlineState | None, Plan]], run: Callable[[], None]
) -> None:
    """Run steps; meanwhile nobody takes the state rows that they write for what they were, or for what they become."""
    told = [(s, plan, plan.facts(spec)) for spec, s, plan in jobs if s is not None and s.tags is not None]
    for state, plan, facts in told:
        marks.begin(state, plan, facts)
    run()
    for state, plan, facts in told:
        marks.name(state, plan, facts)


def _rows(step: Step) -> CondensedRows:
    plan = step.plan
    return CondensedRows(step.rows, plan.window_request, plan.window_index, plan.window_slot, step.latent)
