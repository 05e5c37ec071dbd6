"""An adapter of an engine with FP8 pages for the conformance kit. Where it calls kvcondense, yours calls its kernels.

PYTHONPATH=examples kvcondense conformance --adapter adapter:make
"""

import torch

from kvcondense import RaggedBatch, StatePool, condense
from kvcondense.conformance import Capabilities, Engine, Setup

MAIN = "head_dim=512 rope_dim=64 format=fp8_model1 page_rows=64"
INDEXER = "head_dim=128 rope_dim=64 format=mxfp4_indexer page_rows=64"


class Adapter(Engine):
    """What the engine cannot do is not declared, and then not asked for."""

    capabilities = Capabilities((f"csa {MAIN}", f"hca {MAIN}", f"indexer {INDEXER}"), max_draft=7, exports=False)

    def init(self, setup: Setup) -> None:
        """``self.cache``: pages of that format, full of bytes that nobody may touch."""
        super().init(setup)
        self.ring = StatePool.ring(setup.spec, setup.num_slots, setup.spec.required_ring_rows(setup.max_draft))

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Take kv_score [T, 2N] fp32: kv channels first, then scores without ape."""
        s = self.setup
        condense(s.spec, kv_score, s.weights, s.rope, batch, state=self.ring, cache=self.cache)

    def reset(self, slots: list[int]) -> None:
        """Slots get new owners."""
        self.ring.reset(slots)


make = Adapter
