"""A bound compressor whose tokens and rows stay where they are, too: a decode loop's next step costs its plan alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvcondense.bound import Bound, marked
from kvcondense.errors import KvCondenseError, ShapeError, require
from kvcondense.layout.plan import Plan
from kvcondense.numerics import compute_dtype


@dataclass(eq=False)
class Prepared:
    """Steps of ``bound`` from one buffer of tokens into one of rows; made by ``prepare``.

    kv_score [T, projected]: what the next step reads is what it holds by then; a step may have fewer tokens. rows
    [T, head_dim] fp32 (fp64 for fp64 tokens): the first ``plan.num_windows`` are those of the last step, in the plan's
    order, the others are left alone; latent: the same before RoPE, or None. go: what runs steps, with the cache in
    validation mode or not. One thread at a time may use it.
    """

    bound: Bound
    kv_score: torch.Tensor
    rows: torch.Tensor
    latent: torch.Tensor | None
    places: tuple[int, ...]
    go: dict[bool, Callable[[Plan], None]] = field(default_factory=dict)

    def run(self, plan: Plan) -> None:
        """A step, as ``Bound.condense`` does it: the same rows, state and cache. Raises before anything is written."""
        bound = self.bound
        bound.ready(plan, self.kv_score.shape[0])
        if self.places != _places(self.kv_score, self.rows, self.latent):
            wanted = "the memory that was prepared"
            raise KvCondenseError("kv_score, rows, latent", wanted, "other memory", "prepare it again")
        if plan.num_windows > self.rows.shape[0]:
            raise ShapeError("plan", f"at most {self.rows.shape[0]} windows, padding included", plan.num_windows)
        strict = bound.cache is not None and bound.cache.strict
        go = self.go.get(strict) or self._first(plan, strict)
        if bound.state is None or bound.state.tags is None:
            go(plan)
        else:
            marked([(bound.spec, bound.state, plan)], lambda: go(plan))

    def _first(self, plan: Plan, strict: bool) -> Callable[[Plan], None]:
        """What runs steps, as the backend has it: one that prepares nothing is given a step each time."""
        step = replace(self.bound.step(self.kv_score, plan), rows=self.rows, latent=self.latent)
        backend: Any = self.bound.backend(step)
        made = backend.prepare(step) if callable(getattr(backend, "prepare", None)) else None

        def each(plan: Plan) -> None:
            count, latent = plan.num_windows, self.latent
            rows = {"rows": self.rows[:count], "latent": None if latent is None else latent[:count]}
            backend.run(replace(step, plan=plan, **rows))

        go = self.go[strict] = each if made is None else made
        return go


def prepare(bound: Bound, kv_score: torch.Tensor) -> Prepared:
    """Steps of a bound compressor from this buffer [T, projected]; raises as ``Bound.condense`` does for such tokens.

    For loops that are Python's: ``run`` checks that no memory has moved, that the plan reaches no address outside of
    it, and state tags if there are any, and asks the rest once, here. ``kv_score`` is shared, not copied.
    """
    require("bound", bound, Bound)
    bound.take(kv_score)
    shape, dtype = (kv_score.shape[0], bound.spec.head_dim), compute_dtype(kv_score.dtype)
    rows = kv_score.new_zeros(shape, dtype=dtype)
    latent = torch.zeros_like(rows) if bound.latent else None
    return Prepared(bound, kv_score, rows, latent, _places(kv_score, rows, latent))


def _places(*tensors: torch.Tensor | None) -> tuple[int, ...]:
    return tuple([t.data_ptr() for t in tensors if t is not None])
