"""The functions users call: project, condense, store, compress, explain. Each binds a compressor and runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcondense import validate
from kvcondense.backends import Backend, backend_names, fused_forms, get_backend, select_projector
from kvcondense.bound import Bound, CondensedRows, bind, compress_together
from kvcondense.errors import DeviceError, KvCondenseError, RangeError, require
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.extremes import Slots
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages import project as project_stage
from kvcondense.stages import store as store_stage
from kvcondense.weights import CompressorWeights


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
    bound = _bound(spec, weights, rope, batch, plan, state, cache, latent, impl)
    if plan is None:
        validate.tensor("kv_score", kv_score, (None, spec.projected), validate.WEIGHT_DTYPES)
        plan = _planned(bound, batch, kv_score.shape[0], "kv_score")
    return bound.condense(kv_score, plan)


def store(rows: torch.Tensor, slot_mapping: torch.Tensor, cache: PagedCache) -> None:
    """Encode rows [E, head_dim] in the cache's format and write row e to cache row slot_mapping[e]; -1 writes nothing.

    Mutates ``cache``. Raises before anything is written if a slot is out of range or named twice.
    """
    require("cache", cache, PagedCache)
    validate.tensor("rows", rows, (None, cache.head_dim), (torch.float32, torch.float64, torch.bfloat16))
    if rows.device != cache.data.device:
        raise DeviceError("rows", f"device {cache.data.device} as the cache", rows.device)
    validate.tensor("slot_mapping", slot_mapping, (rows.shape[0],), (torch.int32, torch.int64), rows.device)
    validate.slots(Slots.of(slot_mapping), cache.num_rows)
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
    """Arguments of one of the ``compress`` calls that ``compress_many`` does; shared_blocks: as in ``bound.bind``."""

    spec: CompressorSpec
    weights: CompressorWeights
    rope: RopeTable | None
    batch: RaggedBatch
    plan: Plan | None = None
    state: StatePool | OnlineState | None = None
    cache: PagedCache | None = None
    latent: bool = False
    shared_blocks: bool = False


def compress_many(x: torch.Tensor, jobs: Sequence[Job], *, impl: str | Backend = "auto") -> tuple[CondensedRows, ...]:
    """``compress`` for several compressors that read the same x [T, D], as the main and the indexer's one of a layer.

    Backends may do them together: ``triton`` takes two in one launch where ``explain`` says so of both. Every job needs
    a state and a cache of its own, or, with ``shared_blocks``, blocks of its own in one memory, and then a state block
    table of its own; that no block is named twice is the engine's to see to. All are checked before any is written.
    """
    bounds, plans = [], []
    for job in jobs:
        require("job", job, Job)
        fields = (job.spec, job.weights, job.rope, job.batch, job.plan, job.state, job.cache, job.latent)
        bound = _bound(*fields, impl, job.shared_blocks)
        if job.plan is None:
            validate.projection(job.spec, x, job.weights)
        bounds.append(bound)
        plans.append(job.plan or _planned(bound, job.batch, x.shape[0], "x"))
    return compress_together(bounds, x, plans)


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
    validate.one_of(kv_score, x)
    bound = _bound(spec, weights, rope, batch, None, state, cache, False, "auto")
    name = "kv_score" if x is None else "x"
    if x is not None:
        kv_score = bound.unprojected(x)
    assert kv_score is not None
    validate.tensor(name, kv_score, (None, spec.projected), validate.WEIGHT_DTYPES)
    step = bound.step(kv_score, _planned(bound, batch, kv_score.shape[0], name), name)
    found = {name: get_backend(name).why_not(step) for name in backend_names()}
    if x is not None:
        for name in backend_names():
            forms = fused_forms(get_backend(name), step, x, bound.w)
            found |= {f"{name}, {form}": reason for form, reason in forms.items()}
    return found


def _bound(
    spec: CompressorSpec,
    weights: CompressorWeights,
    rope: RopeTable | None,
    batch: RaggedBatch,
    plan: Plan | None,
    state: StatePool | OnlineState | None,
    cache: PagedCache | None,
    latent: bool,
    impl: str | Backend,
    shared_blocks: bool = False,
) -> Bound:
    require("spec", spec, CompressorSpec)
    require("batch", batch, RaggedBatch)
    if plan is not None:
        require("plan", plan, Plan)
        if batch is not plan.batch and batch is not plan.given:
            raise KvCondenseError("plan", "the plan of this batch", "a plan of another batch")
    return bind(
        spec, weights, rope, state=state, cache=cache, latent=latent, impl=impl, shared_blocks=shared_blocks
    )  # fmt: skip


def _planned(bound: Bound, batch: RaggedBatch, rows: int, name: str) -> Plan:
    """The batch's plan; tokens that are not there are noticed before anything is made for them."""
    validate.enough(name, rows, batch)
    return bound.plan(batch)
