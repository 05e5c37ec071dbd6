"""The plans of a step for all ratios of a model at once: by compiled code where it can run, else by the builders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvcondense.backends.cpu.planning import NativePlanner
from kvcondense.backends.jobs import Job
from kvcondense.errors import ShapeError, require
from kvcondense.layout.batch import IntTensor, RaggedBatch
from kvcondense.layout.extremes import Bounds
from kvcondense.layout.plan import Plan

if TYPE_CHECKING:
    from kvcondense.backends.triton.planning import StaticPlanner


class Planner:
    """Makes a batch and a plan of it for each job: (spec, layout of its state or None, rows of a cache page or None).

    Layers of one ratio, layout and page size share a plan. What it returns and raises is what ``RaggedBatch.build`` and
    ``Plan.build`` do, field by field. On the CPU one entry of compiled code takes the metadata of a step and one fills
    all plans, if the kernel can run here (``backends.cpu.native``); those builders do everything else.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = tuple(jobs)
        self._native = NativePlanner.of(self.jobs)

    def step(
        self,
        query_start_loc: IntTensor,
        *,
        start_positions: IntTensor | None = None,
        positions: IntTensor | None = None,
        draft_rows: IntTensor | int = 0,
        state_slots: IntTensor | None = None,
        state_block_table: IntTensor | None = None,
        slot_mapping: IntTensor | None = None,
        block_table: IntTensor | None = None,
    ) -> tuple[RaggedBatch, tuple[Plan, ...]]:
        """The batch of these arguments, which are those of ``RaggedBatch.build``, and its plans in the order of jobs.

        Raises as that and ``Plan.build`` do.
        """
        rest = (draft_rows, state_slots, state_block_table, slot_mapping, block_table)
        if self._native is not None and positions is None:
            made = self._native.step((query_start_loc, start_positions, *rest))
            if made is not None:
                return made
        batch = RaggedBatch.build(
            query_start_loc,
            start_positions=start_positions,
            positions=positions,
            draft_rows=draft_rows,
            state_slots=state_slots,
            state_block_table=state_block_table,
            slot_mapping=slot_mapping,
            block_table=block_table,
        )
        return batch, self.plans(batch)

    def plans(self, batch: RaggedBatch) -> tuple[Plan, ...]:
        """The plans of a batch that there is. Raises as ``Plan.build`` does."""
        if self._native is not None and isinstance(batch, RaggedBatch):
            made = self._native.plans(batch)
            if made is not None:
                return made
        return tuple(
            Plan.build(spec, batch, state_layout=layout, page_rows=page_rows) for spec, layout, page_rows in self.jobs
        )

    def static(
        self,
        batch: RaggedBatch,
        *,
        max_tokens: int,
        max_draft: int = 0,
        max_query_len: int | None = None,
        max_positions: int | None = None,
        cache_rows: int | Sequence[int | None] | None = None,
    ) -> StaticPlans:
        """The static plans of a batch: for each job, field by field, what ``Plan.build_static`` makes of these bounds.

        ``cache_rows``: of the cache of each job, or one number for all of them. On a GPU, one launch of Triton makes
        them all, without asking for a value; bounds and shapes that are new to it are copied to the device first. That
        builder does everything else: on other devices, without Triton, for a batch without requests, and for what
        the kernel does not take (numbers of 2^31 and more, tensors that are no plain int64 in rows).

        Raises as ``Plan.build_static`` does, and ShapeError if ``cache_rows`` are not as many as the jobs.
        """
        require("batch", batch, RaggedBatch)
        rows = tuple(cache_rows) if isinstance(cache_rows, Sequence) else (cache_rows,) * len(self.jobs)
        if len(rows) != len(self.jobs):
            raise ShapeError("cache_rows", f"{len(self.jobs)} numbers, one for each job", len(rows))
        bounds = Bounds(max_tokens, max_tokens if max_query_len is None else max_query_len, max_draft, max_positions)
        native = None
        if _launches(batch.query_start_loc.device):
            from kvcondense.backends.triton.planning import StaticPlanner

            native = StaticPlanner.of(self.jobs, batch, bounds, rows)
        if native is not None:
            native.fill()
            return StaticPlans(native.plans, batch, bounds, self.jobs, rows, native)
        plans = [_built(job, batch, bounds, most) for job, most in zip(self.jobs, rows, strict=True)]
        return StaticPlans(tuple(plans), batch, bounds, self.jobs, rows)


class StaticPlans:
    """The static plans of a batch, one for each job of a ``Planner``, filled anew as the batch's tensors change.

    A captured graph that begins with ``refill`` reads its metadata from the tensors of ``batch``: all that a step needs
    before a replay is that they hold it.
    """

    def __init__(
        self,
        plans: tuple[Plan, ...],
        batch: RaggedBatch,
        bounds: Bounds,
        jobs: tuple[Job, ...],
        cache_rows: tuple[int | None, ...],
        native: StaticPlanner | None = None,
    ) -> None:
        self.plans, self.batch = plans, batch
        self._bounds, self._jobs, self._cache_rows, self._native = bounds, jobs, cache_rows, native
        self._reached = [plan.extremes for plan in plans]

    def refill(self, batch: RaggedBatch | None = None) -> None:
        """Plan what ``self.batch`` holds now, or takes over from ``batch`` first, in place of what the plans hold.

        As by ``Plan.copy_``, counters are zero and facts forgotten. On a GPU, without ``batch``, that is one launch; it
        allocates nothing and may be captured. Replays do not forget facts that somebody asked for in between.
        Raises, before anything is written, ShapeError if the batch has another shape, and RangeError if a plan was used
        with buffers that are too small for its bounds, after it took over one that reached less.
        """
        for plan, reached in zip(self.plans, self._reached, strict=True):
            plan.check_admitted(reached)
        if batch is not None:
            self.batch.check_like(batch)
        for plan in self.plans:
            plan.renew(None)
        if batch is not None:
            self.batch.copy_(batch)
        if self._native is not None:
            self._native.fill()
            for plan, reached in zip(self.plans, self._reached, strict=True):
                plan.renew(reached)
            return
        for plan, job, rows in zip(self.plans, self._jobs, self._cache_rows, strict=True):
            plan.copy_(_built(job, self.batch, self._bounds, rows))


def _launches(device: torch.device) -> bool:
    """Whether Triton makes the static plans of batches on this device."""
    if device.type == "cpu":
        return False
    from kvcondense.backends.triton import planning

    return planning.why_not(device) is None


def _built(job: Job, batch: RaggedBatch, bounds: Bounds, cache_rows: int | None) -> Plan:
    spec, layout, page_rows = job
    return Plan.build_static(
        spec,
        batch,
        max_tokens=bounds.tokens,
        max_draft=bounds.draft,
        max_query_len=bounds.query_len,
        state_layout=layout,
        page_rows=page_rows,
        max_positions=bounds.positions,
        cache_rows=cache_rows,
    )
