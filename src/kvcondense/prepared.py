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

Take = Callable[[Plan], None]
"""Does the step of a plan."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """Steps of ``bound`` from one buffer of tokens into one of rows; made by ``prepare``.

    tokens [T, projected], or x [T, D] if ``hidden``: what the next step reads is what they hold by then; a step may
    have fewer. rows [T, head_dim] fp32 (fp64 for fp64 tokens): the first ``plan.num_windows`` are those of the last
    step, in the plan's order, zeros for its padding; latent: the same before RoPE, or None. One thread at a time may
    use it.

    places: of all of them, as they were prepared. ways: what does a step, with the cache in validation mode or not.
    """

    bound: Bound
    tokens: torch.Tensor
    hidden: bool
    rows: torch.Tensor
    latent: torch.Tensor | None
    places: tuple[Any, ...] = field(init=False, repr=False)
    ways: dict[bool, Take] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", self._places())

    def run(self, plan: Plan) -> None:
        """A step, as ``Bound.condense`` or ``compress`` does it: the same rows, state and cache, the same errors.

        And ShapeError for a plan of more than T windows, which only padding can make.
        """
        bound, name = self.bound, "x" if self.hidden else "kv_score"
        if self.places != self._places():
            raise KvCondenseError(f"{name}, rows", "the memory that was prepared", "other memory", "prepare it again")
        bound.ready(plan, self.tokens.shape[0], name)
        count = plan.num_windows
        if count > self.rows.shape[0]:
            raise ShapeError("plan", f"at most {self.rows.shape[0]} windows, padding included", count)
        strict = bound.cache is not None and bound.cache.strict
        take = self.ways.get(strict)
        if take is None:  # the backend is asked with this plan's step
            take = self.ways[strict] = self._prepared(plan) or self._whole
        if not plan.extremes.dense:
            for rows in self._outputs:
                rows[:count].zero_()
        take(plan)

    @property
    def _outputs(self) -> tuple[torch.Tensor, ...]:
        return (self.rows,) if self.latent is None else (self.rows, self.latent)

    def _places(self) -> tuple[Any, ...]:
        """Where the buffers lie, and how."""
        held = (self.tokens, *self._outputs, self.bound.w) if self.hidden else (self.tokens, *self._outputs)
        found: list[Any] = []
        for t in held:
            found += (t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad)
        return tuple(found)

    def _whole(self, plan: Plan) -> None:
        """A step of the bound compressor, where a backend prepares none."""
        found = (self.bound.compress if self.hidden else self.bound.condense)(self.tokens, plan)
        self.rows[: plan.num_windows] = found.values
        if self.latent is not None and found.latent is not None:
            self.latent[: plan.num_windows] = found.latent

    def _prepared(self, plan: Plan) -> Take | None:
        """A step as the backend has prepared it. Not that of an object: such a one is asked anew for every step."""
        bound, x, kv_score = self.bound, self.tokens, self.tokens
        if not isinstance(bound.impl, str):
            return None
        product: Callable[[], None] | None = None
        if self.hidden:
            kv_score = _buffer(x, bound.spec.projected, self.rows.dtype)
            product = _asked(select_projector(bound.impl, x, bound.w), "prepare_product", x, bound.w, kv_score)
        step = replace(bound.step(kv_score, plan), rows=self.rows, latent=self.latent)
        backend = bound.backend(step)
        if self.hidden and (product is None or fused_form(backend, step, x, bound.w) is not None):
            return None
        rest: Take | None = _asked(backend, "prepare_step", step)
        if rest is None:
            return None

        def launch(plan: Plan) -> None:
            if product is not None:
                product()
            rest(plan)

        def take(plan: Plan) -> None:
            if bound.state is None or bound.state.tags is None:  # a microsecond less
                launch(plan)
            else:
                marked([(bound.spec, bound.state, plan)], lambda: launch(plan))

        return take


def _asked(backend: Any, method: str, *arguments: Any) -> Any:
    """What a method of a ``Preparer`` returns; None of other backends."""
    found = getattr(backend, method, None)
    return found(*arguments) if callable(found) else None


def _buffer(tokens: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """A row for each token, which steps may write in any mode of torch's."""
    with torch.inference_mode(False):
        return torch.zeros(tokens.shape[0], channels, dtype=dtype, device=tokens.device)


def prepare(bound: Bound, kv_score: torch.Tensor | None = None, *, x: torch.Tensor | None = None) -> Prepared:
    """Steps of a bound compressor from a buffer that stays: kv_score [T, projected], or hidden states x [T, D].

    For loops that are Python's: ``run`` checks that no memory has moved, that the plan reaches no address outside of
    it, and state tags if there are any, and asks the rest once. The buffer is shared, not copied. Raises as
    ``Bound.condense`` and ``compress`` do for such tokens.
    """
    require("bound", bound, Bound)
    validate.one_of(kv_score, x)
    if x is not None:
        dtype, tokens = bound.unprojected(x).dtype, x
        validate.no_gradients("x", x)
        bound.beside("x", x)
    else:
        assert kv_score is not None
        bound.take(kv_score)
        dtype, tokens = compute_dtype(kv_score.dtype), kv_score
    rows, latent = (_buffer(tokens, bound.spec.head_dim, dtype) for _ in range(2))
    return Prepared(bound, tokens, x is not None, rows, latent if bound.latent else None)
