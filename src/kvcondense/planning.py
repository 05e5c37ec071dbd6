"""The plans of a step for all ratios of a model at once: by compiled code where it can run, else by the builders."""

from __future__ import annotations

from collections.abc import Sequence

from kvcondense.backends.cpu.planning import Job, NativePlanner
from kvcondense.layout.batch import IntTensor, RaggedBatch
from kvcondense.layout.plan import Plan


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
