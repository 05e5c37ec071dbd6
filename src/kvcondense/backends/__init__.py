"""What a backend is, the table of backends, and how one is picked. All that a backend author has to read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

from kvcondense.errors import DtypeError, UnsupportedError, require_known
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec


@dataclass(slots=True, eq=False)  # a frozen one takes a microsecond longer to make
class Step:
    """One validated call, not to be changed (``dataclasses.replace``).

    A backend may write ``rows``, ``latent``, ``state`` and ``cache``, and nothing else. kv_score [T, projected]; ape
    [r, N] or None; gamma [d]. rows [E, d] fp32 takes the finished rows, latent [E, d] (if not None) the rows before
    RoPE; E is plan.num_windows, and rows of padding entries are left as they are. The bytes of ``cache`` follow from
    its format's fields; a backend that does not check values says so for a ``strict`` cache.
    made: what a backend keeps of spec, ape, gamma, rope, state and cache between steps, by its name; whoever gives it
    sees to it that their memory stays where it is, but a copy of a step may have others.
    stored: the step's own tokens are in the state, too: all are read from there, kv_score has no values and nothing is
    kept.
    """

    spec: CompressorSpec
    plan: Plan
    kv_score: torch.Tensor
    ape: torch.Tensor | None
    gamma: torch.Tensor
    rope: RopeTable | None
    state: StatePool | OnlineState | None
    cache: PagedCache | None
    rows: torch.Tensor
    latent: torch.Tensor | None
    made: dict[str, Any] | None = None
    stored: bool = False


class Backend(Protocol):
    """A way to run a step. Equal inputs give equal bytes, whatever stands next to them in the batch."""

    @property
    def name(self) -> str: ...

    def why_not(self, step: Step) -> str | None:
        """None if ``run`` can do this step, else the reason it cannot, in a sentence."""
        ...

    def run(self, step: Step) -> None:
        """Do the step. Reads of the state happen before its writes."""
        ...


class Projector(Protocol):
    """A backend that also multiplies hidden states with the merged weight; a row depends on its own token alone."""

    @property
    def name(self) -> str: ...

    def why_not_project(self, x: torch.Tensor, w: torch.Tensor) -> str | None:
        """None if ``project`` can do this, else the reason."""
        ...

    def project(self, x: torch.Tensor, w: torch.Tensor, tile: int | None) -> torch.Tensor:
        """x [T, D], w [projected, D] -> x @ w.T [T, projected]; ``tile``: rows per GEMM of backends that need it."""
        ...


class Fuser(Protocol):
    """A backend that also does whole steps from hidden states, without kv_score in memory."""

    def fused_forms(self, step: Step, x: torch.Tensor, w: torch.Tensor) -> dict[str, str | None]:
        """For each way of doing so, best first: None if it can do this step and is faster than two, else the reason."""
        ...

    def run_fused(self, form: str, steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
        """Do steps from the same x [T, D], each with its w [projected, D]. Their ``kv_score`` have no values."""
        ...


class Preparer(Protocol):
    """A backend that keeps ready what steps from buffers that stay have in common (``kvcondense.prepared``)."""

    def prepare_step(self, step: Step) -> Callable[[Plan], None] | None:
        """``run`` of this step with whatever plan comes, its rows and latent first; None where ``run`` has to do it."""
        ...

    def prepare_product(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Callable[[], None] | None:
        """``project`` of these buffers into ``out`` [T, projected]; None where ``project`` has to do it."""
        ...


# Name -> module with a BACKEND; imported when it is asked for. "auto" takes the first that can run the step, but
# for one with a true ``stand_in``: it runs somewhere else than where it is meant to, slowly.
_MODULES = {
    "cpu": "kvcondense.backends.cpu",
    "triton": "kvcondense.backends.triton",
    "reference": "kvcondense.backends.reference",
    "pypto": "kvcondense.backends.pypto",
}


def backend_names() -> tuple[str, ...]:
    """Names that ``impl`` accepts beside "auto"."""
    return tuple(_MODULES)


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend called ``name``; raises UnsupportedError with the list of names otherwise."""
    require_known(
        "impl", name, _MODULES, "'auto' takes the first that can run a step; kvcondense info says which do here"
    )
    return import_module(_MODULES[name]).BACKEND


def select(impl: str | Backend, step: Step) -> Backend:
    """The backend for ``step``: the named one or an error that says why not, never a fallback."""
    if not isinstance(impl, str) and not (
        callable(getattr(impl, "run", None)) and callable(getattr(impl, "why_not", None))
    ):
        raise DtypeError("impl", "a backend's name, or an object with why_not and run", type(impl).__name__)

    return _first(impl, lambda backend: backend.why_not(step), "run this step")


def fused_forms(backend: Any, step: Step, x: torch.Tensor, w: torch.Tensor) -> dict[str, str | None]:
    """A backend's ways of doing this step from x, if it has any, with None for those it would take."""
    return backend.fused_forms(step, x, w) if callable(getattr(backend, "fused_forms", None)) else {}


def fused_form(backend: Any, step: Step, x: torch.Tensor, w: torch.Tensor) -> str | None:
    """The way that this backend takes; None: project, then run the step."""
    return next((form for form, reason in fused_forms(backend, step, x, w).items() if reason is None), None)


def select_projector(impl: str | Backend, x: torch.Tensor, w: torch.Tensor) -> Projector:
    """The backend for a projection, by the same rules."""

    def why_not(backend: Any) -> str | None:
        if not callable(getattr(backend, "why_not_project", None)):
            return "it has no projection (call project, then condense)"
        return backend.why_not_project(x, w)

    return _first(impl, why_not, "project x")


def _first(impl: Any, why_not: Callable[[Any], str | None], purpose: str) -> Any:
    candidates = _candidates(impl) if isinstance(impl, str) else (impl,)
    reasons = []
    for backend in candidates:
        if impl == "auto" and getattr(backend, "stand_in", False):
            reason: str | None = "it is taken by name alone (a simulator, or an interpreter)"
        else:
            reason = why_not(backend)
        if reason is None:
            return backend
        reasons.append(f"{getattr(backend, 'name', type(backend).__name__)}: {reason}")
    raise UnsupportedError("impl", f"a backend that can {purpose}", "; ".join(reasons))


@functools.cache
def _candidates(impl: str) -> tuple[Backend, ...]:
    return tuple(get_backend(name) for name in (_MODULES if impl == "auto" else (impl,)))
