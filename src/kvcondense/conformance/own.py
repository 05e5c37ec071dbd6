"""kvcondense's own backends and mutants as adapters, and an adapter by the name that is typed for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module

import torch

from kvcondense.api import condense
from kvcondense.backends import Backend, backend_names, get_backend
from kvcondense.conformance.adapter import Adapter, Capabilities, Factory, Setup
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.stored import stored
from kvcondense.errors import KvCondenseError, UnsupportedError, require_known
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.online import OnlineState
from kvcondense.layout.snapshot import export_live
from kvcondense.layout.state import StatePool
from kvcondense.snapshot import load_live, save_live, settle

KINDS = ("ring", "paged", "online")
"""Kinds of state of a kvcondense backend."""
_STATE_PAGE = 5


@dataclass
class BackendAdapter:
    """A kvcondense backend, with its state in a ring, in pages, or online."""

    impl: str | Backend = "auto"
    kind: str = "ring"
    capabilities: Capabilities = field(default_factory=lambda: Capabilities(formats=True))

    def __post_init__(self) -> None:
        if self.kind == "online":  # overlapping windows are read twice
            self.capabilities = replace(self.capabilities, specs=("hca", "fused", "r2"))
        specs = getattr(self.impl, "kit", None)
        if specs is not None:  # a backend that takes some of them only, and none of the quantised caches
            self.capabilities = replace(self.capabilities, specs=specs, formats=False)

    def init(self, setup: Setup) -> None:
        self.setup, spec = setup, setup.spec
        # Pages of a request are used again once its live rows have moved on.
        self.pages = (spec.window + setup.max_draft) // _STATE_PAGE + 3
        if self.kind == "paged":
            self.owned: StatePool | OnlineState = StatePool.paged(spec, setup.num_slots * self.pages, _STATE_PAGE)
            self.owned.reset(range(setup.num_slots * self.pages))
        else:
            ring = spec.required_ring_rows(setup.max_draft)
            self.owned = (
                OnlineState.allocate(spec, setup.num_slots, setup.max_draft)
                if self.kind == "online"
                else StatePool.ring(spec, setup.num_slots, ring)
            )
            self.owned.reset(range(setup.num_slots))
        self.cache = setup.new_cache()

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        s = self.setup
        condense(
            s.spec, kv_score, s.weights, s.rope, self._own(batch), state=self.owned, cache=self.cache, impl=self.impl
        )

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        return stored(self.cache, slots)

    def state(self, batch: RaggedBatch) -> torch.Tensor | None:
        if isinstance(self.owned, OnlineState):
            return settle(self.setup.spec, self.owned, batch, ape=self.setup.weights.ape, impl=self.impl)
        return export_live(self.setup.spec, self.owned, self._own(batch))

    def reset(self, slots: list[int]) -> None:
        if self.kind == "paged":
            slots = [s * self.pages + i for s in slots for i in range(self.pages)]
        self.owned.reset(slots)

    def export(self, batch: RaggedBatch) -> bytes:
        return save_live(self.setup.spec, self.owned, self._own(batch), ape=self.setup.weights.ape, impl=self.impl)

    def load(self, batch: RaggedBatch, payload: bytes) -> None:
        s = self.setup
        load_live(s.spec, self.owned, self._own(batch), payload, ape=s.weights.ape, impl=self.impl)

    def _own(self, batch: RaggedBatch) -> RaggedBatch:
        """Pages instead of slots, if that is how this state is addressed."""
        if self.kind != "paged" or batch.state_slots is None:
            return batch
        limit = self.setup.num_slots - 1
        if bool((batch.state_slots > limit).any()):
            raise UnsupportedError("state_slots", f"at most {limit}", int(batch.state_slots.max()))
        turn = torch.arange(-(-self.setup.max_positions // _STATE_PAGE)) % self.pages
        table = batch.state_slots.clamp(min=0)[:, None] * self.pages + turn
        return replace(batch, state_slots=None, state_block_table=table)


def load_factory(name: str) -> Factory:
    """An adapter by name: module:factory, a module with a BACKEND, a backend[:ring|paged|online], or mutant:NAME."""
    module, _, attribute = name.partition(":")
    if module in backend_names():
        if attribute not in ("", *KINDS):
            raise UnsupportedError("--adapter", f"{module}:{' or '.join(KINDS)}", name)
        return lambda: BackendAdapter(get_backend(module), attribute or "ring")
    if module == "mutant":
        require_known("--adapter mutant:NAME", attribute, MUTANTS)
        return lambda: BackendAdapter(MUTANTS[attribute], MUTANTS[attribute].kind)
    try:
        found = import_module(module)
    except Exception as error:  # whatever a module that is not ours raises
        hint = "a module outside of the installation needs its folder in PYTHONPATH"
        raise UnsupportedError(
            "--adapter", "module:factory that can be imported", f"{name} ({type(error).__name__}: {error})", hint
        ) from error
    if not attribute:
        backend = getattr(found, "BACKEND", None)
        if backend is None:
            raise UnsupportedError("--adapter", f"module:factory, or a module with a BACKEND ({module} has none)", name)
        return lambda: BackendAdapter(backend)
    factory = getattr(found, attribute, None)
    if not callable(factory):
        raise UnsupportedError("--adapter", f"a function in {module}", repr(attribute))

    def make() -> Adapter:
        try:
            adapter = factory()
        except KvCondenseError:
            raise
        except Exception as error:
            raise UnsupportedError("--adapter", f"{name}() to work", f"{type(error).__name__}: {error}") from error
        if not isinstance(adapter, Adapter):
            raise KvCondenseError("--adapter", f"{name}() with the methods of Adapter", type(adapter).__name__)
        return adapter

    return make
