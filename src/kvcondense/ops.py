"""The step of a bound compressor as a torch operator: for torch.compile and graph capture.

``torch.ops.kvcondense.condense`` has a fake, so that a compiler can trace through it; it asks for no value on the host,
allocates its rows and nothing else that outlives it, and launches on the current stream.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from kvcondense import validate
from kvcondense.backends import Backend, Step, select
from kvcondense.bound import Bound
from kvcondense.bound import bind as bound_to
from kvcondense.errors import KvCondenseError, ShapeError
from kvcondense.formats import CacheFormat
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.extremes import Extremes, Layout
from kvcondense.layout.memory import check_apart
from kvcondense.layout.online import OnlineLayout, OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.numerics import compute_dtype
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

_BATCH = tuple(f.name for f in fields(RaggedBatch))
_PLAN = (
    "window_request", "window_index", "window_slot", "keep_token", "keep_request", "keep_position", "keep_row",
)  # fmt: skip


@dataclass(frozen=True)
class _Static:
    """What an operator call cannot carry as tensors or numbers."""

    spec: CompressorSpec
    layout: Layout | None
    form: CacheFormat | None
    page_rows: int
    strict: bool
    backend: str | Backend
    apart: bool  # the state has its scores in a tensor of their own


_statics: dict[str, _Static] = {}
_keys: dict[_Static, str] = {}
_numbers = itertools.count()  # two threads that bind at once get two


@dataclass(frozen=True, eq=False)
class Operator:
    """A bound compressor as an operator. Call it with kv_score [T, projected] and a plan.

    Returns rows [E, head_dim] fp32 and the latent rows [E, head_dim] ([0, head_dim] unless ``latent``); rows of padding
    entries hold anything. Mutates state and cache as ``condense`` does. A call compares what its plan reaches at most
    with the sizes bound here, without asking a device; a captured graph is replayed without that, hence a static plan
    (``Plan.build_static``), whose entries stay inside them, or ``Plan.copy_``, which takes over no plan that does not.
    """

    bound: Bound
    key: str

    def __call__(self, kv_score: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        bound = self.bound
        if kv_score.dim() != 2 or kv_score.shape[1] != bound.spec.projected:
            raise ShapeError("kv_score", f"shape [any, {bound.spec.projected}]", list(kv_score.shape))
        bound.admit(plan, kv_score.shape[0])
        none = plan.batch.query_start_loc[:0]  # a list of tensors has no place for None
        layer = [bound.weights.norm, none, none, none]
        if bound.weights.ape is not None:
            layer[1] = bound.weights.ape
        if bound.rope is not None:
            layer[2:] = [bound.rope.cos, bound.rope.sin]
        values = [getattr(plan.batch, name) for name in _BATCH]
        step = [none if t is None else t for t in values] + [getattr(plan, name) for name in _PLAN]
        memory = [plan.counters, *validate.written(bound.state, bound.cache).values()]
        return _condense(kv_score, layer, step, memory, self.key, plan.overwrites, bound.latent)


def bind(
    spec: CompressorSpec,
    weights: CompressorWeights,
    rope: RopeTable | None,
    *,
    state: StatePool | OnlineState | None = None,
    cache: PagedCache | None = None,
    latent: bool = False,
    impl: str | Backend = "auto",
) -> Operator:
    """``kvcondense.bound.bind``, as a torch operator.

    Raises as that does, and KvCondenseError for a state pool with tags (``state.tags = None`` drops them): they would
    go stale.
    """
    bound = bound_to(spec, weights, rope, state=state, cache=cache, latent=latent, impl=impl)
    if state is not None and state.tags is not None:
        raise KvCondenseError("state.tags", "None (steps of an operator do not keep tags)", "tags")
    layout = None if state is None else state.layout
    form, page_rows = (None, 0) if cache is None else (cache.format, cache.page_rows)
    apart = isinstance(state, StatePool) and state.score is not None
    static = _Static(spec, layout, form, page_rows, cache is not None and cache.strict, impl, apart)
    key = _keys.setdefault(static, str(next(_numbers)))
    _statics[key] = static
    return Operator(bound, key)


@torch.library.custom_op("kvcondense::condense", mutates_args=("memory",))
def _condense(
    kv_score: torch.Tensor,
    layer: Sequence[torch.Tensor],
    plan: Sequence[torch.Tensor],
    memory: Sequence[torch.Tensor],
    key: str,
    overwrites: bool,
    latent: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """layer: gamma, ape, cos, sin; plan: the fields of a batch, then of a plan; memory: counters, state, cache.

    State and cache may be two tensors each. An empty tensor stands for one that is not there.
    """
    static = _statics[key]
    validate.tokens(static.spec, "kv_score", kv_score, plan[0].device)
    check_apart({f"memory of the state or cache ({i})": t for i, t in enumerate(memory)}, {"kv_score": kv_score})
    rows, before_rope = _outputs(kv_score, plan, key, latent)
    step = _step(static, kv_score, layer, plan, list(memory), overwrites)
    step = replace(step, rows=rows, latent=before_rope if latent else None)
    select(static.backend, step).run(step)
    return rows, before_rope


@_condense.register_fake
def _fake(
    kv_score: torch.Tensor,
    layer: Sequence[torch.Tensor],
    plan: Sequence[torch.Tensor],
    memory: Sequence[torch.Tensor],
    key: str,
    overwrites: bool,
    latent: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    del layer, memory, overwrites
    return _outputs(kv_score, plan, key, latent)


def _outputs(
    kv_score: torch.Tensor, plan: Sequence[torch.Tensor], key: str, latent: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    windows, d = plan[len(_BATCH)].shape[0], _statics[key].spec.head_dim
    dtype = compute_dtype(kv_score.dtype)
    return kv_score.new_empty(windows, d, dtype=dtype), kv_score.new_empty(windows if latent else 0, d, dtype=dtype)


def _step(
    static: _Static,
    kv_score: torch.Tensor,
    layer: Sequence[torch.Tensor],
    plan: Sequence[torch.Tensor],
    memory: list[torch.Tensor],
    overwrites: bool,
) -> Step:
    """The step that these tensors mean, without its outputs."""
    spec, layout, counters = static.spec, static.layout, memory.pop(0)
    optional = dict(zip(_BATCH, plan, strict=False))
    always = ("query_start_loc", "start_positions", "draft_rows")
    used = (
        {"state_block_table"} if isinstance(layout, PagedLayout) else {"state_slots"} if layout is not None else set()
    )
    batch = RaggedBatch(**{n: t for n, t in optional.items() if n in always or n in used})
    state: StatePool | OnlineState | None = None
    if isinstance(layout, OnlineLayout):
        state = OnlineState(memory.pop(0), memory.pop(0), memory.pop(0), layout)
    elif layout is not None:
        state = StatePool(memory.pop(0), layout, score=memory.pop(0) if static.apart else None)
    cache = None
    if static.form is not None:
        data, beside = memory.pop(0), memory.pop(0) if memory else None
        named = {"second" if static.form.second(spec.head_dim) else "scales": beside}
        cache = PagedCache(data, static.form, spec.head_dim, static.page_rows, strict=static.strict, **named)
    rows = kv_score.new_empty(0, spec.head_dim)
    return Step(
        spec=spec,
        plan=Plan(
            ratio=spec.ratio,
            overlap=spec.overlap,
            batch=batch,
            state_layout=layout,
            page_rows=static.page_rows or None,
            **dict(zip(_PLAN, plan[len(_BATCH) :], strict=True)),
            overwrites=overwrites,
            counters=counters,
            extremes=Extremes(kv_score.shape[0], None, None, dense=False),
            given=batch,
        ),
        kv_score=kv_score,
        ape=layer[1] if layer[1].numel() else None,
        gamma=layer[0],
        rope=RopeTable(layer[2], layer[3]) if layer[2].numel() else None,
        state=state,
        cache=cache,
        rows=rows,
        latent=None,
    )
