"""The step as a torch operator: for torch.compile and graph capture. A layer is checked once, then steps are trusted.

``torch.ops.kvcondense.condense`` has a fake, so that a compiler can trace through it; it asks for no value on the host,
allocates its rows and nothing else that outlives it, and launches on the current stream.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from kvcondense import validate
from kvcondense.backends import Backend, Step, select
from kvcondense.errors import KvCondenseError, require
from kvcondense.formats import CacheFormat
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineLayout, OnlineState
from kvcondense.layout.plan import Layout, Plan
from kvcondense.layout.state import PagedLayout, StatePool
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


_statics: dict[str, _Static] = {}


@dataclass(frozen=True)
class Bound:
    """One layer's compressor with its weights, state and cache. Call it with kv_score [T, projected] and a plan.

    Returns rows [E, head_dim] fp32 and the latent rows [E, head_dim] ([0, head_dim] unless ``latent``); rows of padding
    entries hold anything. Mutates state and cache as ``condense`` does. A call checks the geometry of its plan, but no
    values: whoever builds a plan with ``Plan.build`` had them checked; tags of a state pool are neither looked at
    nor kept, so it must have none.
    """

    spec: CompressorSpec
    weights: CompressorWeights
    rope: RopeTable | None
    state: StatePool | OnlineState | None
    cache: PagedCache | None
    latent: bool
    key: str

    def __call__(self, kv_score: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        validate.geometry(plan, self.state, self.cache)
        if kv_score.shape[1] != self.spec.projected:
            raise KvCondenseError("kv_score", f"[T, {self.spec.projected}]", list(kv_score.shape))
        none = plan.batch.query_start_loc[:0]  # a list of tensors has no place for None
        layer = [self.weights.norm, none, none, none]
        if self.weights.ape is not None:
            layer[1] = self.weights.ape
        if self.rope is not None:
            layer[2:] = [self.rope.cos, self.rope.sin]
        values = [getattr(plan.batch, name) for name in _BATCH]
        step = [none if t is None else t for t in values] + [getattr(plan, name) for name in _PLAN]
        memory = [plan.counters]
        if isinstance(self.state, OnlineState):
            memory += [self.state.acc, self.state.folded, self.state.log]
        elif self.state is not None:
            memory.append(self.state.data)
        if self.cache is not None:
            memory.append(self.cache.data)
            if self.cache.scales is not None:
                memory.append(self.cache.scales)
        return _condense(kv_score, layer, step, memory, self.key, plan.overwrites, self.latent)


def bind(
    spec: CompressorSpec,
    weights: CompressorWeights,
    rope: RopeTable | None,
    *,
    state: StatePool | OnlineState | None = None,
    cache: PagedCache | None = None,
    latent: bool = False,
    impl: str | Backend = "auto",
) -> Bound:
    """Check once that everything a layer owns fits together; the result runs steps without looking again.

    Raises as ``condense`` does, and KvCondenseError for a state pool with tags (``state.tags = None`` drops them): they
    would go stale.
    """
    require("spec", spec, CompressorSpec)
    require("weights", weights, CompressorWeights)
    validate.layer(spec, weights, rope, state, cache, weights.norm.device)
    if state is not None and state.tags is not None:
        raise KvCondenseError("state.tags", "None (steps of a bound layer do not keep tags)", "tags")
    layout = None if state is None else state.layout
    form, page_rows = (None, 0) if cache is None else (cache.format, cache.page_rows)
    strict = cache is not None and cache.strict
    name = impl if isinstance(impl, str) else f"{impl.name}#{id(impl)}"
    key = json.dumps([spec.as_dict(), repr(layout), form and form.name, page_rows, strict, name])
    _statics[key] = _Static(spec, layout, form, page_rows, strict, impl)
    return Bound(spec, weights, rope, state, cache, latent, key)


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
    """layer: gamma, ape, cos, sin; plan: the fields of a batch, then of a plan; memory: counters, state, cache, scales.

    An empty tensor stands for one that is not there.
    """
    static = _statics[key]
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
        state = StatePool(memory.pop(0), layout)
    cache = None
    if static.form is not None:
        data = memory.pop(0)
        scales = memory.pop(0) if memory else None
        cache = PagedCache(data, static.form, spec.head_dim, static.page_rows, scales, static.strict)
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
