"""RaggedBatch: the requests of one step, their positions, where their state lives and where their rows go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from kvcondense.errors import DeviceError, DtypeError, KvCondenseError, RangeError, ShapeError, require

MOST_POSITIONS = 1 << 31
"""Positions of a sequence; kernels hold one in 32 bits."""
IntTensor = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class RaggedBatch:
    """Prefill, chunk, decode and verify requests of one step. Build it with ``build``; its fields are int64 then.

    A batch owns its integers: what the caller's tensors become later does not change it.

    query_start_loc [R+1]: request q owns tokens query_start_loc[q] .. query_start_loc[q+1]-1; later tokens are padding.
    start_positions [R]: absolute position of each request's first token; -1 if the request is inert.
    draft_rows [R]: how many of the request's last tokens may be taken back (rejected drafts).
    state_slots [R] or state_block_table [R, pages]: where the state lives; state slot -1 makes the request inert.
    slot_mapping [T] or block_table [R, pages]: the cache row of the window that token t completes (-1: do not write),
    or the pages that hold rows 0, 1, ... of each request.

    Where static plans are made of a batch, tables may be an engine's own, int32: on a GPU they are read where they lie.
    """

    # Who has the tensors is no field: ``vars`` of a batch make another one, and copies are batches of nobody known.
    __slots__ = ("__dict__", "__weakref__", "_own")

    query_start_loc: torch.Tensor
    start_positions: torch.Tensor
    draft_rows: torch.Tensor
    state_slots: torch.Tensor | None = None
    state_block_table: torch.Tensor | None = None
    slot_mapping: torch.Tensor | None = None
    block_table: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        query_start_loc: IntTensor,
        *,
        start_positions: IntTensor | None = None,
        positions: IntTensor | None = None,
        draft_rows: IntTensor | int = 0,
        state_slots: IntTensor | None = None,
        state_block_table: IntTensor | None = None,
        slot_mapping: IntTensor | None = None,
        block_table: IntTensor | None = None,
    ) -> RaggedBatch:
        """Check, widen and copy the metadata of a step (int32 or int64 tensors, or sequences of ints).

        Give ``start_positions`` [R] or absolute ``positions`` [T] (consecutive within a request). Raises ShapeError,
        DtypeError, DeviceError or RangeError that names the argument.
        """
        qsl = _ints("query_start_loc", query_start_loc, 1, None)
        device = qsl.device
        if qsl.shape[0] < 1:
            raise ShapeError("query_start_loc", "shape [R+1]", "shape [0]")
        lengths = qsl.diff()
        if int(qsl[0]) != 0 or bool((lengths < 0).any()):
            raise RangeError("query_start_loc", "values that start at 0 and never fall", qsl.tolist())
        requests = lengths.shape[0]
        if (start_positions is None) == (positions is None):
            raise KvCondenseError("positions", "exactly one of positions and start_positions", "both or neither")
        slots = None if state_slots is None else _ints("state_slots", state_slots, 1, device, rows=requests)
        inert = torch.zeros_like(lengths, dtype=torch.bool) if slots is None else slots < 0
        if positions is not None:
            starts = _starts(_ints("positions", positions, 1, device), qsl, lengths, inert)
        else:
            starts = _ints("start_positions", start_positions, 1, device, rows=requests)
        starts = torch.where(inert, -1, starts)  # whatever an inert request carries is not looked at
        if bool((starts < -1).any()):
            raise RangeError("start_positions", "at least 0, or -1 for an inert request", int(starts.min()))
        if bool((starts > MOST_POSITIONS - lengths).any()):
            raise RangeError("start_positions", f"positions below {MOST_POSITIONS}", int((starts + lengths).max()))
        if state_slots is not None and state_block_table is not None:
            raise KvCondenseError("state_slots", "state_slots or state_block_table, not both", "both")
        if slot_mapping is not None and block_table is not None:
            raise KvCondenseError("slot_mapping", "slot_mapping or block_table, not both", "both")
        optional = {
            "state_slots": (slots, 1, requests),
            "state_block_table": (state_block_table, 2, requests),
            "slot_mapping": (slot_mapping, 1, None),
            "block_table": (block_table, 2, requests),
        }
        given = {k: _ints(k, v, dim, device, rows) for k, (v, dim, rows) in optional.items() if v is not None}
        if "slot_mapping" in given and given["slot_mapping"].shape[0] < int(qsl[-1]):
            raise ShapeError("slot_mapping", f"at least {int(qsl[-1])} entries", f"{given['slot_mapping'].shape[0]}")
        for name in ("state_slots", "slot_mapping"):
            if name in given and bool((given[name] < -1).any()):
                raise RangeError(name, "at least 0, or -1", int(given[name].min()))
        return cls(qsl, starts, _drafts(draft_rows, lengths), **given).as_own()

    @classmethod
    def at(
        cls,
        position: int,
        *,
        state_slot: int | None = None,
        state_pages: IntTensor | None = None,
        device: torch.device | str = "cpu",
    ) -> RaggedBatch:
        """One request without tokens that stands at ``position``: what exporting and importing its state takes.

        ``state_slot`` of a ring or an online state, or ``state_pages`` [pages], its row of a block table.
        """
        pages = None if state_pages is None else torch.as_tensor(state_pages, device=device)[None]
        return cls.build(
            torch.zeros(2, dtype=torch.int64, device=device),
            start_positions=torch.tensor([position], device=device),
            state_slots=None if state_slot is None else torch.tensor([state_slot], device=device),
            state_block_table=pages,
        )

    def check_like(self, other: RaggedBatch) -> None:
        """Raise ShapeError unless ``copy_`` can take over the values of this batch."""
        check_fields(self, other, [f.name for f in fields(self)])

    def copy_(self, other: RaggedBatch) -> None:
        """Take over the values of a batch of the same shape, in place: a captured graph reads these very tensors."""
        copy_fields(self, other, [f.name for f in fields(self)])

    def __getstate__(self) -> dict[str, object]:
        return vars(self)

    def as_own(self) -> RaggedBatch:
        """This batch, of which its maker says that nobody else has its tensors."""
        object.__setattr__(self, "_own", True)
        return self

    @property
    def is_own(self) -> bool:
        """Whether nobody else has its tensors; ``dataclasses.replace`` takes in what somebody has."""
        return getattr(self, "_own", False)

    def owned(self) -> RaggedBatch:
        """The same in int64 tensors of its own, which nobody else changes."""
        given = {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}
        return replace(self, **{name: _copy(t) for name, t in given.items()}).as_own()

    def checked(self) -> RaggedBatch:
        """This batch, or the one that ``build`` makes of its fields, if they may be others than those of a build.

        ``dataclasses.replace`` asks ``build`` nothing: a slot of -1 beside a position, say, would be written to. And
        its tensors may become something else behind a plan, by whose addresses kernels read. Raises as ``build``.
        """
        sound = RaggedBatch.build(**{f.name: getattr(self, f.name) for f in fields(self)})
        pairs = [(getattr(self, f.name), getattr(sound, f.name)) for f in fields(self)]
        same = all(a is b or (a.dtype is b.dtype and torch.equal(a, b)) for a, b in pairs)
        return self if same and self.is_own else sound

    def check_form(self) -> None:
        """Raise unless fields have the types, shapes and strides that ``build`` gives them; asks for no value.

        Kernels read them by address, and static plans are made of batches that nobody else may look at.
        """
        for name in ("query_start_loc", "start_positions", "draft_rows"):
            require(name, getattr(self, name), torch.Tensor)
        qsl = self.query_start_loc
        if qsl.dim() != 1 or qsl.shape[0] < 1:
            raise ShapeError("query_start_loc", "shape [R+1]", f"shape {list(qsl.shape)}")
        for field in fields(self):
            name, t = field.name, getattr(self, field.name)
            if t is None:
                continue
            require(name, t, torch.Tensor)
            if t.layout is not torch.strided:
                raise KvCondenseError(name, "a dense tensor", t.layout)
            dim = 2 if name.endswith("block_table") else 1
            rows = None if name == "slot_mapping" else qsl.shape[0] - (name != "query_start_loc")
            if t.dtype not in dtypes_of(name):
                wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes_of(name))
                raise DtypeError(name, f"{wanted} (RaggedBatch.build widens)", t.dtype)
            if t.dim() != dim or (rows is not None and t.shape[0] != rows):
                wanted = f"{dim} dimension(s), {'any number of' if rows is None else rows} rows"
                raise ShapeError(name, wanted, list(t.shape))
            if t.device != qsl.device:
                raise DeviceError(name, f"device {qsl.device} as query_start_loc", t.device)
            if t.shape[-1] > 1 and t.stride(-1) != 1:
                raise ShapeError(name, "entries side by side", f"strides {list(t.stride())}")

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens per request [R]."""
        return self.query_start_loc.diff()

    @property
    def active(self) -> torch.Tensor:
        """Requests that read and write anything at all [R] bool."""
        return (self.start_positions >= 0) & (self.lengths > 0)


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    """What a field of a batch may be, where kernels read it by address."""
    return (torch.int64, torch.int32) if name.endswith("block_table") else (torch.int64,)


def check_fields(target: object, source: object, names: Sequence[str]) -> None:
    """Raise ShapeError unless the tensors called ``names`` have the same shapes in both, or are None in both."""
    for name in names:
        new, old = getattr(target, name), getattr(source, name)
        if (new is None) != (old is None) or (new is not None and new.shape != old.shape):
            shapes = ["None" if t is None else str(list(t.shape)) for t in (new, old)]
            raise ShapeError(name, f"shape {shapes[0]}", shapes[1])


def copy_fields(target: object, source: object, names: Sequence[str]) -> None:
    """Copy tensors between two objects field by field, in place, after ``check_fields``."""
    check_fields(target, source, names)
    for name in names:
        if getattr(target, name) is not None:
            getattr(target, name).copy_(getattr(source, name))


def spread(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] counts -> for each of sum(counts) items its owner, and its running number with that owner."""
    ends = torch.cumsum(counts, 0)
    items = torch.arange(int(ends[-1]) if len(ends) else 0, device=counts.device)
    owner = torch.searchsorted(ends, items, right=True)  # repeat_interleave wakes all threads for the least of them
    return owner, items - (ends - counts)[owner]


def _ints(name: str, value: object, dim: int, device: torch.device | None, rows: int | None = None) -> torch.Tensor:
    if value is None:
        raise KvCondenseError(name, "a value", "None")
    if not isinstance(value, torch.Tensor):
        try:
            value = torch.as_tensor(value, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DtypeError(name, "integers, in rows of equal length", error) from error
        if value.numel() == 0:
            value = value.to(torch.int64)
    if value.dtype not in (torch.int32, torch.int64):
        raise DtypeError(name, "int32 or int64", value.dtype)
    if value.dim() != dim:
        raise ShapeError(name, f"{dim} dimension(s)", f"shape {list(value.shape)}")
    if rows is not None and value.shape[0] != rows:
        raise ShapeError(name, f"{rows} rows, one per request", f"{value.shape[0]}")
    if device is not None and value.device != device:
        raise DeviceError(name, f"device {device} as query_start_loc", value.device)
    if value.is_meta:
        raise DeviceError(name, "a device that holds values", value.device)
    return _copy(value)


def _copy(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.int64, copy=True, memory_format=torch.contiguous_format)


def _drafts(draft_rows: IntTensor | int, lengths: torch.Tensor) -> torch.Tensor:
    """Draft rows per request: a scalar stops at the length of a request, values of one's own must fit."""
    if isinstance(draft_rows, int) and not isinstance(draft_rows, bool):
        drafts = torch.minimum(torch.full_like(lengths, draft_rows), lengths)
    else:
        drafts = _ints("draft_rows", draft_rows, 1, lengths.device, rows=lengths.shape[0])
    if bool((drafts < 0).any()):
        raise RangeError("draft_rows", "at least 0", int(drafts.min()))
    if bool((drafts > lengths).any()):
        raise RangeError("draft_rows", "at most the tokens of the request", drafts.tolist())
    return drafts


def _starts(positions: torch.Tensor, qsl: torch.Tensor, lengths: torch.Tensor, inert: torch.Tensor) -> torch.Tensor:
    """First position of each request; the positions of a live request must be consecutive."""
    total = int(qsl[-1])
    if positions.shape[0] < total:
        raise ShapeError("positions", f"at least {total} entries", f"{positions.shape[0]}")
    if total == 0:
        return torch.zeros_like(lengths)
    # An empty request has no first token: any index will do, the value is never used.
    starts = torch.where(lengths > 0, positions[qsl[:-1].clamp(max=total - 1)], torch.zeros_like(lengths))
    request, offset = spread(lengths)
    expected = starts[request] + offset
    wrong = (positions[:total] != expected) & (starts[request] >= 0) & ~inert[request]
    if bool(wrong.any()):
        t = int(wrong.nonzero()[0, 0])
        raise RangeError(f"positions[{t}]", f"{int(expected[t])} (consecutive within a request)", int(positions[t]))
    return starts
