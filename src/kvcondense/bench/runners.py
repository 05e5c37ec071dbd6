"""Who is timed: kvcondense's backends here, others in ``peers`` and ``peer_*``. One small interface for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch

from kvcondense.api import compress, condense, project
from kvcondense.backends import Step, get_backend
from kvcondense.bench.cases import PAGE_ROWS, Inputs
from kvcondense.bound import Bound, bind
from kvcondense.formats import get_format
from kvcondense.layout.addresses import RingLayout
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.planning import Planner
from kvcondense.prepared import Prepared, prepare
from kvcondense.rope_table import RopeTable

CHECKED, PREPARED, BARE = "checked", "prepared", "bare"
_NOTES = {
    "": "",
    CHECKED: "; state tags checked",
    PREPARED: "; buffers of tokens and rows prepared",
    BARE: "; no validation",
}
_TENSOR_SCALE = 0.02
"""Of formats with one scale for the whole cache; it leaves no row saturated."""


class Runner(Protocol):
    """An implementation of a case."""

    name: str
    note: str
    capturable: bool
    """True if a CUDA graph can capture a step."""

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
    """A backend through the public functions, with a plan that a step's layers share, storing rows in a cache.

    ``way``: CHECKED: the state pool's host tags are on, which no engine's kernel has. PREPARED: tokens and rows stay
    where they are (``prepared``). BARE: the backend's ``run`` alone, for a step that was checked before:
    what it costs beyond is this library's validation. A bare step from x has one plain GEMM before it.
    """

    def __init__(self, inputs: Inputs, backend: str, way: str = "", *, steps: int = 1) -> None:
        case = inputs.case
        self.inputs, self.spec, self.backend, self.way = inputs, case.spec, backend, way
        self.bare = way == BARE
        self.name = backend + (f", {way}" if way else "")
        self.capturable, self.device = self.bare, inputs.new.device
        self.note = f"pool, norm, RoPE, {case.format} store, state{_NOTES[way]}"
        self.weights = inputs.weights
        end = case.start + steps * case.tokens + inputs.rest.shape[1]
        self.rope = RopeTable.build(case.config, end + self.spec.ratio, device=self.device)
        self.pages = -(-(end // self.spec.ratio + 1) // PAGE_ROWS)
        rows = self.spec.required_ring_rows(steps * case.tokens if case.start else 0)
        self.layout = RingLayout(case.batch, rows)
        self.planner = Planner([(self.spec, self.layout, PAGE_ROWS)])
        self.new = inputs.new.flatten(0, 1)
        self.run = compress if case.hidden else condense

    def _plan(self, start: int, count: int) -> Plan:
        # All of them drafts, so that the same step can be run again.
        drafts = count if start and count == self.inputs.case.tokens else 0
        return self.planner.step(**self.metadata(start, count), draft_rows=drafts)[1][0]

    def metadata(self, start: int, count: int) -> dict[str, Any]:
        """Of a step in which every request brings ``count`` tokens, for a planner."""
        batch = self.inputs.case.batch
        return {
            "query_start_loc": torch.arange(batch + 1, device=self.device) * count,
            "start_positions": torch.full((batch,), start, device=self.device),
            "state_slots": torch.arange(batch, device=self.device),
            "block_table": torch.arange(batch * self.pages, device=self.device).view(batch, -1),
        }

    def primed(self) -> dict[str, Any]:
        case = self.inputs.case
        dtype = torch.bfloat16 if case.narrow else torch.float32
        pool = StatePool.ring(self.spec, case.batch, self.layout.ring_rows, device=self.device, dtype=dtype)
        if self.way != CHECKED:
            pool.tags = None
        cache = PagedCache.allocate(
            self.spec.head_dim, case.batch * self.pages, PAGE_ROWS, format=case.format,
            tensor_scale=_TENSOR_SCALE if get_format(case.format).tensor_scale else None, device=self.device,
        )  # fmt: skip
        state = {"pool": pool, "cache": cache, "position": 0}
        if case.start:
            self.feed(state, self.inputs.history)
        plan = state["plan"] = self._plan(case.start, case.tokens)
        if self.bare:
            w, rows = self.weights, torch.zeros(plan.num_windows, self.spec.head_dim, device=self.device)
            tokens = self.new[:0].float() if case.hidden else self.new
            state["step"] = Step(
                self.spec, plan, tokens, w.ape, w.norm, self.rope, pool, cache, rows, None, made={}
            )  # what a bound compressor keeps, too
        if self.way == PREPARED:
            state["prepared"] = self._prepared(state, self.new)
        return state

    def bound(self, state: dict[str, Any]) -> Bound:
        """The compressor on this state."""
        memory = {"state": state["pool"], "cache": state["cache"], "impl": self.backend}
        return bind(self.spec, self.weights, self.rope, **memory)

    def _prepared(self, state: dict[str, Any], tokens: torch.Tensor) -> Prepared:
        bound = self.bound(state)
        return prepare(bound, x=tokens) if self.inputs.case.hidden else prepare(bound, tokens)

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        return dict(state)  # a step at a fixed position writes the same rows again

    def step(self, state: dict[str, Any]) -> None:
        plan = state["plan"]
        state["position"] = self.inputs.case.start + self.inputs.case.tokens
        if self.bare:
            step = state["step"]
            if self.inputs.case.hidden:
                step = replace(step, kv_score=plain_gemm(self.new, self.inputs.w))
            get_backend(self.backend).run(step)
            return
        if self.way == PREPARED:
            state["prepared"].run(plan)
            return
        self.run(
            self.spec, self.new, self.weights, self.rope, plan.batch,
            plan=plan, state=state["pool"], cache=state["cache"], impl=self.backend,
        )  # fmt: skip

    def feed(self, state: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        start, count = state["position"], tokens.shape[1]
        plan = self._plan(start, count)
        state["position"] = start + count
        if self.way == PREPARED:
            prepared = self._prepared(state, tokens.flatten(0, 1))
            prepared.run(plan)
            rows = prepared.rows[: plan.num_windows]
        else:
            rows = self.run(
                self.spec, tokens.flatten(0, 1), self.weights, self.rope, plan.batch,
                plan=plan, state=state["pool"], cache=state["cache"], impl=self.backend,
            ).values  # fmt: skip
        return rows.view(tokens.shape[0], -1, self.spec.head_dim)


class InCache(Kvcondense):
    """A bare prefill whose tokens are all the same row: what the arithmetic takes when no memory is waited for."""

    def __init__(self, inputs: Inputs, backend: str) -> None:
        super().__init__(inputs, backend, BARE)
        self.new = self.new[:1].expand_as(self.new)
        self.name, self.note = IN_CACHE, "every token is read from the same row, in the nearest cache"


IN_CACHE = "arithmetic alone"
GEMM = "bf16 GEMM alone"
GEMMS = (GEMM, "our GEMM alone", "fp32 GEMM alone", "fp32 GEMM in bf16 math mode", "GEMM alone, bf16 to fp32")
"""Ways to project, without anything after it: a floor that is itself a measurement, ours, and what torch offers."""


def gemm_names(device: str) -> tuple[str, ...]:
    """Those that are timed there: the last one is a GPU's."""
    return GEMMS[:-1] if device == "cpu" else (GEMM, GEMMS[-1])


def plain_gemm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [T, D] @ w.T [D, projected] of bf16 values, summed and kept in fp32, as the vendor's library does it."""
    if x.device.type == "cpu":  # torch has no such product there
        return torch.nn.functional.linear(x.float(), w.float())
    return torch.mm(x, w.T, out_dtype=torch.float32)


class _Stateless:
    """Work that no history changes."""

    capturable = True

    def primed(self) -> None:
        return None

    def copy(self, state: None) -> None:
        return state


class Gemm(_Stateless):
    """A projection alone. torch's bf16 one rounds its result to bf16, the others give fp32."""

    def __init__(self, inputs: Inputs, name: str, backend: str) -> None:
        self.name, self.note = name, "no rows" + ("; result rounded to bf16" if name == GEMM else "")
        x, w = inputs.new.flatten(0, 1), inputs.w
        wide_x, wide_w = (x.float(), w.float()) if name in GEMMS[2:4] else (x, w)

        def in_math_mode() -> torch.Tensor:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")
            try:
                return torch.nn.functional.linear(wide_x, wide_w)
            finally:
                torch.set_float32_matmul_precision(before)

        ways: tuple[Callable[[], torch.Tensor], ...] = (
            lambda: torch.nn.functional.linear(x, w),
            lambda: project(inputs.case.spec, x, inputs.weights, impl=backend),
            lambda: torch.nn.functional.linear(wide_x, wide_w),
            in_math_mode,
            lambda: plain_gemm(x, w),
        )
        self.run = ways[GEMMS.index(name)]

    def step(self, state: None) -> None:
        del state
        self.run()


class EmptyLaunch(_Stateless):
    """A Triton kernel that does nothing: what any launch costs."""

    name, note = "an empty launch", "no work"

    def __init__(self, inputs: Inputs) -> None:
        from kvcondense.bench.kernels import empty_kernel

        self.kernel, self.operand = empty_kernel, inputs.norm

    def step(self, state: None) -> None:
        del state
        self.kernel[(1,)](self.operand)
