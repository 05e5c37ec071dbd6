"""Batches and plans made by compiled code: the same integers as ``RaggedBatch.build`` and ``Plan.build`` make.

Two entries into one kernel: the first takes the batch's columns into memory of the batch, checks them and counts, the
second fills the plans of all ratios. What it finds irregular is left to those builders, which raise for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from kvcondense.backends.cpu import native
from kvcondense.backends.cpu import plan_params as params
from kvcondense.backends.cpu.threads import entry
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.batch import MOST_POSITIONS, IntTensor, RaggedBatch
from kvcondense.layout.extremes import Extremes, Layout, Slots
from kvcondense.layout.online import OnlineLayout
from kvcondense.layout.plan import BARRIERS, Plan
from kvcondense.spec import CompressorSpec

Job = tuple[CompressorSpec, Layout | None, int | None]
"""What a plan is made for: a compressor, the layout of its state, the rows of its cache's pages."""
Column = tuple[int, int, int, int, int, int]
_FIELDS = tuple(field.name for field in fields(RaggedBatch))
_DIMENSIONS = (1, 1, 1, 1, 2, 1, 2)  # of those fields
_ABSENT = (0, -1, 0, 0, 0, 0, -1)
_BYTES = {torch.int64: 8, torch.int32: 4}
_INT64, _STRIDED, _CPU = torch.int64, torch.strided, torch.device("cpu")  # looked up once: a step takes microseconds
_NOT_YET = (0,) * (params.JOB_SIZE - params.JOB_GIVEN)


@dataclass(frozen=True)
class NativePlanner:
    """Jobs of which a plan each is made, and what the kernel is told of them."""

    jobs: tuple[Job, ...]
    rules: array[int]

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> NativePlanner | None:
        """None where jobs are not what the kernel takes, or it cannot run here."""
        found = [rule_of(*job) for job in jobs]
        if native.problem(native.PLAN) is not None or not all(rule and max(rule) < MOST_POSITIONS for rule in found):
            return None
        return cls(tuple(jobs), array("q", (x for rule in found for x in (*(rule or ()), *_NOT_YET))))

    def step(self, values: Sequence[IntTensor | int | None]) -> tuple[RaggedBatch, tuple[Plan, ...]] | None:
        """The batch of ``values``, in the order of its fields, and its plans; None: the builders must look at it."""
        block, sizes, end = self._head(), [], 0
        held: list[object] = []
        for value, dimensions in zip(values, _DIMENSIONS, strict=True):
            if value is None:
                block += _ABSENT
                continue
            column = _uniform(value, block) if type(value) is int else _column(value, dimensions, held)
            if column is None:
                return None
            block += (*column, 8 * end)
            sizes.append(column[1] * column[2])
            end += sizes[-1]
        memory = torch.empty(end, dtype=_INT64, device=_CPU)
        if type(memory) is not torch.Tensor:  # a mode in which tensors have no memory
            return None
        block[params.BASE] = memory.data_ptr()
        parts = iter(torch.unsafe_split_with_sizes(memory, sizes))
        own: list[Any] = [None if value is None else next(parts) for value in values]
        for i, at in ((4, params.STATE_TABLE), (6, params.TABLE)):
            if own[i] is not None:
                own[i] = own[i].view(block[at + params.ROWS], block[at + params.WIDTH])
        batch = RaggedBatch(*own)
        plans = self._plans(batch, block)
        return None if plans is None else (batch, plans)

    def plans(self, batch: RaggedBatch) -> tuple[Plan, ...] | None:
        """The plans of a batch that there is; None: the builders must look at it."""
        block = self._head()
        for name, dimensions in zip(_FIELDS, _DIMENSIONS, strict=True):
            value = getattr(batch, name)
            if value is None:
                block += _ABSENT
                continue
            column = _column(value, dimensions, [])
            if column is None or value.dtype is not torch.int64 or not value.is_contiguous():
                return None
            block += (0, column[1], column[2], 0, 0, 0, column[0])
        return self._plans(batch, block)

    def _head(self) -> list[int]:
        """A block's beginning."""
        block = [0] * params.HEAD_SIZE
        block[params.MOST], block[params.DRAFTS], block[params.COUNT] = MOST_POSITIONS, -1, len(self.jobs)
        return block

    def _plans(self, batch: RaggedBatch, columns: list[int]) -> tuple[Plan, ...] | None:
        """Enter the kernel twice and give its integers their names."""
        block = array("q", columns) + self.rules
        run, address = entry(native.address("plan")), block.buffer_info()[0]
        run(address)
        if block[params.STATUS]:
            return None
        starts, sizes, most = range(params.JOBS, len(block), params.JOB_SIZE), [], block[params.START + params.ROWS]
        for at in starts:
            windows, keeps = block[at + params.WINDOWS], block[at + params.KEEPS]
            sizes += (windows, windows, windows, keeps, keeps, keeps, keeps)
            most = max(most, windows, keeps)
        total, table = sum(sizes), 1 << (2 * most).bit_length()  # at most half full
        memory = torch.empty(total + table, dtype=_INT64, device=_CPU)
        block[params.OUT] = out = memory.data_ptr()
        block[params.SEEN], block[params.SEEN_SIZE] = out + 8 * total, table
        run(address)
        if block[params.STATUS]:
            return None
        parts = torch.unsafe_split_with_sizes(memory, [*sizes, table])
        made = []
        for i, (spec, layout, page_rows) in enumerate(self.jobs):
            at = params.JOBS + params.JOB_SIZE * (i + 1)
            request, window, slot, token, owner, position, row = parts[7 * i : 7 * i + 7]
            windows, _, largest, lowest, highest, shared, overwrites = block[at - len(_NOT_YET) : at]
            slots = Slots(lowest, highest, bool(shared))
            reached = Extremes(block[params.TOKENS], largest * spec.ratio + 1 if windows else 0, slots, dense=True)
            counters = memory.new_zeros(windows + BARRIERS)  # steps write them, and nothing else of a plan
            plan = Plan(
                spec.ratio, spec.overlap, batch, layout, page_rows, request, window, slot, token, owner, position, row,
                bool(overwrites), counters, reached, batch,
            )  # fmt: skip
            made.append(plan)
        return tuple(made)


def _uniform(value: int, block: list[int]) -> Column | None:
    """The column that ``draft_rows`` as a number stands for; None if it cannot be it."""
    if len(block) != params.DRAFT or not 0 <= value < MOST_POSITIONS:
        return None
    block[params.DRAFTS] = value
    return 0, max(block[params.START + params.ROWS], 0), 1, 0, 0, 0


def rule_of(spec: Any, layout: Any, page_rows: Any) -> tuple[int, ...] | None:
    """What kernels are told of a job, in the order of ``plan_params``; None if only the builders can judge it."""
    if type(spec) is not CompressorSpec or (page_rows is not None and (type(page_rows) is not int or page_rows < 1)):
        return None
    kind, blocks, rows, tokens, keep_all = params.STATELESS, 0, 0, 1, False
    if type(layout) is RingLayout:
        kind, blocks, rows = params.RING, layout.num_slots, layout.ring_rows
    elif type(layout) is PagedLayout:
        kind, blocks, rows = params.PAGED, layout.num_pages, layout.page_rows
        tokens, keep_all = layout.page_tokens, layout.keep_all
    elif type(layout) is OnlineLayout:
        kind, blocks, rows = params.ONLINE, layout.num_slots, layout.log_rows
        if type(blocks) is not int or type(rows) is not int or min(blocks, rows) < 0:
            return None
    elif layout is not None:
        return None
    return spec.ratio, spec.halves, kind, blocks, rows, tokens, bool(keep_all), page_rows or 0


def _column(value: Any, dimensions: int, held: list[object]) -> Column | None:
    """Where integers lie: address, rows, width, strides of both, bytes of each; None if they are not as they should.

    What must outlive the call is put into ``held``.
    """
    if type(value) in (list, tuple) and dimensions == 1 and set(map(type, value)) == {int}:
        try:
            kept = array("q", value)
        except OverflowError:
            return None
        held.append(kept)
        return kept.buffer_info()[0], len(kept), 1, 1, 1, 8
    if not isinstance(value, torch.Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return None
        held.append(value := value.to(torch.int64) if value.numel() == 0 else value)
    if type(value) is not torch.Tensor or not value.is_cpu or value.layout is not _STRIDED:
        return None
    shape, dtype = value.shape, value.dtype
    if len(shape) != dimensions or dtype not in _BYTES:
        return None
    if dimensions == 1:
        return value.data_ptr(), shape[0], 1, value.stride(0), 0, _BYTES[dtype]
    rows, width = shape
    return value.data_ptr(), rows, width, value.stride(0), value.stride(1), _BYTES[dtype]
