"""Where the state row of a position lies: in the ring of a slot, or on a page of a table. Index arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.errors import RangeError, ShapeError
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec


@dataclass(frozen=True)
class RingLayout:
    """Row of position p of a request in slot s: s * ring_rows + p mod ring_rows.

    raw_scores: rows hold [kv | score], and the ape is added when they are read; by default they hold it already.
    """

    num_slots: int
    ring_rows: int
    raw_scores: bool = False

    def __post_init__(self) -> None:
        _check_sizes(num_slots=self.num_slots, ring_rows=self.ring_rows)

    @property
    def block_rows(self) -> int:
        """Rows of a slot."""
        return self.ring_rows

    @property
    def num_rows(self) -> int:
        return self.num_slots * self.ring_rows

    def address(self, batch: RaggedBatch, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """State row of each (request, position), int64; positions must be >= 0."""
        assert batch.state_slots is not None
        return batch.state_slots[request] * self.ring_rows + position % self.ring_rows

    def keep_start(self, spec: CompressorSpec, batch: RaggedBatch) -> torch.Tensor:
        """First position of each request [R] whose row is kept."""
        return _keep_start(spec, batch)

    def check(self, batch: RaggedBatch, spec: CompressorSpec) -> None:
        """Raise unless the slots exist, are not shared, and the ring is long enough for this step."""
        check_slots(batch, self.num_slots)
        self.check_drafts(spec, most_drafts(batch))

    def check_drafts(self, spec: CompressorSpec, drafts: int) -> None:
        """Raise unless the ring is long enough for steps with this many draft rows."""
        _check_ring("state ring_rows", self.ring_rows, spec, drafts)


@dataclass(frozen=True)
class PagedLayout:
    """Row of position p of request q: state_block_table[q, p // page_tokens] * page_rows + p mod page_rows.

    page_tokens: positions that share a page, a multiple of page_rows; where it is more (default: page_rows), a page is
    a ring. keep_all: every token of a step is kept, not only those that a continuation at its end can read, so that a
    request may also go on from inside it (a shared prefix). raw_scores: as in a ring.
    """

    num_pages: int
    page_rows: int
    page_tokens: int = 0
    keep_all: bool = False
    raw_scores: bool = False

    def __post_init__(self) -> None:
        _check_sizes(num_pages=self.num_pages, page_rows=self.page_rows)
        tokens = self.page_tokens or self.page_rows
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1 or tokens % self.page_rows:
            raise RangeError("page_tokens", f"a multiple of page_rows, {self.page_rows}", repr(tokens))
        if self.keep_all and tokens > self.page_rows:
            raise RangeError("keep_all", f"pages of {tokens} rows, one for each position", f"{self.page_rows} rows")
        object.__setattr__(self, "page_tokens", tokens)

    @property
    def block_rows(self) -> int:
        """Rows of a page."""
        return self.page_rows

    @property
    def num_rows(self) -> int:
        return self.num_pages * self.page_rows

    def address(self, batch: RaggedBatch, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """State row of each (request, position), int64; positions must be >= 0."""
        assert batch.state_block_table is not None
        page = batch.state_block_table[request, position // self.page_tokens]
        return page.to(torch.int64) * self.page_rows + position % self.page_rows

    def keep_start(self, spec: CompressorSpec, batch: RaggedBatch) -> torch.Tensor:
        """First position of each request [R] whose row is kept."""
        return batch.start_positions if self.keep_all else _keep_start(spec, batch)

    def check(self, batch: RaggedBatch, spec: CompressorSpec) -> None:
        """Raise unless every page that this step reads or writes is in the table and exists."""
        table = table_of(batch)
        self.check_drafts(spec, most_drafts(batch))
        start, end = batch.start_positions, batch.start_positions + batch.lengths
        column = torch.arange(table.shape[1], device=table.device)
        needed = torch.zeros_like(table, dtype=torch.bool)
        # Rows the step may read, then rows it keeps; earlier rows of a long chunk touch no page.
        for low, high in (
            (live_starts(spec, start), start),
            (self.keep_start(spec, batch), end),
        ):
            touched = batch.active & (low < high)
            last = (high - 1) // self.page_tokens
            if bool((last[touched] >= table.shape[1]).any()):
                raise ShapeError(
                    "state_block_table", f"at least {int(last[touched].max()) + 1} pages", f"{table.shape[1]}"
                )
            pages = (column >= (low // self.page_tokens)[:, None]) & (column <= last[:, None])
            needed |= pages & touched[:, None]
        bad = needed & ((table < 0) | (table >= self.num_pages))
        if bool(bad.any()):
            q, c = bad.nonzero()[0].tolist()
            raise RangeError(f"state_block_table[{q}, {c}]", f"a page in 0..{self.num_pages - 1}", int(table[q, c]))

    def check_drafts(self, spec: CompressorSpec, drafts: int) -> None:
        """Raise unless pages that are rings are long enough for steps with this many draft rows."""
        if self.page_tokens > self.page_rows:
            _check_ring("state page_rows", self.page_rows, spec, drafts)


def _check_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RangeError(name, "an integer of at least 1", repr(value))


def most_drafts(batch: RaggedBatch) -> int:
    """Draft rows of the request that has most of them."""
    return int(batch.draft_rows[batch.active].max()) if bool(batch.active.any()) else 0


def _check_ring(name: str, rows: int, spec: CompressorSpec, drafts: int) -> None:
    needed = spec.required_ring_rows(drafts)
    if rows < needed:
        hint = "allocate spec.required_ring_rows(draft_rows) rows per request"
        raise RangeError(name, f"at least {needed} (window {spec.window}, {drafts} draft rows)", rows, hint)


def slots_of(batch: RaggedBatch) -> torch.Tensor:
    """The batch's state slots; raises ShapeError if it has none."""
    if batch.state_slots is None:
        raise ShapeError("state_slots", "one state slot per request (the state has slots)", "None")
    return batch.state_slots


def table_of(batch: RaggedBatch) -> torch.Tensor:
    """The batch's pages of the state; raises ShapeError if it has none."""
    if batch.state_block_table is None:
        raise ShapeError("state_block_table", "a block table (the state is paged)", "None")
    return batch.state_block_table


def check_slots(batch: RaggedBatch, num_slots: int) -> None:
    """Raise unless every live request has a state slot of its own below ``num_slots``."""
    slots = slots_of(batch)
    used = slots[batch.active]
    wrong = used[(used < 0) | (used >= num_slots)]
    if wrong.shape[0]:
        raise RangeError("state_slots", f"at least 0 and below {num_slots} for a live request", int(wrong[0]))
    if used.unique().shape[0] != used.shape[0]:
        raise RangeError("state_slots", "a slot of its own for each request", slots.tolist())


def _keep_start(spec: CompressorSpec, batch: RaggedBatch) -> torch.Tensor:
    """First position of each request [R] that some continuation, with all drafts rejected or none, can still read."""
    end = batch.start_positions + batch.lengths
    return torch.maximum(batch.start_positions, live_starts(spec, end - batch.draft_rows))


def live_starts(spec: CompressorSpec, length: torch.Tensor) -> torch.Tensor:
    """Tensor form of ``CompressorSpec.live_start``."""
    return ((length // spec.ratio - (spec.halves - 1)) * spec.ratio).clamp(min=0)
