"""A case as a script: every step in integers (positions, slots, pages, where tokens come from), and nothing to decide.

An adapter plays it (``play``), and so can whoever reads test vectors (``vectors``): both are told the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch

from kvcondense.conformance import generator, patterns
from kvcondense.conformance.adapter import Setup
from kvcondense.conformance.cases import Case, Op
from kvcondense.conformance.compressors import Compressor, rope_of
from kvcondense.conformance.inputs import Inputs, Piece
from kvcondense.layout.batch import RaggedBatch

_FAR_ELEMENTS = 1 << 31


@dataclass(frozen=True)
class Step:
    """A step: tokens piece by piece, spare ones last, and its metadata."""

    pieces: tuple[Piece, ...]
    batch: RaggedBatch


@dataclass(frozen=True)
class Begin:
    """A request with nothing before it begins at ``position`` in a state slot; ``pages``: its cache pages."""

    slot: int
    position: int
    pages: torch.Tensor


@dataclass(frozen=True)
class Copy:
    """The state of a request at ``position`` goes from a slot to another; ``move``: the first one is free then."""

    source: int
    target: int
    position: int
    move: bool


@dataclass(frozen=True)
class Reset:
    """A state slot gets a new owner, and is cleaned or poisoned before."""

    slot: int


@dataclass(eq=False)
class Request:
    """One request: where its tokens come from, how many are committed, its slot and pages, what it may have written."""

    parts: tuple[tuple[int, int], ...]
    """(stream, first position) of its tokens: its own last; a fork begins with its origin's."""
    slot: int
    pages: torch.Tensor
    done: int
    mine: int = 0
    """First row that this request wrote itself; a fork reads the rows before it in its origin's pages."""
    touched: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    """Rows that had cache slot -1."""

    def pieces(self, start: int, count: int, origin: int) -> tuple[Piece, ...]:
        """Its tokens from position ``start`` on; ``origin``: position of token 0 of a stream."""
        found, end = [], start + count
        for (stream, low), high in zip(self.parts, [*(first for _, first in self.parts[1:]), end], strict=True):
            begin, stop = max(low, start), min(high, end)
            if begin < stop:
                found.append(Piece(stream, begin - origin, stop - begin))
        return tuple(found)


@dataclass(frozen=True)
class Frame:
    """Where things lie: positions from ``first`` on, ``pages`` cache pages per request."""

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


class Script:
    """What an adapter is prepared for (``setup``), what then happens (``ops``), how the requests stand at the end."""

    def __init__(self, case: Case, *, twins: bool = False) -> None:
        """``twins``: in the end every request comes once more, alone, with all its committed tokens in one step."""
        self.case, self.what = case, case.compressor
        # Of patterns eps is so small that the norm does not change a row, not even before it is rounded to bf16.
        self.spec = spec = replace(self.what.spec, eps=1e-30) if case.pattern else self.what.spec
        n = case.requests
        self.rng = random.Random(case.seed)
        # A fork goes on with tokens of its own, but what it shares counts for it, too.
        longest = sum(sum(op.counts) for op in case.ops) + 1
        size = self.what.page_rows
        self.frame = Frame(self.what, case.first, longest // spec.ratio // size + 2)
        generations = n + n * twins + sum(op.kind in ("recycle", "fork") for op in case.ops)
        elements = max(1, self.what.page_bytes // self.what.format.channels[0].element.dtype.itemsize)
        base = _FAR_ELEMENTS // elements + 1 if case.far else 1  # page base - 1 belongs to nobody
        used = generations * self.frame.pages
        pages = self.rng.sample(range(base, base + used), used)
        if case.far:  # the first rows of the first request lie in the cache's last page
            pages.sort(reverse=True)
        self._pages = torch.tensor(pages)
        self.inputs = Inputs(spec, case.seed, case.scale)
        if case.pattern:
            rows, norm = patterns.rows(spec.head_dim, case.seed, generations), patterns.weight(spec.head_dim, case.seed)
            self.inputs = Inputs(spec, case.seed, case.scale, rows, norm)
        slots = 2 * n + 3 + n * twins
        self._slots = self.rng.sample(range(slots), slots)
        if any(op.inert for op in case.ops):  # what -1 is where it is clamped
            self._slots.sort(key=lambda slot: slot == 0)
        positions = case.first + longest
        rope = rope_of(spec, positions + 1)
        self.setup = Setup(
            spec, self.inputs.weights(), rope, slots, case.max_draft, base + used, size, positions, self.what.format
        )
        self.ops: list[Step | Begin | Copy | Reset] = []
        self.all: list[Request] = []
        self.live = [self._admit() for _ in range(n)]
        for op in case.ops:
            getattr(self, f"_{op.kind}")(op)
        self.twins = {q: self._twin(q) for q in self.live if twins and q.done > case.first}

    def tokens_of(self, request: Request) -> torch.Tensor:
        """All committed tokens of a request, from the first position on."""
        first = self.case.first
        return self.inputs.tokens(request.pieces(first, request.done - first, first))

    def own_rows(self, request: Request) -> torch.Tensor:
        """Rows that the request wrote and may read: window indices."""
        first = max(request.mine, self.case.first // self.spec.ratio)
        rows = range(first, max(first, self.spec.visible_rows(request.done)))
        return torch.tensor([row for row in rows if row not in request.lost], dtype=torch.int64)

    def _admit(self, slot: int | None = None) -> Request:
        pages, self._pages = self._pages.split([n := self.frame.pages, self._pages.shape[0] - n])
        slot = self._slots.pop() if slot is None else slot
        first = self.case.first
        request = Request(((generator.TOKENS + len(self.all), first),), slot, pages, first)
        if first:
            self.ops.append(Begin(slot, first, pages))
        self.all.append(request)
        return request

    def _step(self, op: Op) -> None:
        order = list(op.order) or list(range(len(self.live)))
        pieces: list[Piece] = []
        drafts, rejected = [], []
        for q in order:
            request, n = self.live[q], op.counts[q]
            d = min(op.drafts, n)
            wrong = max(0, d - op.accepted) if op.junk else 0
            pieces += request.pieces(request.done, n - wrong, self.case.first)
            pieces += [Piece(-1, 0, wrong, op.junk)] if wrong else []
            drafts.append(d)
            rejected.append(wrong)
        batch = self.frame.batch([self.live[q] for q in order], [op.counts[q] for q in order], drafts)
        if op.unmapped:
            batch = self._unmapped(batch, [self.live[q] for q in order], rejected)
        if op.inert:
            batch, pieces = _with_inert(batch, op.inert), [*pieces, Piece(-1, 0, op.inert, "nan")]
        if op.padding:
            pieces.append(Piece(-1, 0, op.padding, "nan"))
        self.ops.append(Step(tuple(pieces), batch))
        for q, wrong in zip(order, rejected, strict=True):
            request = self.live[q]
            end = request.done + op.counts[q]
            request.touched |= set(range(request.done // self.spec.ratio, end // self.spec.ratio)) - request.lost
            request.done = end - wrong

    def _unmapped(self, batch: RaggedBatch, requests: list[Request], rejected: list[int]) -> RaggedBatch:
        """Cache rows by slot mapping; the first window that each request completes for good has none."""
        ratio, mapping = self.spec.ratio, torch.full((int(batch.query_start_loc[-1]),), -1)
        for q, (request, wrong) in enumerate(zip(requests, rejected, strict=True)):
            begin, count = int(batch.query_start_loc[q]), int(batch.lengths[q])
            ends = [t for t in range(count) if (request.done + t + 1) % ratio == 0]
            if ends and ends[0] < count - wrong:
                request.lost.add((request.done + ends.pop(0)) // ratio)
            rows = torch.tensor([(request.done + t) // ratio for t in ends], dtype=torch.int64)
            mapping[torch.tensor([begin + t for t in ends], dtype=torch.int64)] = self.frame.slots(request, rows)
        return replace(batch, block_table=None, slot_mapping=mapping)

    def _recycle(self, op: Op) -> None:
        if op.junk:
            self.ops.append(Reset(self.live[op.q].slot))
        self.live[op.q] = self._admit(self.live[op.q].slot)

    def _move(self, op: Op) -> None:
        request = self.live[op.q]
        slot = self._slots.pop(0)
        self._slots.append(request.slot)
        self.ops.append(Copy(request.slot, slot, request.done, move=True))
        request.slot = slot

    def _fork(self, op: Op) -> None:
        origin, copy = self.live[op.q], self._admit(self.live[op.to].slot)
        own = copy.parts[0][0]
        copy.parts = (*(part for part in origin.parts if part[1] < origin.done), (own, origin.done))
        copy.done, copy.mine = origin.done, self.spec.visible_rows(origin.done)
        if self.case.first:
            self.ops.pop()  # a fork does not begin
        self.ops.append(Copy(origin.slot, copy.slot, origin.done, move=False))
        self.live[op.to] = copy

    def _twin(self, request: Request) -> Request:
        first, count = self.case.first, request.done - self.case.first
        twin = self._admit(self._slots.pop(0))
        twin.parts = request.parts
        self.ops.append(Step(request.pieces(first, count, first), self.frame.batch([twin], [count], [0])))
        twin.touched = set(range(first // self.spec.ratio, request.done // self.spec.ratio))
        twin.done = request.done
        return twin


def _with_inert(batch: RaggedBatch, count: int) -> RaggedBatch:
    """One more request, with ``count`` tokens and state slot -1, whose windows are mapped to row 0, a legal one."""

    def last(name: str, value: int) -> torch.Tensor | None:
        t = getattr(batch, name)
        return None if t is None else torch.cat([t, torch.full((1, *t.shape[1:]), value)])

    assert batch.state_slots is not None
    mapping = batch.slot_mapping
    return RaggedBatch.build(
        torch.cat([batch.query_start_loc, batch.query_start_loc[-1:] + count]),
        start_positions=torch.cat([batch.start_positions, torch.tensor([3])]),
        draft_rows=torch.cat([batch.draft_rows, torch.tensor([0])]),
        state_slots=torch.cat([batch.state_slots, torch.tensor([-1])]),
        block_table=last("block_table", 0),
        slot_mapping=None if mapping is None else torch.cat([mapping, torch.zeros(count, dtype=torch.int64)]),
    )
