"""Static plans by one launch: the integers that ``Plan.build_static`` makes, for all ratios of a model at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from kvcondense.backends.jobs import ONLINE, PAGED, RING, Job, Rule, rule_of
from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.runtime import interpreted, on_device, why_no_device
from kvcondense.layout.batch import MOST_POSITIONS, RaggedBatch, dtypes_of
from kvcondense.layout.extremes import Bounds, Extremes
from kvcondense.layout.plan import COUNTERS, KEEP_FIELDS, WINDOW_FIELDS, Plan, may_overwrite

BLOCK, INTERPRETED_BLOCK, WARPS = 256, 32, 8
"""Requests, windows or kept rows that a program takes at a time, and its warps."""
_MOST = torch.iinfo(torch.int64).max
_FIELDS = tuple(field.name for field in fields(RaggedBatch))


def why_not(device: torch.device) -> str | None:
    """None if plans can be made on this device, else the reason."""
    reason = why_no_device(device)
    if reason is None and not tuning.threads(device):
        reason = f"a program is one thread on {device}; those of the planner's wait for one another"
    return reason


@dataclass(frozen=True)
class StaticPlanner:
    """Static plans of a batch, and what the kernel needs to fill them from the batch's tensors as often as asked.

    memory int64: all that the plans own, and scratch. described [jobs, SIZE] int64: what each plan is made for.
    tensors: the batch's, in the order of its fields; where it has none, another one stands in, which is not read.
    """

    plans: tuple[Plan, ...]
    memory: torch.Tensor
    described: torch.Tensor
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(
        cls, jobs: Sequence[Job], batch: RaggedBatch, bounds: Bounds, cache_rows: Sequence[int | None]
    ) -> StaticPlanner | None:
        """Memory for the plans, which ``fill`` fills; None: only the builder knows what to make of these, or to raise.

        Raises as ``Plan.build_static`` does where a state cannot take such steps at all. Asks the device for nothing;
        descriptions that it does not hold yet are copied to it.
        """
        if not jobs or not _takes(batch, bounds, cache_rows):
            return None
        block: list[int] = []
        places, end = [], 0
        for job, rows in zip(jobs, cache_rows, strict=True):
            rule = rule_of(*job)
            if rule is None:
                return None
            place = _Place.of(job, rule, end, batch, bounds)
            described = _description(rule, place, batch, bounds, rows)
            if described is None:
                return None
            block += described
            places.append(place)
            end += place.size
        for spec, layout, _ in jobs:
            if layout is not None:
                layout.check_drafts(spec, bounds.draft)
        device = batch.query_start_loc.device
        memory = torch.empty(end, dtype=torch.int64, device=device)
        if type(memory) is not torch.Tensor:  # a mode in which tensors have no memory
            return None
        plans = tuple(
            place.plan(job, memory, batch, bounds, rows)
            for place, job, rows in zip(places, jobs, cache_rows, strict=True)
        )
        tensors = tuple(getattr(batch, name) for name in _FIELDS)
        stand_in = batch.query_start_loc
        return cls(plans, memory, _copied(tuple(block), device), tuple(stand_in if t is None else t for t in tensors))

    def fill(self) -> None:
        """All plans from what the batch's tensors hold now, on the current stream: one launch, which can be captured.

        Counters are zero after. Nothing is allocated and no value is asked for.
        """
        from kvcondense.backends.triton.kernels.plan import plan_kernel

        block = INTERPRETED_BLOCK if interpreted() else BLOCK
        options: dict[str, Any] = {"BLOCK": block, "num_warps": WARPS, "enable_fp_fusion": False}
        options |= tuning.launch_options(self.memory.device)
        operands: Any = (self.described, self.memory, *self.tensors)
        with on_device(self.memory.device):
            plan_kernel[(len(self.plans),)](*operands, **options)


@dataclass(frozen=True)
class _Place:
    """Where the arrays of one plan lie in the memory of all: its requests, windows and kept rows, in integers."""

    at: int
    requests: int
    windows: int
    keeps: int
    slots: int

    @classmethod
    def of(cls, job: Job, rule: Rule, at: int, batch: RaggedBatch, bounds: Bounds) -> _Place:
        requests = batch.start_positions.shape[0]
        windows, keeps = Plan.capacity(job[0], bounds.tokens, requests, bounds.draft, job[1])
        return cls(at, requests, windows, keeps, rule.blocks if _has_slots(rule) else 0)

    @property
    def strides(self) -> tuple[int, int, int]:
        """From one array to the next: of requests, of windows (with the counters) and of kept rows."""
        return _aligned(self.requests + 1), _aligned(self.windows + COUNTERS), _aligned(self.keeps)

    @property
    def size(self) -> int:
        from kvcondense.backends.triton.kernels import plan as kernel

        numbers = kernel.PER_REQUEST.value, kernel.PER_WINDOW.value, kernel.PER_KEEP.value
        return sum(n * stride for n, stride in zip(numbers, self.strides, strict=True)) + _aligned(self.slots)

    def plan(self, job: Job, memory: torch.Tensor, batch: RaggedBatch, bounds: Bounds, cache_rows: int | None) -> Plan:
        """The plan that lies here, of what the memory happens to hold."""
        from kvcondense.backends.triton.kernels import plan as kernel

        spec, layout, page_rows = job
        per_request, per_window, per_keep = self.strides
        windows = self.at + kernel.PER_REQUEST.value * per_request
        keeps = windows + kernel.PER_WINDOW.value * per_window

        def part(begin: int, count: int) -> torch.Tensor:
            return memory[begin : begin + count]

        sound = replace(
            batch,
            query_start_loc=part(self.at, self.requests + 1),
            start_positions=part(self.at + per_request, self.requests),
            draft_rows=part(self.at + 2 * per_request, self.requests),
        )
        return Plan(
            ratio=spec.ratio,
            overlap=spec.overlap,
            batch=sound,
            state_layout=layout,
            page_rows=page_rows,
            **{name: part(windows + i * per_window, self.windows) for i, name in enumerate(WINDOW_FIELDS)},
            **{name: part(keeps + i * per_keep, self.keeps) for i, name in enumerate(KEEP_FIELDS)},
            overwrites=may_overwrite(spec.window, layout, bounds.query_len),
            counters=part(windows + 3 * per_window, self.windows + COUNTERS),
            extremes=Extremes.of_static(bounds.tokens, bounds.positions, cache_rows),
            given=batch,
        )


def _takes(batch: RaggedBatch, bounds: Bounds, cache_rows: Sequence[int | None]) -> bool:
    """Whether the batch's tensors, and the numbers, are what the kernel takes: plain integers, positions in 32 bits."""
    numbers = (bounds.tokens, bounds.query_len, bounds.draft, 0 if bounds.positions is None else bounds.positions)
    if not all(type(n) is int and 0 <= n < MOST_POSITIONS for n in numbers):
        return False
    if not all(n is None or (type(n) is int and 0 <= n <= _MOST) for n in cache_rows):
        return False
    tensors = {name: t for name in _FIELDS if (t := getattr(batch, name)) is not None}
    for name, t in tensors.items():
        if type(t) is not torch.Tensor or t.layout is not torch.strided or t.dtype not in dtypes_of(name):
            return False
    device, requests = batch.query_start_loc.device, batch.query_start_loc.numel() - 1
    for name, t in tensors.items():
        tables = name.endswith("block_table")
        if t.device != device or t.dim() != 1 + tables or (t.shape[-1] > 1 and t.stride(-1) != 1):
            return False
        if name != "slot_mapping" and t.shape[0] != requests + (name == "query_start_loc"):
            return False
    return requests > 0


def _has_slots(rule: Rule) -> bool:
    return rule.kind in (RING, ONLINE)


def _aligned(count: int) -> int:
    from kvcondense.backends.triton.kernels import plan as kernel

    return -(-count // kernel.ALIGNED.value) * kernel.ALIGNED.value


def _description(
    rule: Rule, place: _Place, batch: RaggedBatch, bounds: Bounds, cache_rows: int | None
) -> list[int] | None:
    """A job's row of ``described``; None where the batch lacks what the state or the cache need."""
    from kvcondense.backends.triton.kernels import plan as kernel

    ratio, halves, kind, blocks, rows, page_tokens, keep_all, page_rows = rule
    state, table, mapping = batch.state_block_table, batch.block_table, batch.slot_mapping
    if (_has_slots(rule) and batch.state_slots is None) or (kind == PAGED and (state is None or state.shape[1] == 0)):
        return None
    source, entries = kernel.NOWHERE, 0
    if mapping is not None and mapping.shape[0]:
        source, entries = kernel.MAPPING, mapping.shape[0]
    elif table is not None and table.shape[1]:
        source, entries = kernel.TABLE, table.shape[1]
        if page_rows == 0:
            return None
    levels = place.requests.bit_length()
    values = {
        "AT": place.at,
        "REQUESTS": place.requests,
        "LEVELS": levels,
        "SPAN": 1 << (levels - 1),
        "WINDOWS": place.windows,
        "KEEPS": place.keeps,
        "TOKENS": bounds.tokens,
        "QUERY_LEN": bounds.query_len,
        "DRAFTS": bounds.draft,
        "POSITIONS": MOST_POSITIONS - 1 if bounds.positions is None else bounds.positions,
        "RATIO": ratio,
        "HALVES": halves,
        "KIND": kind,
        "BLOCKS": blocks,
        "ROWS": rows,
        "PAGE_TOKENS": page_tokens,
        "KEEP_ALL": keep_all,
        "STATE_STRIDE": 0 if state is None else state.stride(0),
        "STATE_PAGES": 0 if state is None else state.shape[1],
        "SOURCE": source.value,
        "ENTRIES": entries,
        "TABLE_STRIDE": 0 if table is None else table.stride(0),
        "PAGE_ROWS": page_rows,
        "LAST_PAGE": _MOST // max(page_rows, 1),
        "CACHE_ROWS": _MOST if cache_rows is None else cache_rows,
    }
    block = [0] * kernel.SIZE.value
    for name, value in values.items():
        block[getattr(kernel, name).value] = value
    return block


@functools.lru_cache(maxsize=256)
def _copied(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Descriptions on their device. They are kept, so that plans of known shapes cost no copy."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)
