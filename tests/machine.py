"""A little serving engine for tests: requests with random tokens, ring or paged state, a paged cache."""

from dataclasses import replace

import torch

from kvcondense import (
    CompressorSpec,
    CompressorWeights,
    ModelConfig,
    OnlineState,
    PagedCache,
    RaggedBatch,
    RopeTable,
    StatePool,
)
from kvcondense.api import condense
from kvcondense.layout.snapshot import export_live
from kvcondense.snapshot import settle
from kvcondense.spec import Rounding

PATTERN = 5.0
CONFIG = replace(ModelConfig.DEMO, name="tiny", head_dim=16, rope_dim=8, index_head_dim=16, hidden_size=32)
PAGE = 3  # rows per cache page; no divisor of anything

SPECS = {
    "csa": CompressorSpec(ratio=4, head_dim=16, eps=1e-6, rope_dim=8, overlap=True),
    "indexer": CompressorSpec(ratio=4, head_dim=16, eps=1e-6, rope_dim=8, overlap=True, rotate=True),
    "hca": CompressorSpec(ratio=128, head_dim=16, eps=1e-6, rope_dim=8),
    "r8": CompressorSpec(ratio=8, head_dim=16, eps=1e-6, rope_dim=8, rounding=Rounding.FUSED),
    "r8-overlap": CompressorSpec(ratio=8, head_dim=16, eps=1e-6, rope_dim=8, overlap=True, has_ape=False),
    "r2": CompressorSpec(ratio=2, head_dim=16, eps=1e-20, rope_dim=8, has_ape=False),
    "r2-overlap": CompressorSpec(ratio=2, head_dim=16, eps=1e-6, rope_dim=8, overlap=True),
    "r1": CompressorSpec(ratio=1, head_dim=16, eps=1e-20, rope_dim=8, has_ape=False, has_gate=False),
    "r1-overlap": CompressorSpec(ratio=1, head_dim=16, eps=1e-6, rope_dim=0, overlap=True),
    "gateless": CompressorSpec(ratio=4, head_dim=16, eps=1e-6, rope_dim=8, overlap=True, has_gate=False),
}


STATES = {"ring": {}, "paged": {"paged": True}, "online": {"online": True}}
PAIRS = [(n, k) for n, s in SPECS.items() for k in STATES if k != "online" or not s.overlap]
"""Every spec with every kind of state that can hold it."""


def weights(spec, seed=0, hidden=None):
    gen = torch.Generator().manual_seed(seed + 17)
    return CompressorWeights(
        norm=1 + 0.3 * torch.randn(spec.head_dim, generator=gen),
        ape=0.5 * torch.randn(spec.ratio, spec.width, generator=gen) if spec.has_ape else None,
        w=None if hidden is None else torch.randn(spec.projected, hidden, generator=gen) / hidden**0.5,
    )


def rope(spec, positions):
    config = replace(CONFIG, head_dim=spec.head_dim, rope_dim=spec.rope_dim)
    return RopeTable.build(config, positions) if spec.rope_dim else None


def tokens(spec, length, seed=0):
    return torch.randn(length, spec.projected, generator=torch.Generator().manual_seed(seed))


class Machine:
    """Requests advance by ``feed``; what ``cache_of`` and ``live_of`` return must not depend on how they got there."""

    def __init__(
        self, spec, sequences, *, paged=False, online=False, max_draft=0, seed=0, dtype=torch.float32, impl="auto",
        page=PAGE, format="bf16",
    ):  # fmt: skip
        self.spec, self.sequences, self.impl, self.paged, self.online = spec, sequences, impl, paged, online
        self.page = page
        extra = 2  # slots that nobody owns
        self.weights = weights(spec)
        longest = max((s.shape[0] for s in sequences), default=0) + max_draft + 1
        self.rope = rope(spec, longest)
        gen = torch.Generator().manual_seed(seed)
        n = len(sequences)
        page_rows = 5
        pages = -(-longest // page_rows)
        if paged:
            self.state = StatePool.paged(spec, n * pages + 1, page_rows, dtype=dtype)
            self.state_table = torch.randperm(n * pages + 1, generator=gen)[: n * pages].view(n, pages)
            self.slots = None
        else:
            if online:
                self.state = OnlineState.allocate(spec, n + extra, max_draft)
            else:
                self.state = StatePool.ring(spec, n + extra, spec.required_ring_rows(max_draft), dtype=dtype)
            self.slots = torch.randperm(n + extra, generator=gen)[:n]
            self.state_table = None
        cache_pages = longest // spec.ratio // page + 1
        self.cache = PagedCache.allocate(spec.head_dim, n * cache_pages + 1, page, format=format)
        if format == "bf16":
            self.cache.rows.fill_(PATTERN)
        self.table = (torch.randperm(n * cache_pages, generator=gen) + 1).view(n, cache_pages)
        self.done = [0] * n

    def batch(self, counts, order=None, drafts=0):
        order = list(range(len(counts))) if order is None else order
        return RaggedBatch.build(
            [0, *torch.tensor([counts[q] for q in order], dtype=torch.int64).cumsum(0).tolist()],
            start_positions=[self.done[q] for q in order],
            state_slots=None if self.slots is None else self.slots[order],
            state_block_table=None if self.state_table is None else self.state_table[order],
            block_table=self.table[order],
            draft_rows=drafts,
        )

    def feed(self, counts, *, order=None, drafts=0, junk=None, padding=0, accept=None):
        """One step. With ``junk`` the last ``drafts`` tokens are replaced by it; ``accept`` tokens are committed."""
        order = list(range(len(counts))) if order is None else order
        chunks = []
        for q in order:
            chunk = self.sequences[q][self.done[q] : self.done[q] + counts[q]].clone()
            assert chunk.shape[0] == counts[q]
            if junk is not None and counts[q]:
                chunk[counts[q] - drafts :] = junk
            chunks.append(chunk)
        pad = torch.full((padding, self.spec.projected), float("nan"))
        rows = condense(
            self.spec,
            torch.cat([*chunks, pad]),
            self.weights,
            self.rope,
            self.batch(counts, order, drafts),
            state=self.state,
            cache=self.cache,
            impl=self.impl,
        )
        for q in order:
            self.done[q] += counts[q] if accept is None else min(accept, counts[q])
        return rows

    def cache_of(self, q):
        """Rows that are visible after what was committed, as raw bf16 bits."""
        visible = self.spec.visible_rows(self.done[q])
        c = torch.arange(visible)
        slot = self.table[q][c // self.page] * self.page + c % self.page
        return self.cache.rows[slot // self.page, slot % self.page].view(torch.int16)

    def at(self, q):
        """Request ``q`` where it stands, without tokens."""
        return batch_of_one(self.batch([0] * len(self.sequences)), q)

    def live_of(self, q):
        """Live state rows (of an online state: the running values at the committed position), as raw bits."""
        if self.online:
            return settle(self.spec, self.state, self.at(q), ape=self.weights.ape, impl=self.impl).view(torch.int32)
        return export_live(self.spec, self.state, self.at(q)).view(torch.int32)

    def whole(self, q):
        """A fresh machine that takes the committed tokens of request ``q`` in one call, alone."""
        alone = Machine(
            self.spec, [self.sequences[q][: self.done[q]]], seed=99, dtype=self.state.dtype, online=self.online
        )
        alone.feed([self.done[q]])
        return alone


def batch_of_one(batch, q):
    """Request ``q`` of a batch without tokens."""
    return replace(
        batch,
        query_start_loc=torch.zeros(2, dtype=torch.int64),
        start_positions=batch.start_positions[q : q + 1],
        draft_rows=batch.draft_rows[q : q + 1],
        state_slots=None if batch.state_slots is None else batch.state_slots[q : q + 1],
        state_block_table=None if batch.state_block_table is None else batch.state_block_table[q : q + 1],
        block_table=None if batch.block_table is None else batch.block_table[q : q + 1],
    )


def same(a, b):
    """Equal bits and shape, and not vacuous: returns whether anything was compared."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert torch.equal(a, b)
    return a.numel() > 0
