"""A bound compressor whose tokens and rows stay where they are, too: a decode loop's next step costs its plan alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kvcondense import validate
from kvcondense.backends import fused_form, select_projector
from kvcondense.bound import Bound, marked
from kvcondense.errors import KvCondenseError, ShapeError, require
from kvcondense.layout.plan import Plan
from kvcondense.numerics import compute_dtype


@dataclass(eq=False)
class Prepared:
    """Steps of ``bound`` from one buffer of tokens into one of rows; made by ``prepare``.

    tokens [T, projected], or x [T, D] if ``hidden``: what the next step reads is what they hold by then; a step may
    have fewer. rows [T, head_dim] fp32 (fp64 for fp64 tokens): the first ``plan.num_windows`` are those of the last
    step, in the plan's order; latent: the same before RoPE, or None. go: what runs steps, with the cache in validation
    mode or not. One thread at a time may use it.
    """

    bound: Bound
    tokens: torch.Tensor
    hidden: bool
    rows: torch.Tensor
    latent: torch.Tensor | None
    places: tuple[int, ...]
    go: dict[bool, Callable[[Plan], None]] = field(default_factory=dict)

    def run(self, plan: Plan) -> None:
        """A step, as ``Bound.condense`` or ``compress`` does it: the same rows, state and cache, the same errors."""
        bound, name = self.bound, "x" if self.hidden else "kv_score"
        bound.ready(plan, self.tokens.shape[0], name)
        if self.places != self.now():
            raise KvCondenseError(f"{name}, rows", "the memory that was prepared", "other memory", "prepare it again")
        if plan.num_windows > self.rows.shape[0]:
            raise ShapeError("plan", f"at most {self.rows.shape[0]} windows, padding included", plan.num_windows)
        strict = bound.cache is not None and bound.cache.strict
        go = self.go.get(strict) or self._first(plan, strict)
        go(plan)

    def now(self) -> tuple[int, ...]:
        """Where the buffers lie."""
        first = (self.tokens.data_ptr(), self.rows.data_ptr(), 0 if self.latent is None else self.latent.data_ptr())
        return (*first, self.bound.w.data_ptr()) if self.hidden else first

    def _first(self, plan: Plan, strict: bool) -> Callable[[Plan], None]:
        """What runs steps: as the backend has prepared it; where it prepares nothing, a step of the bound compressor.

        The backend is asked with the first step's plan.
        """
        take = self.bound.compress if self.hidden else self.bound.condense

        def whole(plan: Plan) -> None:
            found = take(self.tokens, plan)
            self.rows[: plan.num_windows] = found.values
            if self.latent is not None and found.latent is not None:
                self.latent[: plan.num_windows] = found.latent

        self.go[strict] = self._quick(plan) or whole
        return self.go[strict]

    def _quick(self, plan: Plan) -> Callable[[Plan], None] | None:
        """A step without what a backend asks of buffers; None if it prepares none."""
        bound, x, kv_score = self.bound, self.tokens, self.tokens
        product: Callable[[], None] | None = None
        if self.hidden:
            projector: Any = select_projector(bound.impl, x, bound.w)
            kv_score = torch.empty_like(bound.unprojected(x), memory_format=torch.contiguous_format)
            product = _asked(projector, "prepare_product", x, bound.w, kv_score)
        step = replace(bound.step(kv_score, plan), rows=self.rows, latent=self.latent)
        backend = bound.backend(step)
        if self.hidden and (product is None or fused_form(backend, step, x, bound.w) is not None):
            return None
        made: Callable[[Plan], None] | None = _asked(backend, "prepare", step)
        if made is None:
            return None

        def launch(plan: Plan) -> None:
            if product is not None:
                product()
            made(plan)

        def go(plan: Plan) -> None:
            if bound.state is None or bound.state.tags is None:
                launch(plan)
            else:
                marked([(bound.spec, bound.state, plan)], lambda: launch(plan))

        return go


def _asked(backend: Any, method: str, *arguments: Any) -> Any:
    """What a method returns that not all backends have."""
    found = getattr(backend, method, None)
    return found(*arguments) if callable(found) else None


def prepare(bound: Bound, kv_score: torch.Tensor | None = None, *, x: torch.Tensor | None = None) -> Prepared:
    """Steps of a bound compressor from a buffer that stays: kv_score [T, projected], or hidden states x [T, D].

    For loops that are Python's: ``run`` checks that no memory has moved, that the plan reaches no address outside of
    it, and state tags if there are any, and asks the rest once. The buffer is shared, not copied. Raises as
    ``Bound.condense`` and ``compress`` do for such tokens.
    """
    require("bound", bound, Bound)
    if (kv_score is None) == (x is None):
        raise KvCondenseError("x", "exactly one of kv_score and x", "both or neither" if x is None else "both")
    if x is not None:
        validate.no_gradients("x", x)
        dtype, tokens = bound.unprojected(x).dtype, x
        bound.beside("x", x)
    else:
        assert kv_score is not None
        bound.take(kv_score)
        dtype, tokens = compute_dtype(kv_score.dtype), kv_score
    rows = tokens.new_zeros((tokens.shape[0], bound.spec.head_dim), dtype=dtype)
    made = Prepared(bound, tokens, x is not None, rows, torch.zeros_like(rows) if bound.latent else None, ())
    made.places = made.now()
    return made
