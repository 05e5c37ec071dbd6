"""StatePool: the recurrent rows [kv | score + ape] of all requests, addressed by absolute position, never shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcondense.errors import DtypeError, RangeError, ShapeError, StateMismatchError, require
from kvcondense.layout.batch import RaggedBatch, spread
from kvcondense.spec import CompressorSpec

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class RingLayout:
    """Row of position p of a request in slot s: s * ring_rows + p mod ring_rows."""

    num_slots: int
    ring_rows: int

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
        drafts = int(batch.draft_rows[batch.active].max()) if bool(batch.active.any()) else 0
        needed = spec.required_ring_rows(drafts)
        if self.ring_rows < needed:
            raise RangeError(
                "state ring_rows", f"at least {needed} (window {spec.window}, {drafts} draft rows)", self.ring_rows
            )


@dataclass(frozen=True)
class PagedLayout:
    """Row of position p of request q: state_block_table[q, p // page_rows] * page_rows + p mod page_rows."""

    num_pages: int
    page_rows: int

    @property
    def num_rows(self) -> int:
        return self.num_pages * self.page_rows

    def address(self, batch: RaggedBatch, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """State row of each (request, position), int64; positions must be >= 0."""
        assert batch.state_block_table is not None
        page = batch.state_block_table[request, position // self.page_rows]
        return page * self.page_rows + position % self.page_rows

    def keep_start(self, spec: CompressorSpec, batch: RaggedBatch) -> torch.Tensor:
        """First position of each request [R] whose row is kept."""
        return _keep_start(spec, batch)

    def check(self, batch: RaggedBatch, spec: CompressorSpec) -> None:
        """Raise unless every page that this step reads or writes is in the table and exists."""
        table = batch.state_block_table
        if table is None:
            raise ShapeError("state_block_table", "a block table (the state is paged)", "None")
        start, end = batch.start_positions, batch.start_positions + batch.lengths
        column = torch.arange(table.shape[1], device=table.device)
        needed = torch.zeros_like(table, dtype=torch.bool)
        # Rows the step may read, then rows it keeps; earlier rows of a long chunk touch no page.
        for low, high in (
            (live_starts(spec, start), start),
            (torch.maximum(start, live_starts(spec, end - batch.draft_rows)), end),
        ):
            touched = batch.active & (low < high)
            last = (high - 1) // self.page_rows
            if bool((last[touched] >= table.shape[1]).any()):
                raise ShapeError(
                    "state_block_table", f"at least {int(last[touched].max()) + 1} pages", f"{table.shape[1]}"
                )
            pages = (column >= (low // self.page_rows)[:, None]) & (column <= last[:, None])
            needed |= pages & touched[:, None]
        bad = needed & ((table < 0) | (table >= self.num_pages))
        if bool(bad.any()):
            q, c = bad.nonzero()[0].tolist()
            raise RangeError(f"state_block_table[{q}, {c}]", f"a page in 0..{self.num_pages - 1}", int(table[q, c]))


def check_slots(batch: RaggedBatch, num_slots: int) -> None:
    """Raise unless every live request has a state slot of its own below ``num_slots``."""
    if batch.state_slots is None:
        raise ShapeError("state_slots", "one state slot per request (the state has slots)", "None")
    used = batch.state_slots[batch.active]
    if bool((used >= num_slots).any()):
        raise RangeError("state_slots", f"below {num_slots}", int(used.max()))
    if used.unique().shape[0] != used.shape[0]:
        raise RangeError("state_slots", "a slot of its own for each request", batch.state_slots.tolist())


def slot_index(name: str, slots: torch.Tensor | Sequence[int], limit: int, device: torch.device) -> torch.Tensor:
    """``slots`` as int64 [n] in 0..limit - 1; raises DtypeError or RangeError otherwise."""
    index = torch.as_tensor(slots, device=device)
    if index.dim() != 1 or (index.numel() and index.dtype not in (torch.int32, torch.int64)):
        raise DtypeError(name, "integers [n]", f"{index.dtype} {list(index.shape)}")
    index = index.to(torch.int64)
    if bool(((index < 0) | (index >= limit)).any()):
        raise RangeError(name, f"values in 0..{limit - 1}", index.tolist())
    return index


def check_fork(source: torch.Tensor, target: torch.Tensor) -> None:
    """Raise unless every target is named once and is no source."""
    if source.shape != target.shape:
        raise ShapeError("target", f"{source.shape[0]} entries as the source", f"{target.shape[0]}")
    if target.unique().shape[0] != target.shape[0] or bool(torch.isin(target, source).any()):
        raise RangeError("target", "entries of its own, none of them a source", target.tolist())


def _keep_start(spec: CompressorSpec, batch: RaggedBatch) -> torch.Tensor:
    """First position of each request [R] that some continuation, with all drafts rejected or none, can still read."""
    end = batch.start_positions + batch.lengths
    return torch.maximum(batch.start_positions, live_starts(spec, end - batch.draft_rows))


def live_starts(spec: CompressorSpec, length: torch.Tensor) -> torch.Tensor:
    """Tensor form of :meth:`CompressorSpec.live_start`."""
    return ((length // spec.ratio - (spec.halves - 1)) * spec.ratio).clamp(min=0)


@dataclass
class StatePool:
    """State rows of many requests: ``data`` [num_rows, state_dim], fp32 by default, and how to address them.

    ``tags`` [num_rows] int64 holds the absolute position stored in each row (-1: nothing). It lets the host check,
    before anything is written, that every row a step reads is the one it means; ``None`` switches the check off. Tags
    know positions, not owners: a ring forgets what it held from a request's start position on, pages do not.

    bf16 halves the memory. It rounds stored values by 2^-9 of themselves, so for the largest |K| and |z| of a window
    |P - P_fp32| <= |K| (2^-9 + e^(2 * 2^-9 |z|) - 1): 1 % of |K| for scores up to 2. Splits stay exact, since rows
    read from the step pass through the state's dtype, too.
    """

    data: torch.Tensor
    layout: RingLayout | PagedLayout
    tags: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.data.dim() != 2 or self.data.shape[0] != self.layout.num_rows:
            raise ShapeError("state data", f"shape [{self.layout.num_rows}, state_dim]", f"{list(self.data.shape)}")
        if self.data.dtype not in STATE_DTYPES:
            raise DtypeError("state data", "fp32, bf16 or fp64", self.data.dtype)
        if self.tags is not None and (
            self.tags.shape != self.data.shape[:1] or self.tags.dtype != torch.int64 or self.tags.is_meta
        ):
            raise ShapeError("state tags", f"int64 [{self.layout.num_rows}]", f"{self.tags.dtype} {self.tags.shape}")

    @classmethod
    def ring(
        cls,
        spec: CompressorSpec,
        num_slots: int,
        ring_rows: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StatePool:
        """A ring of ``ring_rows`` rows per slot (default: the window, the least without drafts)."""
        require("spec", spec, CompressorSpec)
        return cls._new(
            spec, RingLayout(num_slots, spec.required_ring_rows(0) if ring_rows is None else ring_rows), dtype, device
        )

    @classmethod
    def paged(
        cls,
        spec: CompressorSpec,
        num_pages: int,
        page_rows: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StatePool:
        """Pages of ``page_rows`` rows that requests reach through ``state_block_table``."""
        return cls._new(spec, PagedLayout(num_pages, page_rows), dtype, device)

    @classmethod
    def _new(
        cls,
        spec: CompressorSpec,
        layout: RingLayout | PagedLayout,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> StatePool:
        require("spec", spec, CompressorSpec)
        for name, value in vars(layout).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RangeError(name, "an integer of at least 1", repr(value))
        if dtype not in STATE_DTYPES:
            raise DtypeError("state dtype", "fp32, bf16 or fp64", dtype)
        data = torch.empty(layout.num_rows, spec.state_dim, dtype=dtype, device=device)
        tags = torch.full((layout.num_rows,), -1, dtype=torch.int64) if data.device.type == "cpu" else None
        return cls(data, layout, tags)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def state_dim(self) -> int:
        """Channels of a row."""
        return self.data.shape[1]

    def reset(self, slots: torch.Tensor | Sequence[int]) -> None:
        """Forget what slots (of a ring) or pages hold: their rows become NaN, and continuing from them raises.

        Not needed for correct rows, since a request that starts at 0 reads nothing: it makes mistakes visible.
        Mutates data and tags. Raises RangeError for a slot or page that the pool lacks.
        """
        rows = self._blocks("slots", slots)
        self.data[rows] = float("nan")
        if self.tags is not None:
            self.tags[rows] = -1

    def fork(self, source: torch.Tensor | Sequence[int], target: torch.Tensor | Sequence[int]) -> None:
        """Copy slots (of a ring) or pages ``source`` to ``target``, one to one: a second request goes on from there.

        Mutates data and tags. Raises RangeError for a slot or page that the pool lacks, that is named twice as a
        target, or that is source and target at once.
        """
        old, new = self._blocks("source", source), self._blocks("target", target)
        check_fork(old[:, 0] // self._block_rows, new[:, 0] // self._block_rows)
        self.data[new] = self.data[old]
        if self.tags is not None:
            self.tags[new] = self.tags[old]

    @property
    def _block_rows(self) -> int:
        return self.layout.ring_rows if isinstance(self.layout, RingLayout) else self.layout.page_rows

    def _blocks(self, name: str, blocks: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """State rows [n, rows of a block] of slots or pages."""
        index = slot_index(name, blocks, self.layout.num_rows // self._block_rows, self.data.device)
        return index[:, None] * self._block_rows + torch.arange(self._block_rows, device=index.device)

    def check_continues(self, spec: CompressorSpec, batch: RaggedBatch, reads: Reads) -> None:
        """Raise StateMismatchError unless every stored row that ``batch`` may read holds the position it should."""
        del spec
        if self.tags is not None and reads.row is not None and reads.row.shape[0]:
            held = self.tags.index_select(0, reads.row)
            if not torch.equal(held, reads.position):
                self._mismatch(batch, reads.request, reads.position, held)

    def check_rows(self, batch: RaggedBatch, request: torch.Tensor, position: torch.Tensor) -> None:
        """Raise StateMismatchError unless the pool holds each (request, position)."""
        if self.tags is None:
            return
        self._mismatch(batch, request, position, self.tags[self.layout.address(batch, request, position)])

    @staticmethod
    def _mismatch(batch: RaggedBatch, request: torch.Tensor, position: torch.Tensor, held: torch.Tensor) -> None:
        wrong = held != position
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0, 0])
            raise StateMismatchError(
                f"state of request {int(request[i])}",
                f"position {int(position[i])} (the request continues at {int(batch.start_positions[request[i]])})",
                "nothing that this request wrote" if held[i] < 0 else f"position {int(held[i])}",
            )

    def tag(
        self, batch: RaggedBatch, address: torch.Tensor, position: torch.Tensor, active: torch.Tensor | None = None
    ) -> None:
        """Record that rows ``address`` now hold ``position``; a ring forgets what it held from a request's start on.

        ``active``: indices of ``batch.active``, if they are at hand.
        """
        if self.tags is None:
            return
        if isinstance(self.layout, RingLayout) and batch.state_slots is not None:
            active = batch.active.nonzero()[:, 0] if active is None else active
            slots = batch.state_slots.index_select(0, active)
            rings = self.tags.view(self.layout.num_slots, self.layout.ring_rows)
            held = rings.index_select(0, slots)
            stale = held >= batch.start_positions.index_select(0, active)[:, None]
            rings.index_copy_(0, slots, held.masked_fill_(stale, -1))
        self.tags.index_copy_(0, address, position)


def live_rows(spec: CompressorSpec, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(request, position) of every row that requests at positions ``start`` [R] go on from: live_start(p) .. p - 1."""
    low = live_starts(spec, start)
    request, offset = spread(start - low)
    return request, low[request] + offset


@dataclass(frozen=True)
class Reads:
    """Stored rows that the requests of a step go on from: request, position [S], and, in rings and pages, row [S]."""

    request: torch.Tensor
    position: torch.Tensor
    row: torch.Tensor | None

    @classmethod
    def of(cls, spec: CompressorSpec, batch: RaggedBatch, layout: object) -> Reads:
        """Of a batch; asks for values."""
        request, position = live_rows(spec, torch.where(batch.active, batch.start_positions, 0))
        row = layout.address(batch, request, position) if isinstance(layout, RingLayout | PagedLayout) else None
        return cls(request, position, row)

    def check_none(self, batch: RaggedBatch) -> None:
        """Raise StateMismatchError if a request continues from rows that only a state pool could hold."""
        if self.request.shape[0]:
            raise StateMismatchError(
                "state",
                f"a StatePool (request {int(self.request[0])} continues at "
                f"{int(batch.start_positions[self.request[0]])} and reads position {int(self.position[0])})",
                "None",
            )
