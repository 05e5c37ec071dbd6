"""StatePool: the recurrent rows [kv | score + ape] of all requests, addressed by absolute position, never shifted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcondense.errors import (
    DeviceError,
    DtypeError,
    KvCondenseError,
    RangeError,
    ShapeError,
    StateMismatchError,
    require,
)
from kvcondense.layout.addresses import PagedLayout, RingLayout, live_starts
from kvcondense.layout.batch import RaggedBatch, spread
from kvcondense.layout.memory import check_written
from kvcondense.layout.pages import advise
from kvcondense.spec import CompressorSpec

UNKNOWN = -2
"""Tag of a row that a step has begun to write."""
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


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


@dataclass
class StatePool:
    """State rows of many requests: ``data`` [num_rows, state_dim], fp32 by default, and how to address them.

    Or [blocks, block_rows, state_dim], slots or pages at any stride (``wrap``). With ``score``, a second tensor of the
    same shape, type and strides, ``data`` holds kv alone [.., N], and ``score`` the rest of each row.

    ``tags`` [num_rows] int64 holds the absolute position stored in each row (-1: nothing, -2: a step that was broken
    off has begun to write it). It lets the host check,
    before anything is written, that every row a step reads is the one it means; ``None`` switches the check off. Tags
    know positions, not owners: a ring forgets what it held from a request's start position on, pages do not.

    bf16 halves the memory. It rounds stored values by 2^-9 of themselves, so for the largest |K| and |z| of a window
    |P - P_fp32| <= |K| (2^-9 + e^(2 * 2^-9 |z|) - 1): 1 % of |K| for scores up to 2. Splits stay exact, since rows
    read from the step pass through the state's dtype, too.
    """

    data: torch.Tensor
    layout: RingLayout | PagedLayout
    tags: torch.Tensor | None = None
    score: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.check_memory()

    def check_memory(self) -> None:
        """Raise unless the tensors hold these rows: their shapes, types and strides. They may have been exchanged."""
        rows = self.layout.num_rows
        blocks = (rows // self.layout.block_rows, self.layout.block_rows)
        if tuple(self.data.shape[:-1]) not in ((rows,), blocks) or self.data.stride(-1) != 1:
            wanted = f"shape [{rows}, state_dim] or [{blocks[0]}, {blocks[1]}, state_dim], channels in order"
            raise ShapeError("state data", wanted, f"{list(self.data.shape)}")
        if self.data.dtype not in STATE_DTYPES:
            raise DtypeError("state data", "fp32, bf16 or fp64", self.data.dtype)
        check_written("state data", self.data)
        if self.score is not None:
            self._check_score(self.score)
        if self.tags is not None and (
            self.tags.shape != (rows,) or self.tags.dtype != torch.int64 or self.tags.is_meta
        ):
            raise ShapeError("state tags", f"int64 [{self.layout.num_rows}]", f"{self.tags.dtype} {self.tags.shape}")

    def _check_score(self, score: torch.Tensor) -> None:
        if score.dtype != self.data.dtype:
            raise DtypeError("state score", f"{self.data.dtype} as the state data", score.dtype)
        if score.device != self.data.device:
            raise DeviceError("state score", f"device {self.data.device}", score.device)
        if score.shape != self.data.shape or score.stride() != self.data.stride():
            wanted = f"shape {list(self.data.shape)}, strides {list(self.data.stride())} as the state data"
            raise ShapeError("state score", wanted, f"{list(score.shape)}, {list(score.stride())}")
        check_written("state score", score)

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
    def wrap(
        cls,
        rows: torch.Tensor,
        *,
        paged: bool,
        score: torch.Tensor | None = None,
        page_tokens: int = 0,
        keep_all: bool = False,
        raw_scores: bool = False,
    ) -> StatePool:
        """An engine's own tensor [slots or pages, rows, state_dim], read and written in place; blocks at any stride.

        ``score``: where an engine has kv and scores in two tensors [.., N] of one shape and layout. The other
        arguments are those of ``PagedLayout`` and ``RingLayout``. There are no tags, since others may write these
        rows, too.
        """
        if not isinstance(rows, torch.Tensor) or rows.dim() != 3:
            raise ShapeError("rows", "[blocks, block_rows, state_dim]", getattr(rows, "shape", type(rows).__name__))
        if not paged and (page_tokens or keep_all):
            raise KvCondenseError("paged", "True (page_tokens and keep_all are of pages)", "False")
        blocks, each = rows.shape[:2]
        layout = PagedLayout(blocks, each, page_tokens, keep_all, raw_scores) if paged else None
        return cls(rows, layout or RingLayout(blocks, each, raw_scores), score=score)

    @classmethod
    def _new(
        cls,
        spec: CompressorSpec,
        layout: RingLayout | PagedLayout,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> StatePool:
        require("spec", spec, CompressorSpec)
        if dtype not in STATE_DTYPES:
            raise DtypeError("state dtype", "fp32, bf16 or fp64", dtype)
        data = advise(torch.empty(layout.num_rows, spec.state_dim, dtype=dtype, device=device))
        tags = (
            torch.full((layout.num_rows,), -1, dtype=torch.int64, device="cpu") if data.device.type == "cpu" else None
        )
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
        return sum(t.shape[-1] for t in self.memory)

    @property
    def blocks(self) -> torch.Tensor:
        """View [slots or pages, rows of each, channels of ``data``]."""
        return self._in_blocks(self.data)

    def _in_blocks(self, t: torch.Tensor) -> torch.Tensor:
        return t if t.dim() == 3 else t.unflatten(0, (-1, self.layout.block_rows))

    def take(self, row: torch.Tensor) -> torch.Tensor:
        """Rows by number (``PagedLayout.address``), of any shape: [..., state_dim], a copy."""
        at = row if self.data.dim() == 2 else self._split(row)
        parts = [t[at] for t in self.memory]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def put(self, row: torch.Tensor, values: torch.Tensor) -> None:
        """Write rows by number."""
        at = row if self.data.dim() == 2 else self._split(row)
        for t, part in zip(self.memory, values.split(self.data.shape[-1], dim=-1), strict=True):
            t[at] = part

    def _split(self, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return row // self.layout.block_rows, row % self.layout.block_rows

    def reset(self, slots: torch.Tensor | Sequence[int]) -> None:
        """Forget what slots (of a ring) or pages hold: their rows become NaN, and continuing from them raises.

        Not needed for correct rows, since a request that starts at 0 reads nothing: it makes mistakes visible.
        Mutates data and tags. Raises RangeError for a slot or page that the pool lacks.
        """
        index = self._index("slots", slots)
        if self.tags is not None:
            self.tags.view(-1, self.layout.block_rows)[index] = -1
        for t in self.memory:
            self._in_blocks(t)[index] = float("nan")

    def fork(self, source: torch.Tensor | Sequence[int], target: torch.Tensor | Sequence[int]) -> None:
        """Copy slots (of a ring) or pages ``source`` to ``target``, one to one: a second request goes on from there.

        Mutates data and tags. Raises RangeError for a slot or page that the pool lacks, that is named twice as a
        target, or that is source and target at once.
        """
        old, new = self._index("source", source), self._index("target", target)
        check_fork(old, new)
        tags = None if self.tags is None else self.tags.view(-1, self.layout.block_rows)
        if tags is not None:  # broken off below, a copy is not taken for what was there
            tags[new] = UNKNOWN
        for t in self.memory:
            self._in_blocks(t)[new] = self._in_blocks(t)[old]
        if tags is not None:
            tags[new] = tags[old]

    def _index(self, name: str, blocks: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Slots or pages, checked: int64 [n]."""
        return slot_index(name, blocks, self.layout.num_rows // self.layout.block_rows, self.data.device)

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """What a step writes."""
        return (self.data,) if self.score is None else (self.data, self.score)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The same by name."""
        return dict(zip(("state", "state score"), self.memory, strict=False))

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
                found(int(held[i])),
                "start it at position 0, or put its rows there first: snapshot.load_live",
            )

    def begin(self, batch: RaggedBatch, address: torch.Tensor, active: torch.Tensor) -> None:
        """Record that a step begins to write rows ``address``: until ``tag`` says what they hold, nobody knows.

        ``active``: indices of ``batch.active``.
        """
        if self.tags is not None:
            self._forget(batch, active)
            self.tags.index_fill_(0, address, UNKNOWN)

    def tag(self, batch: RaggedBatch, address: torch.Tensor, position: torch.Tensor, active: torch.Tensor) -> None:
        """Record that rows ``address``, which ``begin`` has marked, now hold ``position``."""
        del batch, active
        if self.tags is not None:
            self.tags.index_copy_(0, address, position)

    def _forget(self, batch: RaggedBatch, active: torch.Tensor) -> None:
        """What a ring held from a request's start on."""
        assert self.tags is not None
        if isinstance(self.layout, RingLayout) and batch.state_slots is not None:
            slots = batch.state_slots.index_select(0, active)
            rings = self.tags.view(self.layout.num_slots, self.layout.ring_rows)
            held = rings.index_select(0, slots)
            stale = held >= batch.start_positions.index_select(0, active)[:, None]
            rings.index_copy_(0, slots, held.masked_fill_(stale, -1))


def found(tag: int) -> str:
    """What a tag says of a row, in words."""
    if tag == UNKNOWN:
        return "what a step has left that was broken off"
    return "nothing that this request wrote" if tag < 0 else f"position {tag}"


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
                "pass state=, or start at position 0",
            )
