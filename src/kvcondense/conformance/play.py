"""Play a case on an adapter and judge what it left in its cache and state."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kvcondense.conformance import stored
from kvcondense.conformance.adapter import Adapter, Factory, Setup
from kvcondense.conformance.cases import JUNK, Case, Op
from kvcondense.conformance.compressors import Compressor
from kvcondense.conformance.coverage import Coverage
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import FP32_LOWEST
from kvcondense.rope_table import RopeTable
from kvcondense.snapshot import save_live
from kvcondense.weights import CompressorWeights

_FAR_ELEMENTS = 1 << 31
_PREFIX_CHUNK = 4096


@dataclass(eq=False)
class Request:
    """One request: its tokens, how many are committed, its state slot, its cache pages, rows it may have written."""

    tokens: torch.Tensor
    slot: int
    pages: torch.Tensor
    done: int
    mine: int = 0
    """First row that this request wrote itself; a fork reads the rows before it in its origin's pages."""
    touched: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Frame:
    """Where things lie: positions from ``first`` on, ``pages`` cache pages per request; what is before, on page 0."""

    what: Compressor
    first: int
    pages: int

    def batch(self, requests: list[Request], counts: list[int], drafts: list[int]) -> RaggedBatch:
        """Metadata of a step; cache rows by block table, from the window of the first position on."""
        offset = self.first // self.what.spec.ratio // self.what.page_rows
        table = torch.zeros(len(requests), offset + self.pages, dtype=torch.int64)
        for i, request in enumerate(requests):
            table[i, offset:] = request.pages
        return RaggedBatch.build(
            [0, *torch.tensor(counts).cumsum(0).tolist()],
            start_positions=[r.done for r in requests],
            draft_rows=torch.tensor(drafts, dtype=torch.int64),
            state_slots=[r.slot for r in requests],
            block_table=table,
        )

    def slots(self, request: Request, rows: torch.Tensor) -> torch.Tensor:
        """Cache slots of rows (window indices) of a request."""
        size = self.what.page_rows
        at = rows - self.first // self.what.spec.ratio // size * size
        return request.pages[at // size] * size + at % size


class Player:
    """An adapter, its requests and the operations on them."""

    def __init__(self, case: Case, make: Factory) -> None:
        self.case, self.make, self.what = case, make, case.compressor
        self.spec = spec = self.what.spec
        self.adapter = make()
        self.coverage = Coverage()
        n = case.requests
        self.gen = torch.Generator().manual_seed(case.seed)
        # A fork goes on with tokens of its own, but what it shares counts for it, too.
        longest = sum(sum(op.counts) for op in case.ops) + 1
        self.weights = make_weights(case)
        self.rope = RopeTable.build(self.what.config, case.first + longest + 1)
        size = self.what.page_rows
        self.frame = Frame(self.what, case.first, longest // spec.ratio // size + 2)
        generations = n + sum(op.kind in ("recycle", "fork") for op in case.ops)
        elements = max(1, self.what.page_bytes // self.what.format.channels[0].element.dtype.itemsize)
        self.base = _FAR_ELEMENTS // elements + 1 if case.far else 1  # page base - 1 belongs to nobody
        used = generations * self.frame.pages
        self.free_pages = torch.randperm(used, generator=self.gen) + self.base
        if case.far:  # the first rows of the first request lie on the very last page
            self.free_pages = torch.cat([self.free_pages[self.free_pages == self.base + used - 1],
                                         self.free_pages[self.free_pages != self.base + used - 1]])  # fmt: skip
        slots = 2 * n + 3
        self.free_slots = torch.randperm(slots, generator=self.gen).tolist()
        num_pages, positions = self.base + used, case.first + longest
        self.setup = Setup(
            spec, self.weights, self.rope, slots, case.max_draft, num_pages, size, positions, self.what.format
        )
        self.adapter.init(self.setup)
        self.all: list[Request] = []
        self.live = [self._admit() for _ in range(n)]

    @property
    def request_steps(self) -> int:
        """Steps so far, times the requests that had tokens in them."""
        return self.coverage.request_steps

    def _admit(self, slot: int | None = None) -> Request:
        pages, self.free_pages = self.free_pages.split([n := self.frame.pages, self.free_pages.shape[0] - n])
        slot = self.free_slots.pop() if slot is None else slot
        length = self.setup.max_positions - self.case.first
        tokens = torch.randn(length, self.spec.projected, generator=self.gen) * self.case.scale
        request = Request(tokens, slot, pages, self.case.first)
        if self.case.first:
            begin(self.adapter, self.setup, self.frame, request)
        self.all.append(request)
        return request

    def run(self) -> None:
        """Do all operations."""
        for op in self.case.ops:
            getattr(self, f"_{op.kind}")(op)

    def _step(self, op: Op) -> None:
        spec, junk = self.spec, JUNK[op.junk]
        order = list(op.order) or list(range(len(self.live)))
        chunks, drafts, rejected = [], [], []
        for q in order:
            request, n = self.live[q], op.counts[q]
            at = request.done - self.case.first
            chunk = request.tokens[at : at + n].clone()
            d = min(op.drafts, n)
            wrong = max(0, d - op.accepted) if junk is not None else 0
            chunk[n - wrong :] = 0.0 if junk is None else junk
            chunks.append(chunk)
            drafts.append(d)
            rejected.append(wrong)
        padding = torch.full((op.padding, spec.projected), float("nan"))
        batch = self.frame.batch([self.live[q] for q in order], [c.shape[0] for c in chunks], drafts)
        self.adapter.step(torch.cat([*chunks, padding]), batch)
        for q, wrong in zip(order, rejected, strict=True):
            request, n = self.live[q], op.counts[q]
            self.coverage.step(self.case.spec, request.slot, request.done, n, min(op.drafts, n))
            end = request.done + n
            request.touched |= set(range(request.done // spec.ratio, end // spec.ratio))
            request.done = end - wrong
        self.coverage.requests(self.case.spec, sum(op.counts[q] > 0 for q in order), op.padding)

    def _recycle(self, op: Op) -> None:
        if op.junk:
            self.adapter.reset([self.live[op.q].slot])
        self.live[op.q] = self._admit(self.live[op.q].slot)

    def _move(self, op: Op) -> None:
        request = self.live[op.q]
        payload = self.adapter.export(at(request))
        self.adapter.reset([request.slot])
        slot = self.free_slots.pop(0)
        self.free_slots.append(request.slot)
        request.slot = slot
        self.adapter.load(at(request), payload)

    def _fork(self, op: Op) -> None:
        origin, copy = self.live[op.q], self._admit(self.live[op.to].slot)
        copy.done = origin.done
        shared = origin.done - self.case.first
        copy.tokens[:shared] = origin.tokens[:shared]
        copy.mine = self.spec.visible_rows(origin.done)
        self.adapter.load(at(copy), self.adapter.export(at(origin)))
        self.live[op.to] = copy

    def own_rows(self, request: Request) -> torch.Tensor:
        """Rows that the request wrote and may read: window indices."""
        first = max(request.mine, self.case.first // self.spec.ratio)
        return torch.arange(first, max(first, self.spec.visible_rows(request.done)))

    def guard(self) -> str | None:
        """What lies outside of every row that may have been written must hold the canary."""
        if self.case.far:
            return None
        rows = torch.ones(self.setup.num_pages * self.setup.page_rows, dtype=torch.bool)
        if self.case.first:
            rows[: self.setup.page_rows] = False  # page 0 has what came before, if anything did
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
        stored.check(self.what.format, self.spec.head_dim, rows, slots.shape[0])
        return rows


def at(request: Request) -> RaggedBatch:
    """The request where it stands, without tokens."""
    return RaggedBatch.at(request.done, state_slot=request.slot)


def raw(x: torch.Tensor) -> torch.Tensor:
    """Rows as bytes: [n, bytes]."""
    return x.contiguous().view(torch.uint8).flatten(1)


def begin(adapter: Adapter, setup: Setup, frame: Frame, request: Request) -> None:
    """Let a request start at ``frame.first``, a window boundary, as the adapter can have it.

    With exports, its state is imported: the previous window's rows are (0, -FLT_MAX), weight 0. With offsets there is
    nothing to do. Otherwise tokens of zeros come before, whose rows go to page 0.
    """
    if adapter.capabilities.exports:
        seed_request(adapter, setup, request)
    elif not adapter.capabilities.offsets:
        offset, request.done = request.done, 0
        while request.done < offset:
            count = min(_PREFIX_CHUNK, offset - request.done)
            adapter.step(torch.zeros(count, setup.spec.projected), frame.batch([request], [count], [0]))
            request.done += count


def seed_request(adapter: Adapter, setup: Setup, request: Request) -> None:
    """Import a state without history at a window boundary."""
    spec, at = setup.spec, RaggedBatch.at(request.done, state_slot=0)
    pool = StatePool.ring(spec, 1)
    rows = torch.zeros(spec.seed_rows(request.done), spec.state_dim)
    rows[:, spec.width :] = FP32_LOWEST
    import_live(spec, pool, at, rows)
    adapter.load(RaggedBatch.at(request.done, state_slot=request.slot), save_live(spec, pool, at))


def make_weights(case: Case) -> CompressorWeights:
    """ape and norm of a case."""
    spec, gen = case.compressor.spec, torch.Generator().manual_seed(case.seed + 1)
    norm = 1 + 0.3 * torch.randn(spec.head_dim, generator=gen)
    ape = 0.5 * case.scale * torch.randn(spec.ratio, spec.width, generator=gen) if spec.has_ape else None
    return CompressorWeights(norm=norm, ape=ape)
