"""Batches and plans made by compiled code: the same integers as ``RaggedBatch.build`` and ``Plan.build`` make.

Two entries into one kernel: the first takes the batch's columns into memory of the batch, checks them and counts, the
second fills the plans of all ratios. What it finds irregular is left to those builders, which raise for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from struct import Struct
from typing import Any

import torch

from kvcondense.backends.cpu import native
from kvcondense.backends.cpu import plan_params as params
from kvcondense.backends.cpu.threads import entry
from kvcondense.backends.jobs import Job, Rule, rule_of
from kvcondense.layout.batch import MOST_POSITIONS, IntTensor, RaggedBatch
from kvcondense.layout.extremes import Extremes, Slots
from kvcondense.layout.plan import COUNTERS, Plan

Column = tuple[int, int, int, int, int, int]
_FIELDS = tuple(field.name for field in fields(RaggedBatch))
_DIMENSIONS = (1, 1, 1, 1, 2, 1, 2)  # of those fields
_COLUMNS = tuple(list(params.Step.offsets.values())[-params.COLUMNS - 1 : -1])  # bytes from the block's beginning
_ABSENT = (0, -1, 0, 0, 0, 0)
_BYTES = {torch.int64: 8, torch.int32: 4}
_INT64, _STRIDED, _CPU = torch.int64, torch.strided, torch.device("cpu")  # looked up once: a step takes microseconds
_put_column = Struct("7q").pack_into
_at, _JOB = params.Step.place, params.Job.size // 8
_STATUS, _FILL, _DRAFTS, _TOKENS, _BASE, _JOBS = map(_at, ("status", "fill", "drafts", "tokens", "base", "jobs"))
_SEEN, _SEEN_SIZE, _REQUESTS = _at("seen"), _at("seen_size"), _at("start", "rows")
_FIELDS_AT, _SAID = params.Job.place("window_fields"), params.Job.place("windows")


@dataclass(frozen=True)
class NativePlanner:
    """Jobs of which a plan each is made, and the block that the kernel is told of them with, without a batch."""

    jobs: tuple[Job, ...]
    block: array[int]

    @classmethod
    def of(cls, jobs: Sequence[Job]) -> NativePlanner | None:
        """None where jobs are not what the kernel takes, or it cannot run here."""
        found = [rule_of(*job) for job in jobs]
        rules = [rule for rule in found if rule is not None]
        if native.problem(native.PLAN) is not None or len(rules) < len(found):
            return None
        step = params.Step()
        step.status = step.fill = step.tokens = step.base = step.seen = step.seen_size = 0
        step.most, step.drafts, step.count = MOST_POSITIONS, -1, len(jobs)
        block = step.pack()
        for rule in rules:
            block += _told(rule)
        return cls(tuple(jobs), block)

    def step(self, values: Sequence[IntTensor | int | None]) -> tuple[RaggedBatch, tuple[Plan, ...]] | None:
        """The batch of ``values``, in the order of its fields, and its plans; None: the builders must look at it."""
        block, columns, sizes, end = self.block[:], [], [], 0
        held: list[object] = []
        for value, dimensions, at in zip(values, _DIMENSIONS, _COLUMNS, strict=True):
            if value is None:
                column: Column | None = _ABSENT
            else:
                column = _uniform(value, at, block) if type(value) is int else _column(value, dimensions, held)
                if column is None:
                    return None
            columns.append(column)
            _put_column(block, at, *column, 8 * end)
            if value is not None:
                sizes.append(column[1] * column[2])
                end += sizes[-1]
        memory = torch.empty(end, dtype=_INT64, device=_CPU)
        if type(memory) is not torch.Tensor:  # a mode in which tensors have no memory
            return None
        block[_BASE] = memory.data_ptr()
        parts = iter(torch.unsafe_split_with_sizes(memory, sizes))
        own: list[Any] = [None if value is None else next(parts) for value in values]
        for i in (4, 6):
            if own[i] is not None:
                own[i] = own[i].view(columns[i][1:3])
        batch = RaggedBatch(*own).as_own()
        plans = self._plans(batch, block)
        return None if plans is None else (batch, plans)

    def plans(self, batch: RaggedBatch) -> tuple[Plan, ...] | None:
        """The plans of a batch that there is; None: the builders must look at it."""
        if not batch.is_own:
            return None
        block = self.block[:]
        for name, dimensions, at in zip(_FIELDS, _DIMENSIONS, _COLUMNS, strict=True):
            value = getattr(batch, name)
            if value is None:
                _put_column(block, at, *_ABSENT, 0)
                continue
            column = _column(value, dimensions, [])
            if column is None or value.dtype is not torch.int64 or not value.is_contiguous():
                return None
            _put_column(block, at, 0, column[1], column[2], 0, 0, 0, column[0])
        return self._plans(batch, block)

    def _plans(self, batch: RaggedBatch, block: array[int]) -> tuple[Plan, ...] | None:
        """Enter the kernel twice and give its integers their names."""
        run, address = entry(native.address("plan")), block.buffer_info()[0]
        run(address)
        if block[_STATUS]:
            return None
        starts, sizes, most = range(_JOBS, len(block), _JOB), [], block[_REQUESTS]
        for at in starts:
            windows, keeps = block[at + _SAID : at + _SAID + 2]
            sizes += (windows, windows, windows, keeps, keeps, keeps, keeps)
            most = max(most, windows, keeps)
        total, table = sum(sizes), 1 << (2 * most).bit_length()  # at most half full
        memory = torch.empty(total + table, dtype=_INT64, device=_CPU)
        out = memory.data_ptr()
        for at in starts:
            windows, keeps = block[at + _SAID : at + _SAID + 2]
            block[at + _FIELDS_AT], block[at + _FIELDS_AT + 1] = out, out + 24 * windows
            out += 24 * windows + 32 * keeps
        block[_FILL], block[_SEEN], block[_SEEN_SIZE] = 1, out, table
        run(address)
        if block[_STATUS]:
            return None
        parts = torch.unsafe_split_with_sizes(memory, [*sizes, table])
        made = []
        for i, (spec, layout, page_rows) in enumerate(self.jobs):
            request, window, slot, token, owner, position, row = parts[7 * i : 7 * i + 7]
            said = block[starts[i] + _SAID : starts[i] + _JOB]
            windows, _, largest, lowest, highest, shared, overwrites = said
            slots = Slots(lowest, highest, bool(shared))
            reached = Extremes(block[_TOKENS], largest * spec.ratio + 1 if windows else 0, slots, dense=True)
            counters = memory.new_zeros(windows + COUNTERS)  # steps write them, and nothing else of a plan
            plan = Plan(
                spec.ratio, spec.overlap, batch, layout, page_rows, request, window, slot, token, owner, position, row,
                bool(overwrites), counters, reached, batch,
            )  # fmt: skip
            made.append(plan)
        return tuple(made)


def _uniform(value: int, at: int, block: array[int]) -> Column | None:
    """The column that ``draft_rows`` as a number stands for; None if it cannot be it."""
    if at != params.Step.offsets["draft"] or not 0 <= value < MOST_POSITIONS:
        return None
    block[_DRAFTS] = value
    return 0, max(block[_REQUESTS], 0), 1, 0, 0, 0


def _told(rule: Rule) -> array[int]:
    """What the kernel is told of a job."""
    job = params.Job()
    job.ratio, job.halves, job.kind, job.blocks, job.block_rows, job.page_tokens, job.keep_all, job.page_rows = rule
    job.window_fields = job.keep_fields = 0
    job.windows = job.keeps = job.last_window = job.lowest = job.highest = job.shared = job.overwrites = 0
    return job.pack()


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
