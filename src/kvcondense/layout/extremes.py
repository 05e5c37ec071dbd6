"""What a plan reaches at most, so that a step compares a few integers and no address of it lies outside its buffers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvcondense.errors import KvCondenseError, RangeError, require, require_int
from kvcondense.layout.addresses import PagedLayout, RingLayout, live_starts, slots_of, table_of
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.online import OnlineLayout
from kvcondense.spec import CompressorSpec

Layout = RingLayout | PagedLayout | OnlineLayout


@dataclass(frozen=True)
class Slots:
    """Cache rows that a step writes: the lowest entry (-1: none), the highest, and whether two are the same row."""

    lowest: int
    highest: int
    shared: bool

    @classmethod
    def of(cls, slot: torch.Tensor) -> Slots:
        """Of slots [E]; asks for values."""
        if slot.shape[0] == 0:
            return cls(-1, -1, False)
        written = slot[slot >= 0]
        return cls(int(slot.min()), int(slot.max()), written.unique().shape[0] != written.shape[0])


@dataclass(frozen=True)
class Extremes:
    """tokens: rows of kv_score or x; positions: rows of the RoPE table; slots: of the cache; dense: nothing is padding.

    Rows of the state follow from the plan's layout. positions and slots are None in a static plan for which nobody
    said how many there are: such a plan goes with no RoPE table, or with no cache.
    """

    tokens: int
    positions: int | None
    slots: Slots | None
    dense: bool

    @classmethod
    def of_static(cls, tokens: int, positions: int | None, cache_rows: int | None) -> Extremes:
        """Of a static plan with these bounds."""
        slots = None if cache_rows is None else Slots(-1, cache_rows - 1, False)
        return cls(tokens, positions, slots, dense=False)


UNKNOWN = Extremes(torch.iinfo(torch.int64).max, None, None, dense=False)
"""Of a plan that is being filled."""


@dataclass(frozen=True)
class Bounds:
    """What the steps of a static plan have at most: tokens, of one request, draft rows, positions (None: any)."""

    tokens: int
    query_len: int
    draft: int
    positions: int | None

    def check(self) -> None:
        """Raise DtypeError or RangeError unless they are numbers of tokens."""
        named = {"max_tokens": self.tokens, "max_query_len": self.query_len, "max_draft": self.draft}
        for name, value in named.items():
            require_int(name, value, 0)
        if self.positions is not None:
            require_int("max_positions", self.positions, 0)


def check_places(batch: RaggedBatch, layout: Layout | None, page_rows: int | None, cache_rows: int | None) -> None:
    """Raise unless a static batch says where its state and its rows are, as far as that needs no value."""
    check_kinds(batch, layout, page_rows)
    if isinstance(layout, PagedLayout):
        table_of(batch)
    elif layout is not None:
        slots_of(batch)
    if cache_rows is not None:
        require_int("cache_rows", cache_rows, 0)


def check_kinds(batch: RaggedBatch, layout: Layout | None, page_rows: int | None) -> None:
    """Raise unless these are a layout and the cache's page size, and it is there if pages are named by a table."""
    if layout is not None:
        require("state_layout", layout, (RingLayout, PagedLayout, OnlineLayout))
    if page_rows is not None and (isinstance(page_rows, bool) or not isinstance(page_rows, int) or page_rows < 1):
        raise RangeError("page_rows", "None or an integer of at least 1", repr(page_rows))
    if page_rows is None and batch.block_table is not None and batch.slot_mapping is None:
        raise KvCondenseError("page_rows", "the cache's page size (block_table is given)", "None")


def sound(spec: CompressorSpec, batch: RaggedBatch, layout: Layout | None, bounds: Bounds) -> RaggedBatch:
    """The batch with all requests inert whose metadata leaves its bounds; asks for no value.

    They are those that ``RaggedBatch.build`` and ``Plan.build`` raise for on the host.
    """
    given = batch.query_start_loc
    offsets = given.clamp(0, bounds.tokens).cummax(0).values
    same = offsets == given
    start, count, drafts = batch.start_positions, offsets.diff(), batch.draft_rows
    most = torch.iinfo(torch.int32).max if bounds.positions is None else bounds.positions
    good = same[:-1] & same[1:] & (count > 0) & (count <= bounds.query_len) & (start >= 0) & (start <= most - count)
    good &= (drafts >= 0) & (drafts <= count) & (drafts <= bounds.draft)
    if isinstance(layout, RingLayout | OnlineLayout):
        slot = slots_of(batch)
        good &= (slot >= 0) & (slot < layout.num_slots)
        where = torch.where(good, slot, layout.num_slots)  # one more, for those that have none
        owners = torch.zeros(layout.num_slots + 1, dtype=torch.int64, device=slot.device)
        good &= owners.index_add(0, where, torch.ones_like(where))[where] == 1
    elif isinstance(layout, PagedLayout):
        # What requests that are out already say must not overflow; they stay out whatever pages they seem to need.
        live = replace(
            batch,
            query_start_loc=offsets,
            start_positions=torch.where(good, start, 0),
            draft_rows=torch.where(good, drafts, 0),
        )
        good &= ~_lacks_pages(spec, live, layout)
    return replace(
        batch,
        query_start_loc=offsets,
        start_positions=torch.where(good, start, -1),
        draft_rows=torch.where(good, drafts, 0),
    )


def _lacks_pages(spec: CompressorSpec, batch: RaggedBatch, layout: PagedLayout) -> torch.Tensor:
    """Requests [R] that read or keep a row on a page that their table does not have."""
    table = batch.state_block_table
    assert table is not None
    start, end = batch.start_positions, batch.start_positions + batch.lengths
    column = torch.arange(table.shape[1], device=table.device)
    absent = (table < 0) | (table >= layout.num_pages)
    lacking = torch.zeros_like(start, dtype=torch.bool)
    for low, high in ((live_starts(spec, start), start), (layout.keep_start(spec, batch), end)):
        page, last = low // layout.page_tokens, (high - 1) // layout.page_tokens
        needed = (column >= page[:, None]) & (column <= last[:, None])
        lacking |= (low < high) & ((last >= table.shape[1]) | (needed & absent).any(1))
    return lacking
