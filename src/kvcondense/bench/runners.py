"""Who is timed: kvcondense's backends here, other packages in ``peers``. One small interface for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from kvcondense.api import compress, condense, project
from kvcondense.backends import Step, get_backend
from kvcondense.bench.cases import CONFIG, FORMAT, PAGE_ROWS, Inputs
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights


class Runner(Protocol):
    """An implementation of a case."""

    name: str
    note: str

    def primed(self) -> Any:
        """A state that has taken ``inputs.history``."""
        ...

    def copy(self, state: Any) -> Any:
        """A state that the timed step may change. Not timed."""
        ...

    def step(self, state: Any) -> None:
        """Take ``inputs.new``: what is timed."""
        ...

    def feed(self, state: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Take tokens [B, n, channels]; the rows that they complete, [B, windows, d] fp32. Not timed."""
        ...


class Kvcondense:
    """A backend through the public functions, with a plan that a step's layers share, storing FP8 rows.

    ``checked``: the state pool's host tags are on, which no engine's kernel has. ``bare``: the backend's ``run`` alone,
    for a step that was checked before: what it costs beyond is this library's validation.
    """

    def __init__(
        self, inputs: Inputs, backend: str, *, checked: bool = False, bare: bool = False, steps: int = 1
    ) -> None:
        case = inputs.case
        self.inputs, self.spec, self.backend, self.checked = inputs, case.spec, backend, checked
        self.bare = bare
        self.name = backend + (", checked" if checked else ", bare" if bare else "")
        self.note = "pool, norm, RoPE, FP8 store, state" + (
            "; state tags checked" if checked else "; no validation" if bare else ""
        )
        self.weights = CompressorWeights(norm=inputs.norm, ape=inputs.ape, w=inputs.w)
        end = case.start + steps * case.tokens + inputs.rest.shape[1]
        self.rope = RopeTable.build(CONFIG, end + self.spec.ratio)
        self.pages = -(-(end // self.spec.ratio + 1) // PAGE_ROWS)
        self.new = inputs.new.flatten(0, 1)
        self.run = compress if case.hidden else condense

    def _batch(self, start: int, count: int) -> RaggedBatch:
        batch = self.inputs.case.batch
        return RaggedBatch.build(
            torch.arange(batch + 1) * count,
            start_positions=[start] * batch,
            state_slots=list(range(batch)),
            block_table=torch.arange(batch * self.pages).view(batch, -1),
            # All of them drafts, so that the same step can be run again.
            draft_rows=count if start and count == self.inputs.case.tokens else 0,
        )

    def _plan(self, start: int, count: int, pool: StatePool) -> Plan:
        return Plan.build(self.spec, self._batch(start, count), state_layout=pool.layout, page_rows=PAGE_ROWS)

    def primed(self) -> dict[str, Any]:
        case = self.inputs.case
        drafts = case.tokens if case.start else 0
        pool = StatePool.ring(self.spec, case.batch, self.spec.required_ring_rows(drafts))
        if not self.checked:
            pool.tags = None
        cache = PagedCache.allocate(self.spec.head_dim, case.batch * self.pages, PAGE_ROWS, format=FORMAT)
        state = {"pool": pool, "cache": cache, "position": 0}
        if case.start:
            self.feed(state, self.inputs.history)
        plan = state["plan"] = self._plan(case.start, case.tokens, pool)
        if self.bare:
            w, rows = self.weights, torch.zeros(plan.num_windows, self.spec.head_dim)
            state["step"] = Step(self.spec, plan, self.new, w.ape, w.norm, self.rope, pool, cache, rows, None)
        return state

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        return dict(state)  # a step at a fixed position writes the same rows again

    def step(self, state: dict[str, Any]) -> None:
        plan = state["plan"]
        state["position"] = self.inputs.case.start + self.inputs.case.tokens
        if self.bare:
            get_backend(self.backend).run(state["step"])
            return
        self.run(
            self.spec, self.new, self.weights, self.rope, plan.batch,
            plan=plan, state=state["pool"], cache=state["cache"], impl=self.backend,
        )  # fmt: skip

    def feed(self, state: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        start, count = state["position"], tokens.shape[1]
        batch = self._batch(start, count)
        state["position"] = start + count
        rows = self.run(
            self.spec, tokens.flatten(0, 1), self.weights, self.rope, batch,
            state=state["pool"], cache=state["cache"], impl=self.backend,
        )  # fmt: skip
        return rows.values.view(tokens.shape[0], -1, self.spec.head_dim)


GEMM = "bf16 GEMM alone"
GEMMS = (GEMM, "our GEMM alone", "fp32 GEMM alone", "fp32 GEMM in bf16 math mode")
"""Ways to project, without anything after it: a floor that is itself a measurement, ours, and what torch offers."""


class Gemm:
    """A projection alone. torch's bf16 one rounds its result to bf16, the others give fp32."""

    def __init__(self, inputs: Inputs, name: str, backend: str) -> None:
        self.name, self.note = name, "no rows" + ("; result rounded to bf16" if name == GEMM else "")
        x, w = inputs.new.flatten(0, 1), inputs.w
        wide_x, wide_w = x.float(), w.float()
        weights = CompressorWeights(norm=inputs.norm, ape=inputs.ape, w=w)

        def in_math_mode() -> torch.Tensor:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                return torch.nn.functional.linear(wide_x, wide_w)
            finally:
                torch.set_float32_matmul_precision(before)

        ways: tuple[Callable[[], torch.Tensor], ...] = (
            lambda: torch.nn.functional.linear(x, w),
            lambda: project(inputs.case.spec, x, weights, impl=backend),
            lambda: torch.nn.functional.linear(wide_x, wide_w),
            in_math_mode,
        )
        self.run = ways[GEMMS.index(name)]

    def primed(self) -> None:
        return None

    def copy(self, state: None) -> None:
        return state

    def step(self, state: None) -> None:
        del state
        self.run()
