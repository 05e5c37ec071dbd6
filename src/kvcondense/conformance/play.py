"""Play a case on an adapter and judge what it left in its cache and state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from kvcondense.conformance.adapter import CANARY, Adapter, Factory, Setup
from kvcondense.conformance.cases import CONFIG, JUNK, PAGE_ROWS, SPECS, Case, Op
from kvcondense.golden.compare import row_bounds
from kvcondense.golden.decode import DecodeCompressor, sylvester
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import FP32_LOWEST, ulp_distance
from kvcondense.rope_table import RopeTable
from kvcondense.snapshot import save_live
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights

MIN_EQUAL = 0.99
_FAR_BYTES = 1 << 31


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
    """Where things lie: positions from ``first`` on, ``pages`` cache pages per request."""

    spec: CompressorSpec
    first: int
    pages: int

    def batch(self, requests: list[Request], counts: list[int], drafts: list[int]) -> RaggedBatch:
        """Metadata of a step; cache rows by block table, from the window of the first position on."""
        offset = self.first // self.spec.ratio // PAGE_ROWS
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
        at = rows - self.first // self.spec.ratio // PAGE_ROWS * PAGE_ROWS
        return request.pages[at // PAGE_ROWS] * PAGE_ROWS + at % PAGE_ROWS


class Player:
    """An adapter, its requests and the operations on them."""

    def __init__(self, case: Case, make: Factory) -> None:
        self.case, self.make, self.spec = case, make, SPECS[case.spec]
        self.adapter = make()
        self.request_steps = 0
        spec, n = self.spec, case.requests
        self.gen = torch.Generator().manual_seed(case.seed)
        # A fork goes on with tokens of its own, but what it shares counts for it, too.
        longest = sum(sum(op.counts) for op in case.ops) + 1
        self.weights, self.rope = make_weights(case), RopeTable.build(CONFIG, case.first + longest + 1)
        self.frame = Frame(spec, case.first, longest // spec.ratio // PAGE_ROWS + 2)
        generations = n + sum(op.kind in ("recycle", "fork") for op in case.ops)
        page_bytes = PAGE_ROWS * 2 * spec.head_dim
        self.base = _FAR_BYTES // page_bytes + 1 if case.far else 1  # page base - 1 belongs to nobody
        used = generations * self.frame.pages
        self.free_pages = torch.randperm(used, generator=self.gen) + self.base
        if case.far:  # the first rows of all lie in the cache's last page
            self.free_pages = self.free_pages.sort(descending=True).values
        slots = 2 * n + 3
        self.free_slots = torch.randperm(slots, generator=self.gen).tolist()
        self.setup = Setup(
            spec, self.weights, self.rope, slots, case.max_draft, self.base + used, PAGE_ROWS, case.first + longest
        )
        self.adapter.init(self.setup)
        self.all: list[Request] = []
        self.live = [self._admit() for _ in range(n)]

    def _admit(self, slot: int | None = None) -> Request:
        pages, self.free_pages = self.free_pages.split([n := self.frame.pages, self.free_pages.shape[0] - n])
        slot = self.free_slots.pop() if slot is None else slot
        length = self.setup.max_positions - self.case.first
        tokens = torch.randn(length, self.spec.projected, generator=self.gen) * self.case.scale
        request = Request(tokens, slot, pages, self.case.first)
        if self.case.first:
            seed_request(self.adapter, self.setup, request)
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
            end = request.done + n
            request.touched |= set(range(request.done // spec.ratio, end // spec.ratio))
            request.done = end - wrong
            self.request_steps += n > 0

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
        rows = torch.ones(self.setup.num_pages * PAGE_ROWS, dtype=torch.bool)
        for request in self.all:
            touched = torch.tensor(sorted(request.touched), dtype=torch.int64)
            rows[self.frame.slots(request, touched)] = False
        stored = self.adapter.rows(rows.nonzero()[:, 0])
        wrong = (stored.contiguous().view(torch.uint8) != CANARY).any(-1).nonzero()[:, 0]
        if wrong.shape[0]:
            return (
                f"cache slot {int(rows.nonzero()[int(wrong[0]), 0])} was written, which belongs to no finished window"
            )
        return None


def at(request: Request) -> RaggedBatch:
    """The request where it stands, without tokens."""
    return RaggedBatch.at(request.done, state_slot=request.slot)


def seed_request(adapter: Adapter, setup: Setup, request: Request) -> None:
    """Let a request start at a window boundary: the previous window's rows are (0, -FLT_MAX), weight 0."""
    spec, at = setup.spec, RaggedBatch.at(request.done, state_slot=0)
    pool = StatePool.ring(spec, 1)
    rows = torch.zeros(spec.seed_rows(request.done), spec.state_dim)
    rows[:, spec.width :] = FP32_LOWEST
    import_live(spec, pool, at, rows)
    adapter.load(RaggedBatch.at(request.done, state_slot=request.slot), save_live(spec, pool, at))


def make_weights(case: Case) -> CompressorWeights:
    """ape and norm of a case."""
    spec, gen = SPECS[case.spec], torch.Generator().manual_seed(case.seed + 1)
    norm = 1 + 0.3 * torch.randn(spec.head_dim, generator=gen)
    ape = 0.5 * case.scale * torch.randn(spec.ratio, spec.width, generator=gen) if spec.has_ape else None
    return CompressorWeights(norm=norm, ape=ape)


def golden_rows(player: Player, request: Request) -> torch.Tensor:
    """The request's own rows, token by token in the golden reference: [n, head_dim] fp32."""
    spec, first, rounding = player.spec, player.case.first, player.adapter.capabilities.rounding
    if rounding is not None:
        spec = replace(spec, rounding=Rounding(rounding))
    hadamard = sylvester(spec.head_dim) if spec.rotate else None
    w = player.weights
    decode = DecodeCompressor(spec, w.ape, w.norm, player.rope.cos, player.rope.sin, hadamard)
    rows = {}
    for i in range(request.done - first):
        kv, score = request.tokens[i].split(spec.width)
        row = decode.step(kv, score, first + i)
        if row is not None:
            rows[(first + i) // spec.ratio] = row
    wanted = [rows[c] for c in player.own_rows(request).tolist()]
    return torch.stack(wanted) if wanted else torch.zeros(0, spec.head_dim)


def against_golden(player: Player, request: Request) -> str | None:
    """Compare a request's rows with the golden reference."""
    spec, close = player.spec, player.adapter.capabilities.close
    actual = player.adapter.rows(player.frame.slots(request, player.own_rows(request)))
    expected = golden_rows(player, request)
    if close is not None:
        wrong = ((actual.float() - expected).abs() > close * (1 + expected.abs())) | ~torch.isfinite(actual)
        return _first_wrong(player, request, actual, expected.to(actual.dtype), wrong.any(-1))
    expected = expected.to(actual.dtype)
    result = row_bounds(spec, MIN_EQUAL if spec.rounding is Rounding.REFERENCE else 0.0)(actual, expected)
    if result.passed:
        return None
    by_row = [row_bounds(spec)(a, e).passed for a, e in zip(actual, expected, strict=True)]
    wrong = ~torch.tensor(by_row, dtype=torch.bool)
    return _first_wrong(player, request, actual, expected, wrong) or result.detail


def against_itself(player: Player, request: Request) -> str | None:
    """Compare rows and state, bit by bit, with the same implementation fed this request alone in one call."""
    own = player.own_rows(request)
    if request.done == player.case.first:
        return None
    frame, setup = player.frame, player.setup
    alone = player.make()
    alone_setup = replace(setup, num_slots=3, max_draft=0, num_pages=frame.pages + 1)
    alone.init(alone_setup)
    twin = Request(request.tokens, 1, torch.arange(frame.pages) + 1, player.case.first)
    if player.case.first:
        seed_request(alone, alone_setup, twin)
    count = request.done - player.case.first
    alone.step(request.tokens[:count], frame.batch([twin], [count], [0]))
    twin.done = request.done
    actual = player.adapter.rows(frame.slots(request, own))
    expected = alone.rows(frame.slots(twin, own))
    wrong = (bits(actual) != bits(expected)).any(-1)
    if bool(wrong.any()):
        return _first_wrong(player, request, actual, expected, wrong)
    if player.adapter.capabilities.returns_state:
        here, there = player.adapter.state(at(request)), alone.state(at(twin))
        if here is not None and there is not None:
            if here.shape != there.shape:
                return f"live state has shape {list(here.shape)} instead of {list(there.shape)}"
            wrong = (bits(here) != bits(there)).flatten(1).any(-1)
            if bool(wrong.any()):
                return f"live state row {int(wrong.nonzero()[0, 0])} of request {player.all.index(request)} differs"
    return None


def bits(x: torch.Tensor) -> torch.Tensor:
    """Raw bits, so that NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _first_wrong(
    player: Player, request: Request, actual: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor
) -> str | None:
    """The first wrong row, channel and distance, in a sentence."""
    if not bool(wrong.any()):
        return None
    row = int(wrong.nonzero()[0, 0])
    channels = (bits(actual[row]) != bits(expected[row])).nonzero()[:, 0]
    worst = int(channels[0]) if channels.shape[0] else 0
    a, e = actual[row, worst], expected[row, worst]
    ulp = int(ulp_distance(a[None], e[None])[0]) if bool(torch.isfinite(a) & torch.isfinite(e)) else -1
    return (
        f"row {int(player.own_rows(request)[row])} of request {player.all.index(request)}, channel {worst}: "
        f"{a.item():.6g} instead of {e.item():.6g} ({'not finite' if ulp < 0 else f'{ulp} ulp'}; "
        f"{channels.shape[0]} of {actual.shape[1]} channels, {int(wrong.sum())} of {wrong.shape[0]} rows)"
    )
