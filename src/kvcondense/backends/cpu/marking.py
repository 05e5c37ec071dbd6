"""Tags of state rows by compiled code: the same as ``StatePool``'s own methods, in a microsecond."""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass

import torch

from kvcondense.backends.cpu import mark_params as params
from kvcondense.backends.cpu import native
from kvcondense.backends.cpu.blocks import address
from kvcondense.backends.cpu.threads import Entry, entry
from kvcondense.layout.addresses import RingLayout
from kvcondense.layout.plan import Facts
from kvcondense.layout.state import UNKNOWN, StatePool

CHECK, BEGIN, NAME = params.CHECK, params.BEGIN, params.NAME
_WHAT, _WRONG, _TAGS = (params.Marks.place(name) for name in ("what", "wrong", "tags"))


@dataclass(frozen=True)
class _Rows:
    """A block without its tags, for all pools of a layout, and the tensors that it names."""

    block: array[int]
    held: tuple[torch.Tensor, ...]


def mark(what: int, state: StatePool, facts: Facts) -> bool:
    """CHECK, BEGIN or NAME the rows of a plan; False where it cannot be done here, or a row holds another position."""
    tags = state.tags
    assert tags is not None
    if not tags.is_cpu or tags.dtype is not torch.int64 or not tags.is_contiguous():
        return False
    if tags.numel() != state.layout.num_rows or native.problem(native.MARKS) is not None:
        return False
    rows = facts.made.get("marks") or _rows(state, facts)
    block = rows.block[:]  # of this call alone: other threads may use the plan, too
    block[_WHAT], block[_TAGS] = what, tags.data_ptr()
    _kernel()(address(block))
    return not block[_WRONG]


@functools.cache
def _kernel() -> Entry:
    return entry(native.address("marks"))


def _rows(state: StatePool, facts: Facts) -> _Rows:
    """What the kernel is told of a plan, in memory of its own."""
    dense, reads, batch, marks = facts.dense, facts.reads, facts.dense.batch, params.Marks()
    held = [dense.keep_row.clone(), dense.keep_position.clone(), reads.position]
    marks.what = marks.wrong = marks.tags = marks.reads = marks.read_row = 0
    marks.requests = marks.slots = marks.starts = marks.ring_rows = 0
    if reads.row is not None:
        marks.reads, marks.read_row = reads.row.shape[0], reads.row.data_ptr()
        held.append(reads.row)
    if isinstance(state.layout, RingLayout) and batch.state_slots is not None:
        slots, starts = (t.index_select(0, facts.active) for t in (batch.state_slots, batch.start_positions))
        marks.requests, marks.slots, marks.starts = slots.shape[0], slots.data_ptr(), starts.data_ptr()
        marks.ring_rows = state.layout.ring_rows
        held += (slots, starts)
    marks.keeps, marks.keep_row, marks.keep_position = held[0].shape[0], held[0].data_ptr(), held[1].data_ptr()
    marks.read_position, marks.unknown = reads.position.data_ptr(), UNKNOWN
    rows = facts.made["marks"] = _Rows(marks.pack(), tuple(held))
    return rows
