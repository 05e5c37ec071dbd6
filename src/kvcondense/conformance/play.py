"""Play a case on an adapter: its script, op by op."""

from __future__ import annotations

import torch

from kvcondense.conformance import stored
from kvcondense.conformance.adapter import Adapter, Factory, Setup
from kvcondense.conformance.cases import Case
from kvcondense.conformance.coverage import Coverage
from kvcondense.conformance.script import Begin, Copy, Request, Reset, Script, Step
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import FP32_LOWEST
from kvcondense.snapshot import save_live

_PREFIX_CHUNK = 4096


class Player:
    """An adapter, the script that it plays, and what that visited."""

    def __init__(self, case: Case, make: Factory) -> None:
        self.case, self.make = case, make
        self.adapter = make()
        self.script = Script(case)
        self.what, self.spec, self.frame, self.setup = (
            self.script.what, self.script.spec, self.script.frame, self.script.setup,
        )  # fmt: skip
        self.all, self.live = self.script.all, self.script.live
        self.coverage = Coverage()
        self.adapter.init(self.setup)

    def run(self) -> None:
        """Do all operations."""
        for op in self.script.ops:
            if isinstance(op, Step):
                self._step(op)
            elif isinstance(op, Begin):
                begin(self.adapter, self.setup, op.slot, op.position, op.pages)
            elif isinstance(op, Copy):
                self._copy(op)
            elif isinstance(op, Reset):
                self.adapter.reset([op.slot])

    def _step(self, op: Step) -> None:
        batch = op.batch
        self.adapter.step(self.script.inputs.tokens(op.pieces), batch)
        assert batch.state_slots is not None
        columns = (batch.state_slots, batch.start_positions, batch.lengths, batch.draft_rows)
        for slot, start, count, drafts in zip(*(t.tolist() for t in columns), strict=True):
            if slot >= 0:
                self.coverage.step(self.case.spec, slot, start, count, drafts)
        spare = sum(p.count for p in op.pieces) - int(batch.query_start_loc[-1])
        self.coverage.requests(self.case.spec, int((batch.lengths > 0).sum()), spare)

    def _copy(self, op: Copy) -> None:
        payload = self.adapter.export(RaggedBatch.at(op.position, state_slot=op.source))
        if op.move:
            self.adapter.reset([op.source])
        self.adapter.load(RaggedBatch.at(op.position, state_slot=op.target), payload)

    def own_rows(self, request: Request) -> torch.Tensor:
        """Rows that the request wrote and may read: window indices."""
        return self.script.own_rows(request)

    def guard(self) -> str | None:
        """What lies outside of every row that may have been written must hold the canary."""
        able = self.adapter.capabilities
        if self.case.far or (self.case.first and not (able.exports or able.offsets or able.unmapped)):
            return None  # too many to look at, or full of what came before
        rows = torch.ones(self.setup.num_pages * self.setup.page_rows, dtype=torch.bool)
        for request in self.all:
            touched = torch.tensor(sorted(request.touched), dtype=torch.int64)
            rows[self.frame.slots(request, touched)] = False
        untouched = rows.nonzero()[:, 0]
        wrong = (raw(self.rows(untouched)) != stored.CANARY).any(-1).nonzero()[:, 0]
        if wrong.shape[0]:
            return f"cache slot {int(untouched[int(wrong[0])])} was written, which belongs to no finished window"
        return None

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """What the adapter says lies at the slots, if that can be."""
        rows = self.adapter.rows(slots)
        stored.check(self.what.format, self.spec.head_dim, rows, slots.shape[0], exact=True)
        return rows


def at(request: Request) -> RaggedBatch:
    """The request where it stands, without tokens."""
    return RaggedBatch.at(request.done, state_slot=request.slot)


def raw(x: torch.Tensor) -> torch.Tensor:
    """Rows as bytes: [n, bytes]."""
    return x.contiguous().view(torch.uint8).flatten(1)


def begin(adapter: Adapter, setup: Setup, slot: int, position: int, pages: torch.Tensor) -> None:
    """Let a request start at a window boundary, as the adapter can have it.

    With exports, its state is imported: the previous window's rows are (0, -FLT_MAX), weight 0. With offsets there is
    nothing to do. Otherwise tokens of zeros come before.
    """
    able = adapter.capabilities
    if able.exports:
        seed(adapter, setup, slot, position)
    elif not able.offsets:
        _prefix(adapter, setup, slot, position, None if able.unmapped else pages)


def _prefix(adapter: Adapter, setup: Setup, slot: int, position: int, pages: torch.Tensor | None) -> None:
    """Tokens of zeros up to ``position``; their rows go nowhere, or over and over into the ``pages`` of the request."""
    most, table, page = _PREFIX_CHUNK, None, setup.page_rows * setup.spec.ratio
    if pages is not None:  # a row of its own for each row of a step
        most = (pages.shape[0] - 1) * page
        table = pages[torch.arange(position // page + 1) % pages.shape[0]][None]
    for start in range(0, position, most):
        count = min(most, position - start)
        batch = RaggedBatch.build(
            [0, count],
            start_positions=[start],
            state_slots=[slot],
            block_table=table,
            slot_mapping=None if pages is not None else torch.full((count,), -1),
        )
        adapter.step(torch.zeros(count, setup.spec.projected), batch)


def seed(adapter: Adapter, setup: Setup, slot: int, position: int) -> None:
    """Import a state without history at a window boundary."""
    spec, at = setup.spec, RaggedBatch.at(position, state_slot=0)
    pool = StatePool.ring(spec, 1)
    rows = torch.zeros(spec.seed_rows(position), spec.state_dim)
    rows[:, spec.width :] = FP32_LOWEST
    import_live(spec, pool, at, rows)
    adapter.load(RaggedBatch.at(position, state_slot=slot), save_live(spec, pool, at))
