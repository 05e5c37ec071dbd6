"""The reference backend: the stages composed in order. It is the specification; speed is no concern here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kvcondense.backends import Step
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec
from kvcondense.stages import hadamard, norm, online, pool, project, rope, store, window


@dataclass(frozen=True)
class Stages:
    """The functions that the reference backend composes; tests of the tests swap one for a wrong one."""

    token_positions: Callable = window.token_positions
    state_rows: Callable = window.state_rows
    gather: Callable = window.gather
    keep: Callable = window.keep
    pool: Callable = pool.two_pass
    norm: Callable = norm.rms_norm
    rope: Callable = rope.pairwise
    hadamard: Callable = hadamard.hadamard
    scatter: Callable = store.scatter
    rope_position: Callable[[Plan], torch.Tensor] = lambda plan: plan.window_index * plan.ratio

    def finish(
        self,
        spec: CompressorSpec,
        pooled: torch.Tensor,
        gamma: torch.Tensor,
        table: RopeTable | None,
        position: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [E, d] of P before and after RoPE at ``position`` [E] and Hadamard: stages 4 to 6."""
        latent = row = self.norm(pooled, gamma, spec.eps, spec.rounding)
        if table is not None:
            row = self.rope(row, *table.rows(position), spec.rounding)
        return latent, self.hadamard(row) if spec.rotate else row


@dataclass(frozen=True)
class ReferenceBackend:
    """Torch on any device, fp32 or fp64, every ratio, layout and format."""

    name: str = "reference"
    stages: Stages = field(default_factory=Stages)

    def why_not(self, step: Step) -> str | None:  # noqa: ARG002 - the protocol asks
        """Always None: the reference runs every valid step."""
        return None

    def why_not_project(self, x: torch.Tensor, w: torch.Tensor) -> str | None:  # noqa: ARG002
        """Always None."""
        return None

    def project(self, x: torch.Tensor, w: torch.Tensor, tile: int | None) -> torch.Tensor:
        """One GEMM per ``tile`` tokens, in torch."""
        return project.project(x, w, tile)

    def run(self, step: Step) -> None:
        """tokens -> rows -> windows -> pool -> norm -> RoPE -> Hadamard -> cache; then keep what later steps read."""
        do, spec, plan = self.stages, step.spec, step.plan
        state_dtype = None if step.state is None else step.state.dtype
        none = plan.batch.query_start_loc.new_zeros(step.kv_score.shape[0])
        positions = none if step.stored else do.token_positions(plan, step.kv_score.shape[0])
        raw = isinstance(step.state, StatePool) and step.state.layout.raw_scores
        ape = None if raw else step.ape
        tokens = do.state_rows(spec, step.kv_score, ape, positions, state_dtype)  # [T, state_dim]
        live = plan.window_request >= 0
        dense = plan.facts(spec).dense
        acc = None
        if isinstance(step.state, OnlineState):
            pooled, acc = online.fold(spec, dense, tokens, step.state, step.ape)  # [E, d], [A, 3, d]
        else:
            read = (step.stored,) if step.stored else ()
            pooled = do.pool(*do.gather(spec, dense, tokens, step.state, step.ape, *read))  # [E, W, d] each -> [E, d]
        latent, row = do.finish(spec, pooled, step.gamma, step.rope, do.rope_position(dense))  # [E, d] each
        if step.latent is not None:
            step.latent[live] = latent.to(step.latent.dtype)
        step.rows[live] = row.to(step.rows.dtype)
        if step.cache is not None:
            do.scatter(row, dense.window_slot, step.cache, not spec.rounding.row)
        if isinstance(step.state, OnlineState):
            assert acc is not None
            online.keep(dense, tokens, acc, step.state)
        elif step.state is not None and not step.stored:
            do.keep(dense, tokens, step.state)


BACKEND = ReferenceBackend()
