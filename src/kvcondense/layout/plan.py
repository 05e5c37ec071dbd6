"""Plan: which windows a step completes and which state rows it must keep. Integers only, made once per step."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from kvcondense.errors import KvCondenseError, RangeError, ShapeError, require
from kvcondense.layout.addresses import PagedLayout, RingLayout, live_starts
from kvcondense.layout.batch import RaggedBatch, check_fields, copy_fields, spread
from kvcondense.layout.extremes import UNKNOWN, Bounds, Extremes, Layout, Slots, check_kinds, check_places, sound
from kvcondense.layout.state import Reads
from kvcondense.spec import CompressorSpec

WINDOW_FIELDS = ("window_request", "window_index", "window_slot")
BARRIERS, COLUMNS, _MOST = 2, 256, torch.iinfo(torch.int64).max
COUNTERS = BARRIERS + COLUMNS
"""Of a plan, behind those of its windows."""
KEEP_FIELDS = ("keep_token", "keep_request", "keep_position", "keep_row")


@dataclass(frozen=True)
class Facts:
    """What tags, and backends that take no padding, need of the values in a plan. Asked for once, for all layers.

    dense: the plan without padding; active: indices of the requests that bring tokens; reads: the state rows that they
    go on from; made: what compiled code keeps of them.
    """

    dense: Plan
    active: torch.Tensor
    reads: Reads
    made: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Work of one step for every layer with the same ratio, overlap, state layout and cache geometry. All int64.

    window_request, window_index [E]: window c of request q, in order of q, then c. window_slot [E]: cache row, or -1.
    keep_token, keep_request, keep_position, keep_row [K]: token t at position p of request q goes to a state row.
    Entries of -1 in window_request or keep_token are padding and stand at the end. overwrites: a kept row may take the
    place of a stored row that a window of this step reads, so that rows must be kept after all windows were read.
    counters [E + 258] int64, zero: scratch of backends: windows and blocks of projected channels, which they leave
    zero, and barriers between them, which count steps by 2^48. One stream at a time may use a plan; rows of steps that
    meet on one are NaN. extremes: what a step reaches at most. given: the batch that the plan was built for; ``batch``
    is another one where a static plan made requests inert.
    """

    ratio: int
    overlap: bool
    batch: RaggedBatch
    state_layout: Layout | None
    page_rows: int | None
    window_request: torch.Tensor
    window_index: torch.Tensor
    window_slot: torch.Tensor
    keep_token: torch.Tensor
    keep_request: torch.Tensor
    keep_position: torch.Tensor
    keep_row: torch.Tensor
    overwrites: bool
    counters: torch.Tensor
    extremes: Extremes
    given: RaggedBatch

    @classmethod
    def build(
        cls,
        spec: CompressorSpec,
        batch: RaggedBatch,
        *,
        state_layout: Layout | None = None,
        page_rows: int | None = None,
    ) -> Plan:
        """Plan a step. A window is emitted when its last position, c * ratio + ratio - 1, is in the step.

        ``page_rows`` is the cache's page size; it is needed with ``batch.block_table``. Raises when the ring is too
        short for the draft rows, a table entry is missing, or two requests or rows collide. Nothing is written.
        """
        require("spec", spec, CompressorSpec)
        require("batch", batch, RaggedBatch)
        given, batch = batch, batch.checked()
        check_kinds(batch, state_layout, page_rows)
        if state_layout is not None:
            state_layout.check(batch, spec)
        start, first, windows, low, keep = _work(spec, batch, state_layout)
        _check_table(batch, first, windows, page_rows)
        request, offset = spread(windows)
        window = first[request] + offset
        last_token = batch.query_start_loc[request] + (window + 1) * spec.ratio - 1 - start[request]
        slot = _slots(batch, request, window, last_token, page_rows)
        keep_request, keep_offset = spread(keep)
        position = low[keep_request] + keep_offset
        row = state_layout.address(batch, keep_request, position) if state_layout is not None else position
        if row.unique().shape[0] != row.shape[0]:
            raise RangeError("state_block_table", "a state row of its own for each request and position", "shared rows")
        return cls(
            ratio=spec.ratio,
            overlap=spec.overlap,
            batch=batch,
            state_layout=state_layout,
            page_rows=page_rows,
            window_request=request,
            window_index=window,
            window_slot=slot,
            keep_token=batch.query_start_loc[keep_request] + position - start[keep_request],
            keep_request=keep_request,
            keep_position=position,
            keep_row=row,
            overwrites=_overwrites(spec, batch, state_layout, windows, row),
            counters=_counters(window),
            extremes=Extremes(
                tokens=int(batch.query_start_loc[-1]),
                positions=int(window.max()) * spec.ratio + 1 if window.shape[0] else 0,
                slots=Slots.of(slot),
                dense=True,
            ),
            given=given,
        )

    @staticmethod
    def capacity(
        spec: CompressorSpec, max_tokens: int, requests: int, max_draft: int = 0, state_layout: Layout | None = None
    ) -> tuple[int, int]:
        """Most windows and kept rows that a step can have, whatever its metadata: the sizes of a static plan."""
        windows = min(max_tokens, max_tokens // spec.ratio + requests)
        if isinstance(state_layout, PagedLayout) and state_layout.keep_all:
            return windows, max_tokens
        return windows, min(max_tokens, requests * (spec.window - 1 + max_draft))

    @classmethod
    def build_static(
        cls,
        spec: CompressorSpec,
        batch: RaggedBatch,
        *,
        max_tokens: int,
        max_draft: int = 0,
        max_query_len: int | None = None,
        state_layout: Layout | None = None,
        page_rows: int | None = None,
        max_positions: int | None = None,
        cache_rows: int | None = None,
    ) -> Plan:
        """The padded plan of ``build``, on the batch's device, in fixed shapes and without asking for a value.

        Equal to ``build(...).padded(*capacity(spec, max_tokens, requests, max_draft, state_layout))``, entry for entry,
        where ``build`` would not raise. ``max_tokens`` bounds query_start_loc[-1] (it is the size of the kv_score
        buffer), ``max_draft`` bounds draft_rows, ``max_query_len`` the tokens of one request (default: max_tokens);
        where it is small enough, ``overwrites`` is False. ``max_positions`` is the RoPE table's, ``cache_rows`` the
        cache's size; a step with either needs it. Requests that pass a bound, or name a slot or page that the state
        lacks, are inert, and cache rows beyond ``cache_rows`` are not written: a captured graph with bad metadata
        writes nothing rather than elsewhere. Raises if the state cannot take such steps at all, if slots or tables that
        it needs are not there, or if an argument is of another type or form.
        """
        require("spec", spec, CompressorSpec)
        require("batch", batch, RaggedBatch)
        given, longest = batch, max_tokens if max_query_len is None else max_query_len
        bounds = Bounds(max_tokens, longest, max_draft, max_positions)
        bounds.check()
        batch.check_form()
        check_places(batch, state_layout, page_rows, cache_rows)
        windows, keeps = cls.capacity(spec, max_tokens, batch.start_positions.shape[0], max_draft, state_layout)
        if batch.start_positions.shape[0] == 0:
            return cls.build(spec, batch, state_layout=state_layout, page_rows=page_rows).padded(windows, keeps)
        if state_layout is not None:
            state_layout.check_drafts(spec, max_draft)
        batch = sound(spec, batch, state_layout, bounds).owned()
        start, first, ending, low, keep = _work(spec, batch, state_layout)
        request, offset, live = _spread_static(ending, windows)
        window = first[request] + offset
        last_token = batch.query_start_loc[request] + (window + 1) * spec.ratio - 1 - start[request]
        slot = _slots_static(batch, request, window, last_token, page_rows, cache_rows)
        owner, behind, kept = _spread_static(keep, keeps)
        position = low[owner] + behind
        row = position
        if state_layout is not None:
            # Entries beyond the last one may name pages that the table does not have.
            row = state_layout.address(batch, owner, torch.where(kept, position, 0))
        token = batch.query_start_loc[owner] + position - start[owner]
        return cls(
            ratio=spec.ratio,
            overlap=spec.overlap,
            batch=batch,
            state_layout=state_layout,
            page_rows=page_rows,
            **{n: torch.where(live, t, -1) for n, t in zip(WINDOW_FIELDS, (request, window, slot), strict=True)},
            **{n: torch.where(kept, t, -1) for n, t in zip(KEEP_FIELDS, (token, owner, position, row), strict=True)},
            overwrites=may_overwrite(spec.window, state_layout, longest),
            counters=_counters(window),
            extremes=Extremes.of_static(max_tokens, max_positions, cache_rows),
            given=given,
        )

    def copy_(self, other: Plan) -> None:
        """Take over a plan of the same shape in place, its batch too: a captured graph is replayed with new metadata.

        Raises ShapeError or KvCondenseError before anything is written if the plans are not of one kind.
        """
        for name in ("ratio", "overlap", "state_layout", "page_rows"):
            if getattr(self, name) != getattr(other, name):
                raise KvCondenseError(name, getattr(self, name), getattr(other, name))
        if other.overwrites and not self.overwrites:
            raise KvCondenseError("overwrites", "a plan whose kept rows replace no row that it reads", "one that may")
        names = (*WINDOW_FIELDS, *KEEP_FIELDS)
        check_fields(self, other, names)
        self.check_admitted(other.extremes)
        self.batch.check_like(other.batch)
        reached = other.extremes  # it may be this very plan
        self.renew(None)
        self.batch.copy_(other.batch)
        copy_fields(self, other, names)
        self.counters.zero_()  # whatever a step that was broken off has left
        self.renew(reached)

    def renew(self, extremes: Extremes | None) -> None:
        """Forget what was known of the values: others take their place, which reach ``extremes``.

        None: they are about to. Until it is said what they reach, no step is admitted with this plan.
        """
        object.__setattr__(self, "extremes", UNKNOWN if extremes is None else replace(extremes, dense=False))
        for known in ("_facts", "_passed"):
            vars(self).pop(known, None)

    @property
    def passed(self) -> dict[Any, int]:
        """What this plan was compared with, for as long as its values are these, and with how many tokens."""
        memory = self.__dict__
        known = memory.get("_passed")
        return memory.setdefault("_passed", {}) if known is None else known

    def admitted_to(self, tokens: int, positions: int | None, cache_rows: int | None) -> None:
        """Remember the least sizes that a step with this plan was admitted to: rows of tokens, RoPE table and cache."""
        sizes, memory = (tokens, positions, cache_rows), self.__dict__
        known = memory.get("_admitted")
        if known is None:  # each is kept, so that threads that come at once lose none
            known = memory.setdefault("_admitted", {})
        if sizes not in known:
            known[sizes] = True

    def check_admitted(self, new: Extremes) -> None:
        """Raise RangeError if buffers that this plan was used with, as by a graph, are too small for another one."""
        admitted = list(vars(self).get("_admitted", ())) or [(None, None, None)]
        tokens, positions, rows = (
            min((n for n in of if n is not None), default=None) for of in zip(*admitted, strict=True)
        )
        reached = (
            ("query_start_loc", tokens, new.tokens),
            ("positions", positions, new.positions),
            ("slot_mapping", rows, None if new.slots is None else new.slots.highest + 1),
        )
        for name, most, wanted in reached:
            if most is not None and (wanted is None or wanted > most):
                got = "a static plan that does not say" if wanted is None else wanted
                raise RangeError(name, f"at most {most}, as what this plan is used with", got)

    def facts(self, spec: CompressorSpec) -> Facts:
        """The facts of this plan, for a spec of its ratio and overlap. The first call asks for values.

        They are kept, since a plan does not change but through ``copy_``.
        """
        known: Facts | None = vars(self).get("_facts")
        if known is None:
            known = Facts(
                dense=self.without_padding(),
                active=self.batch.active.nonzero()[:, 0],
                reads=Reads.of(spec, self.batch, self.state_layout),
            )
            vars(self)["_facts"] = known
        return known

    @property
    def made(self) -> dict[str, Any]:
        """What backends keep of this plan, by their names; neither copies nor ``replace`` take it along."""
        memory = self.__dict__
        known = memory.get("_made")
        if known is None:
            known = memory["_made"] = {}
        return known

    def __getstate__(self) -> dict[str, Any]:
        """The fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def num_windows(self) -> int:
        """Length of the window arrays, padding included."""
        return self.window_request.shape[0]

    def without_padding(self) -> Plan:
        """The same plan with its padding entries dropped."""
        windows, keeps = self.window_request >= 0, self.keep_token >= 0
        if self.extremes.dense or (bool(windows.all()) and bool(keeps.all())):
            return self
        left = {name: getattr(self, name)[windows] for name in WINDOW_FIELDS}
        left |= {name: getattr(self, name)[keeps] for name in KEEP_FIELDS}
        extremes = replace(self.extremes, dense=True)
        return replace(self, **left, counters=_counters(left["window_index"]), extremes=extremes)

    def padded(self, windows: int, keeps: int) -> Plan:
        """The same plan in fixed-size arrays, filled up with -1, so that shapes stay constant from step to step."""

        def fill(name: str, size: int) -> torch.Tensor:
            values: torch.Tensor = getattr(self, name)
            if values.shape[0] > size:
                raise RangeError(f"capacity of {name}", f"at least {values.shape[0]}", size)
            return torch.cat([values, values.new_full((size - values.shape[0],), -1)])

        sizes = dict.fromkeys(WINDOW_FIELDS, windows) | dict.fromkeys(KEEP_FIELDS, keeps)
        filled = {name: fill(name, size) for name, size in sizes.items()}
        extremes = replace(self.extremes, dense=self.extremes.dense and sizes == self._sizes())
        may = self.overwrites
        if isinstance(self.state_layout, RingLayout):  # those that are copied in may read what this one does not
            longest = max([0, *self.batch.lengths.tolist()])
            may = may or may_overwrite(self.ratio * (1 + self.overlap), self.state_layout, longest)
        return replace(self, **filled, counters=_counters(filled["window_index"]), extremes=extremes, overwrites=may)

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name).shape[0] for name in (*WINDOW_FIELDS, *KEEP_FIELDS)}


def _work(
    spec: CompressorSpec, batch: RaggedBatch, layout: Layout | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per request [R]: start position, first window and number of windows, first kept position and number of rows."""
    start = torch.where(batch.active, batch.start_positions, 0)
    end = start + torch.where(batch.active, batch.lengths, 0)
    # Window c ends inside [start, end) iff start // r <= c < end // r.
    first = start // spec.ratio
    low = end if layout is None else torch.where(batch.active, layout.keep_start(spec, batch), end)
    return start, first, end // spec.ratio - first, low, end - low


def _counters(windows: torch.Tensor) -> torch.Tensor:
    return torch.zeros(windows.shape[0] + COUNTERS, dtype=torch.int64, device=windows.device)


def _overwrites(
    spec: CompressorSpec, batch: RaggedBatch, layout: Layout | None, windows: torch.Tensor, row: torch.Tensor
) -> bool:
    """Whether one of the kept rows [K] may be a row that a window reads; ``windows`` [R] per request."""
    if not isinstance(layout, RingLayout | PagedLayout) or not bool(windows.any()):
        return False
    if isinstance(layout, RingLayout):
        # The oldest row that is read and the newest that is kept share a ring row if they lie that far apart.
        start, oldest = batch.start_positions, live_starts(spec, batch.start_positions)
        far = (oldest < start) & (start + batch.lengths - oldest > layout.ring_rows)
        return bool((far & (windows > 0)).any())
    reads = Reads.of(spec, batch, layout).row
    return reads is not None and bool(torch.isin(row, reads).any())


def may_overwrite(window: int, layout: Layout | None, max_query_len: int) -> bool:
    """Whether ``_overwrites`` may be true of a batch whose requests have at most ``max_query_len`` tokens."""
    if isinstance(layout, RingLayout):
        return max_query_len + window - 1 > layout.ring_rows
    # A page that is read and kept at once was handed out twice; a single token finds its window's pages intact.
    return isinstance(layout, PagedLayout) and max_query_len > 1


def _spread_static(counts: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``batch.spread`` in a fixed size: owner, running number, and whether there is such an item at all [size]."""
    item = torch.arange(size, device=counts.device)
    ends = torch.cumsum(counts, 0)
    owner = torch.searchsorted(ends, item, right=True).clamp(max=counts.shape[0] - 1)
    return owner, item - (ends - counts)[owner], item < ends[-1]


def _slots(
    batch: RaggedBatch, request: torch.Tensor, window: torch.Tensor, last_token: torch.Tensor, page_rows: int | None
) -> torch.Tensor:
    """Cache row of each window, -1 for none."""
    if batch.slot_mapping is not None:
        return batch.slot_mapping[last_token]
    if batch.block_table is None:
        return torch.full_like(window, -1)
    assert page_rows is not None
    table, page = batch.block_table, window // page_rows
    entry = table[request, page]
    wrong = (entry < 0) | (entry > _MOST // page_rows - 1)  # no product of it leaves int64
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0, 0])
        raise RangeError(f"block_table[{int(request[i])}, {int(page[i])}]", "a page of the cache", int(entry[i]))
    return entry * page_rows + window % page_rows


def _check_table(batch: RaggedBatch, first: torch.Tensor, windows: torch.Tensor, page_rows: int | None) -> None:
    """Raise unless the block table has a column for every window; before anything is made for each window."""
    if batch.slot_mapping is not None or batch.block_table is None:
        return
    assert page_rows is not None
    last = torch.where(windows > 0, (first + windows - 1) // page_rows, -1)
    if bool((last >= batch.block_table.shape[1]).any()):
        raise ShapeError("block_table", f"at least {int(last.max()) + 1} pages", f"{batch.block_table.shape[1]}")


def _slots_static(
    batch: RaggedBatch, request: torch.Tensor, window: torch.Tensor, last_token: torch.Tensor, page_rows: int | None,
    cache_rows: int | None,
) -> torch.Tensor:  # fmt: skip
    """The same without asking for a value: -1 for what is no row of the cache."""
    slot = torch.full_like(window, -1)
    if batch.slot_mapping is not None and batch.slot_mapping.shape[0]:
        entries = batch.slot_mapping.shape[0]
        named = batch.slot_mapping[last_token.clamp(0, entries - 1)]
        slot = torch.where((last_token >= 0) & (last_token < entries), named, slot)
    elif batch.block_table is not None and batch.block_table.shape[1]:
        assert page_rows is not None
        page, pages = window // page_rows, batch.block_table.shape[1]
        entry = batch.block_table[request, page.clamp(0, pages - 1)]
        there = (page >= 0) & (page < pages) & (entry >= 0) & (entry < _MOST // page_rows)
        slot = torch.where(there, torch.where(there, entry, 0) * page_rows + window % page_rows, slot)
    return torch.where((slot >= 0) & (slot < (_MOST if cache_rows is None else cache_rows)), slot, -1)
