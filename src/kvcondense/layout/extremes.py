"""What a plan reaches at most, so that a step compares a few integers and no address of it lies outside its buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.layout.addresses import PagedLayout, RingLayout, keep_start_of, live_starts
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


def sound(
    spec: CompressorSpec, batch: RaggedBatch, layout: Layout | None, max_tokens: int, max_draft: int,
    max_positions: int | None,
) -> torch.Tensor:  # fmt: skip
    """Requests [R] whose metadata stays inside what a static plan was made for; asks for no value.

    What ``RaggedBatch.build`` and ``Plan.build`` raise for on the host makes a request inert here.
    """
    first, last = batch.query_start_loc[:-1], batch.query_start_loc[1:]
    start, count, drafts = batch.start_positions, last - first, batch.draft_rows
    most = torch.iinfo(torch.int32).max if max_positions is None else max_positions
    good = (first >= 0) & (count > 0) & (last <= max_tokens) & (start >= 0) & (start <= most - count)
    good &= (drafts >= 0) & (drafts <= count) & (drafts <= max_draft)
    if isinstance(layout, RingLayout | OnlineLayout):
        assert batch.state_slots is not None
        slot = batch.state_slots
        good &= (slot >= 0) & (slot < layout.num_slots)
        where = torch.where(good, slot, layout.num_slots)  # one more, for those that have none
        owners = torch.zeros(layout.num_slots + 1, dtype=torch.int64, device=slot.device)
        good &= owners.index_add(0, where, torch.ones_like(where))[where] == 1
    elif isinstance(layout, PagedLayout):
        good &= ~_lacks_pages(spec, batch, layout, good)
    return good


def _lacks_pages(spec: CompressorSpec, batch: RaggedBatch, layout: PagedLayout, live: torch.Tensor) -> torch.Tensor:
    """Requests [R] that read or keep a row on a page that their table does not have."""
    table = batch.state_block_table
    assert table is not None
    start = torch.where(live, batch.start_positions, 0)
    end = start + torch.where(live, batch.lengths, 0)
    column = torch.arange(table.shape[1], device=table.device)
    absent = (table < 0) | (table >= layout.num_pages)
    lacking = torch.zeros_like(live)
    for low, high in ((live_starts(spec, start), start), (keep_start_of(spec, layout, start, end, batch), end)):
        touched = low < high
        page, last = low // layout.page_tokens, (high - 1) // layout.page_tokens
        needed = (column >= page[:, None]) & (column <= last[:, None])
        lacking |= touched & ((last >= table.shape[1]) | (needed & absent).any(1))
    return lacking
