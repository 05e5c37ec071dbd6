"""OnlineState: three running values per channel (m, l, o) instead of a window of rows, and a log of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcondense.errors import (
    DeviceError,
    RangeError,
    ShapeError,
    StateMismatchError,
    UnsupportedError,
    require,
    require_int,
)
from kvcondense.layout.addresses import check_slots, most_drafts
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.memory import check_written
from kvcondense.layout.pages import advise
from kvcondense.layout.state import UNKNOWN, Reads, check_fork, found, slot_index
from kvcondense.spec import CompressorSpec


@dataclass(frozen=True)
class OnlineLayout:
    """Log row of position p of a request in slot s: s * log_rows + p mod log_rows."""

    num_slots: int
    log_rows: int

    def address(self, batch: RaggedBatch, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Log row of each (request, position), int64."""
        assert batch.state_slots is not None
        return batch.state_slots[request] * self.log_rows + position % max(self.log_rows, 1)

    def keep_start(self, spec: CompressorSpec, batch: RaggedBatch) -> torch.Tensor:
        """First position of each request [R] whose row is kept: the drafts. Everything before them is folded."""
        del spec
        return batch.start_positions + batch.lengths - batch.draft_rows

    def check(self, batch: RaggedBatch, spec: CompressorSpec) -> None:
        """Raise unless the slots exist, are not shared, and the log takes the drafts of this step."""
        check_slots(batch, self.num_slots)
        self.check_drafts(spec, most_drafts(batch))

    def check_drafts(self, spec: CompressorSpec, drafts: int) -> None:
        """Raise unless the log takes steps with this many draft rows."""
        if spec.overlap:
            raise UnsupportedError("state", "a ring or pages (windows overlap: a row is read twice)", "an OnlineState")
        if drafts > self.log_rows:
            raise RangeError("state log_rows", f"at least {drafts} ({drafts} draft rows)", self.log_rows)


@dataclass
class OnlineState:
    """State of a ratio without overlap in the online form of the softmax, for ``layout.num_slots`` requests.

    acc [num_slots, 3, head_dim] fp32: m, l, o of the open window, folded up to position folded - 1; folded [num_slots]
    int64. log [num_slots * log_rows, state_dim] fp32: raw rows [kv | score + ape] of the drafts of the last step, which
    the next step folds as far as it goes on from them. What was folded cannot be taken back; hence the log.

    Per channel, oldest to newest: m' = max(m, z), l' = l e^(m - m') + e^(z - m'), o' = o e^(m - m') + K e^(z - m'), and
    P = o / l. A request of ratio 128 takes 6 KiB instead of 512. Rows equal themselves under any split, bit for bit;
    P differs from the ring's two-pass sum by at most 3e-6 of the largest |K| in the window.

    ``tags`` [num_slots, 2] int64: positions from which a request can go on (first, last), on the host; None: unchecked.
    """

    acc: torch.Tensor
    folded: torch.Tensor
    log: torch.Tensor
    layout: OnlineLayout
    tags: torch.Tensor | None = None

    @classmethod
    def allocate(
        cls, spec: CompressorSpec, num_slots: int, max_draft: int = 0, *, device: torch.device | str = "cpu"
    ) -> OnlineState:
        """State for ``num_slots`` requests whose steps have at most ``max_draft`` draft rows; memory is not cleared."""
        require("spec", spec, CompressorSpec)
        layout = OnlineLayout(require_int("num_slots", num_slots, 1), require_int("max_draft", max_draft, 0))
        if spec.overlap:
            raise UnsupportedError("spec", "windows without overlap", f"ratio {spec.ratio} with overlap")
        acc = advise(torch.empty(num_slots, 3, spec.head_dim, device=device))
        log = advise(torch.empty(num_slots * max_draft, spec.state_dim, device=device))
        folded = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        tags = torch.full((num_slots, 2), -1, dtype=torch.int64, device="cpu") if acc.device.type == "cpu" else None
        return cls(acc, folded, log, layout, tags)

    def __post_init__(self) -> None:
        self.check_memory()

    def check_memory(self) -> None:
        """Raise unless the tensors hold these values: their shapes, types and strides. They may have been exchanged."""
        slots, rows = self.layout.num_slots, self.layout.num_slots * self.layout.log_rows
        channels = self.acc.shape[-1] if self.acc.dim() else 0
        for name, t, shape, dtype in (
            ("acc", self.acc, (slots, 3, channels), torch.float32),
            ("folded", self.folded, (slots,), torch.int64),
            ("log", self.log, (rows, self.log.shape[-1] if self.log.dim() else 0), torch.float32),
            ("tags", self.tags, (slots, 2), torch.int64),
        ):
            if t is None:
                continue
            if tuple(t.shape) != shape or t.dtype is not dtype or not t.is_contiguous():
                wanted = f"contiguous {str(dtype).removeprefix('torch.')} {list(shape)}"
                raise ShapeError(f"state {name}", wanted, f"{t.dtype} {list(t.shape)}, strides {list(t.stride())}")
            check_written(f"state {name}", t)
            if name != "tags" and t.device != self.acc.device:
                raise DeviceError(f"state {name}", f"device {self.acc.device}", t.device)

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """What a step writes."""
        return self.acc, self.folded, self.log

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The same by name."""
        return dict(zip(("state", "state folded", "state log"), self.memory, strict=True))

    @property
    def device(self) -> torch.device:
        return self.acc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.log.dtype

    @property
    def state_dim(self) -> int:
        """Channels of a raw row."""
        return self.log.shape[1]

    @property
    def nbytes_per_slot(self) -> int:
        """Bytes of one request: accumulators and log."""
        return 4 * (3 * self.acc.shape[2] + self.layout.log_rows * self.state_dim) + 8

    def check_continues(self, spec: CompressorSpec, batch: RaggedBatch, reads: Reads) -> None:
        """Raise StateMismatchError unless every request goes on where its slot can, or at a window boundary."""
        del reads  # rows; here it is the folded window that counts
        self._check(spec, batch, batch.active)

    def check_slots(self, batch: RaggedBatch) -> None:
        """Raise unless every request has a slot of its own, whether it brings tokens or not."""
        check_slots(batch, self.layout.num_slots)
        assert batch.state_slots is not None
        slot_index("state_slots", batch.state_slots, self.layout.num_slots, self.device)

    def check_at(self, spec: CompressorSpec, batch: RaggedBatch) -> None:
        """The same for requests that bring no tokens."""
        self.check_slots(batch)
        self._check(spec, batch, batch.start_positions >= 0)

    def _check(self, spec: CompressorSpec, batch: RaggedBatch, live: torch.Tensor) -> None:
        if self.tags is None or batch.state_slots is None:
            return
        start = batch.start_positions
        first, last = self.tags[batch.state_slots.clamp(min=0)].unbind(1)
        lost = live & (start % spec.ratio != 0) & ((start < first) | (start > last) | (first < 0))
        if bool(lost.any()):
            q = int(lost.nonzero()[0, 0])
            raise StateMismatchError(
                f"state of request {q}",
                f"a window folded so that position {int(start[q])} can follow",
                found(int(first[q])) if first[q] < 0 else f"positions {int(first[q])}..{int(last[q])}",
                "start it at position 0, or load it first: snapshot.load_live",
            )

    def begin(self, batch: RaggedBatch, address: torch.Tensor, active: torch.Tensor) -> None:
        """Record that a step begins to write the slots of a batch: nobody can go on from them but at a window."""
        del address
        if self.tags is not None and batch.state_slots is not None:
            self.tags.index_fill_(0, batch.state_slots.index_select(0, active), UNKNOWN)

    def tag(self, batch: RaggedBatch, address: torch.Tensor, position: torch.Tensor, active: torch.Tensor) -> None:
        """Record from which positions the requests of a step can go on."""
        del address, position
        if self.tags is None or batch.state_slots is None:
            return
        end = batch.start_positions + batch.lengths
        pairs = torch.stack([end - batch.draft_rows, end], dim=1)
        self.tags.index_copy_(0, batch.state_slots.index_select(0, active), pairs.index_select(0, active))

    def reset(self, slots: torch.Tensor | Sequence[int]) -> None:
        """Forget what ``slots`` hold: NaN, and continuing from them raises (but at a window boundary)."""
        index = slot_index("slots", slots, self.layout.num_slots, self.device)
        if self.tags is not None:
            self.tags[index] = -1
        self.acc[index], self.folded[index] = float("nan"), -1
        self._log()[index] = float("nan")

    def fork(self, source: torch.Tensor | Sequence[int], target: torch.Tensor | Sequence[int]) -> None:
        """Copy slots ``source`` to ``target``, one to one: a second request goes on from there."""
        old = slot_index("source", source, self.layout.num_slots, self.device)
        new = slot_index("target", target, self.layout.num_slots, self.device)
        check_fork(old, new)
        if self.tags is not None:  # broken off below, a copy is not taken for what was there
            self.tags[new] = UNKNOWN
        for tensor in (self.acc, self.folded, self._log(), self.tags):
            if tensor is not None:
                tensor[new] = tensor[old]

    def _log(self) -> torch.Tensor:
        """View [num_slots, log_rows, state_dim]."""
        return self.log.view(self.layout.num_slots, self.layout.log_rows, self.state_dim)
