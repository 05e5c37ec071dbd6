"""The functions users call: project, condense, store, compress, explain. Validate, plan, pick a backend, run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense import validate
from kvcondense.backends import (
    Backend,
    Step,
    backend_names,
    fused_form,
    fused_forms,
    get_backend,
    select,
    select_projector,
)
from kvcondense.errors import DeviceError, KvCondenseError, RangeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan, Slots
from kvcondense.layout.state import StatePool
from kvcondense.numerics import compute_dtype
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages import project as project_stage
from kvcondense.stages import store as store_stage
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


def project(
    spec: CompressorSpec,
    x: torch.Tensor,
    weights: CompressorWeights,
    *,
    tile: int | None = project_stage.TILE,
    impl: str | Backend = "auto",
) -> torch.Tensor:
    """kv_score = x @ w.T: x [T, D] -> [T, 2N] fp32, kv channels first, then scores ([T, N] without a gate).

    Products of bf16 values are exact and summed in fp32. A token gives the same bits in any batch: ``cpu`` (bf16 x and
    w) sums in an order that depends on D alone; ``reference`` runs GEMMs of ``tile`` tokens, all of one shape (checked
    on the CPU by a test), or, with ``tile=None``, one GEMM that promises nothing. Raises ShapeError, DtypeError,
    DeviceError, or UnsupportedError if ``impl`` cannot run this.
    """
    validate.projection(spec, x, weights)
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise RangeError("tile", "None or an integer of at least 1", repr(tile))
    assert weights.w is not None
    return select_projector(impl, x, weights.w).project(x, weights.w, tile)


def condense(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    *,
    plan: Plan | None = None,
    state: StatePool | OnlineState | None = None,
    cache: PagedCache | None = None,
    latent: bool = False,
    impl: str | Backend = "auto",
) -> CondensedRows:
    """Emit a row for every window that the batch completes and keep the state that later steps need.

    For every request, token t at position p stores [K_p | Z_p + ape[p mod r]]; when (p + 1) mod r == 0, window p // r
    is pooled (P = sum softmax(Z) K per channel), normalised, rotated at its first position and, if the spec says so,
    Hadamard-rotated. Rows go to ``cache`` at ``batch.slot_mapping`` or ``batch.block_table`` and are returned. One call
    takes prefill, chunks at any start, decode and verify requests together; any split gives the same bytes.

    kv_score [T, projected] (bf16, fp16, fp32 or fp64; strided views are fine; rows past query_start_loc[-1] are
    ignored). ``state`` may be None if no request needs history. ``plan`` can be shared by all layers of a ratio;
    the default builds it. Mutates ``state`` and ``cache``. Raises a KvCondenseError before anything is written.
    """
    step = _step(spec, kv_score, weights, rope, batch, plan, state, cache, latent)
    select(impl, step).run(step)
    return _done(step)


def _done(step: Step) -> CondensedRows:
    """What a finished step gives back, its kept rows tagged."""
    plan, state, spec, batch = step.plan, step.state, step.spec, step.plan.batch
    if state is not None and state.tags is not None:
        facts = plan.facts(spec)
        state.tag(batch, facts.dense.keep_row, facts.dense.keep_position, facts.active)
    return CondensedRows(step.rows, plan.window_request, plan.window_index, plan.window_slot, step.latent)


def store(rows: torch.Tensor, slot_mapping: torch.Tensor, cache: PagedCache) -> None:
    """Encode rows [E, head_dim] in the cache's format and write row e to cache row slot_mapping[e]; -1 writes nothing.

    Mutates ``cache``. Raises before anything is written if a slot is out of range or named twice.
    """
    require("cache", cache, PagedCache)
    validate.tensor("rows", rows, (None, cache.head_dim), (torch.float32, torch.float64, torch.bfloat16))
    if rows.device != cache.data.device:
        raise DeviceError("rows", f"device {cache.data.device} as the cache", rows.device)
    validate.tensor("slot_mapping", slot_mapping, (rows.shape[0],), (torch.int32, torch.int64), rows.device)
    validate.slots(Slots.of(slot_mapping), cache)
    store_stage.scatter(rows, slot_mapping.to(torch.int64), cache)


def compress(
    spec: CompressorSpec,
    x: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    *,
    plan: Plan | None = None,
    state: StatePool | OnlineState | None = None,
    cache: PagedCache | None = None,
    latent: bool = False,
    impl: str | Backend = "auto",
) -> CondensedRows:
    """``project``, then ``condense``: hidden states x [T, D] to finished rows. See there for arguments and errors.

    A backend may do both at once, with kv_score nowhere in memory, where that is faster; ``explain`` says when. The
    rows then are the same up to the order of the projection's sum: see ``TritonBackend`` for what fixes it.
    """
    return compress_many(x, [Job(spec, weights, rope, batch, plan, state, cache, latent)], impl=impl)[0]


@dataclass(frozen=True)
class Job:
    """Arguments of one of the ``compress`` calls that ``compress_many`` does."""

    spec: CompressorSpec
    weights: CompressorWeights
    rope: RopeTable | None
    batch: RaggedBatch
    plan: Plan | None = None
    state: StatePool | OnlineState | None = None
    cache: PagedCache | None = None
    latent: bool = False


def compress_many(x: torch.Tensor, jobs: Sequence[Job], *, impl: str | Backend = "auto") -> tuple[CondensedRows, ...]:
    """``compress`` for several compressors that read the same x [T, D], as the main and the indexer's one of a layer.

    Backends may do them together: ``triton`` takes two in one launch where ``explain`` says so of both. Every job needs
    a state and a cache of its own. All are checked before anything is written.
    """
    steps, ways = [], []
    for job in jobs:
        require("job", job, Job)
        validate.projection(job.spec, x, job.weights)
        assert job.weights.w is not None
        unprojected = _unprojected(job.spec, x, job.weights.w)
        steps.append(
            _step(job.spec, unprojected, job.weights, job.rope, job.batch, job.plan, job.state, job.cache, job.latent)
        )
        backend: Any = select(impl, steps[-1])
        ways.append((backend, fused_form(backend, steps[-1], x, job.weights.w)))
    if len(steps) > 1:
        states = [s.acc if isinstance(s, OnlineState) else s and s.data for s in (step.state for step in steps)]
        validate.separate("state", states)
        validate.separate("cache", [step.cache and step.cache.data for step in steps])
    for way in dict.fromkeys(ways):
        backend, form = way
        mine = [(s, j) for s, j, w in zip(steps, jobs, ways, strict=True) if w == way]
        if form is not None:
            backend.run_fused(form, [s for s, _ in mine], x, [j.weights.w for _, j in mine])
            continue
        for step, job in mine:
            kv_score = project(job.spec, x, job.weights, impl=impl)
            projected = replace(step, kv_score=kv_score)
            select(impl, projected).run(projected)
    return tuple(_done(step) for step in steps)


def _unprojected(spec: CompressorSpec, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """kv_score's shape and type without its memory: what a step is checked with before anything is projected."""
    dtype = compute_dtype(torch.promote_types(x.dtype, w.dtype))
    return x.new_zeros(1, spec.projected, dtype=dtype).expand(x.shape[0], -1)


def explain(
    spec: CompressorSpec,
    kv_score: torch.Tensor | None,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    *,
    state: StatePool | OnlineState | None = None,
    cache: PagedCache | None = None,
    x: torch.Tensor | None = None,
) -> dict[str, str | None]:
    """For each backend: None if it can run this ``condense`` call, else the reason. Writes nothing.

    With x in the place of kv_score (which is None) the call is ``compress``, and "NAME, FORM" says the same of each way
    that a backend has to project and condense at once; it takes the first that has no reason against it.
    """
    if (kv_score is None) == (x is None):
        raise KvCondenseError("x", "exactly one of kv_score and x", "both or neither" if x is None else "both")
    if x is not None:
        validate.projection(spec, x, weights)
        assert weights.w is not None
        kv_score = _unprojected(spec, x, weights.w)
    assert kv_score is not None
    step = _step(spec, kv_score, weights, rope, batch, None, state, cache, False)
    found = {name: get_backend(name).why_not(step) for name in backend_names()}
    if x is not None and weights.w is not None:
        for name in backend_names():
            forms = fused_forms(get_backend(name), step, x, weights.w)
            found |= {f"{name}, {form}": reason for form, reason in forms.items()}
    return found


def _step(
    spec: CompressorSpec,
    kv_score: torch.Tensor,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    plan: Plan | None,
    state: StatePool | OnlineState | None,
    cache: PagedCache | None,
    latent: bool,
) -> Step:
    validate.batch_and_plan(spec, batch, plan, state, cache)
    if plan is None:
        plan = Plan.build(
            spec,
            batch,
            state_layout=None if state is None else state.layout,
            page_rows=None if cache is None else cache.page_rows,
        )
    validate.step(spec, kv_score, weights, rope, plan, state, cache)
    # Backends leave rows of padding entries alone.
    make = torch.empty if plan.facts(spec).dense is plan else torch.zeros
    rows = make(plan.num_windows, spec.head_dim, dtype=compute_dtype(kv_score.dtype), device=kv_score.device)
    return Step(
        spec=spec,
        plan=plan,
        kv_score=kv_score,
        ape=weights.ape,
        gamma=weights.norm,
        rope=rope,
        state=state,
        cache=cache,
        rows=rows,
        latent=make(rows.shape, dtype=rows.dtype, device=rows.device) if latent else None,
    )
