"""An adapter for the conformance kit; where this calls kvcondense's functions, yours calls the engine's kernels.

PYTHONPATH=examples kvcondense conformance --adapter adapter:make
"""

from __future__ import annotations

import torch

from kvcondense import PagedCache, RaggedBatch, StatePool, condense
from kvcondense.conformance import Capabilities
from kvcondense.conformance.adapter import Setup
from kvcondense.conformance.stored import CANARY


class EngineAdapter:
    """What the engine cannot do stands in ``capabilities``; it is then not asked for."""

    capabilities = Capabilities(max_draft=7, exports=False, returns_state=False)

    def init(self, setup: Setup) -> None:
        """Make room for slots and pages, with bytes that nobody may touch."""
        self.setup = setup
        self.ring = StatePool.ring(setup.spec, setup.num_slots, setup.spec.required_ring_rows(setup.max_draft))
        pages = torch.empty(setup.num_pages, setup.page_rows, setup.spec.head_dim, dtype=torch.bfloat16)
        self.cache = PagedCache.wrap(pages)
        if setup.num_pages < 1 << 16:  # one history has a cache beyond 2^31 bytes
            self.cache.data.fill_(CANARY)

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Run a step: kv_score [T, 2N] fp32, kv channels first, scores without ape."""
        s = self.setup
        condense(s.spec, kv_score, s.weights, s.rope, batch, state=self.ring, cache=self.cache)

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of the cache."""
        return self.cache.rows[slots // self.setup.page_rows, slots % self.setup.page_rows]

    def state(self, batch: RaggedBatch) -> None:
        """No state is returned."""

    def reset(self, slots: list[int]) -> None:
        """Slots get new owners."""
        self.ring.reset(slots)

    def export(self, batch: RaggedBatch) -> bytes:
        """Not asked for."""
        raise NotImplementedError

    def load(self, batch: RaggedBatch, payload: bytes) -> None:
        """Not asked for."""
        raise NotImplementedError


def make() -> EngineAdapter:
    """What ``--adapter adapter:make`` calls."""
    return EngineAdapter()
