"""What a mutant is, and the classes of bugs that mutants stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvcondense.backends import Step
from kvcondense.backends.reference import ReferenceBackend, Stages

SPECULATION = "B1 speculation"
CHUNKS = "B2 decode != prefill"
ALIASING = "B3 aliasing"
PADDING = "B4 padding, graphs"
ROPE = "B5 RoPE"
HADAMARD = "B6 Hadamard"
PREFIX = "B7 prefix reuse"
TRANSFER = "B8 transfer"
BOUNDS = "B9 bounds"
RACES = "B10 races"
BATCH = "B11 batch dependence"
NUMERICS = "B12 numerics"
FIRST_WINDOW = "B13 first window"
BOUNDARIES = "B14 boundaries"


@dataclass(frozen=True)
class Mutant:
    """A wrong backend: ``bug`` says in a line what is wrong with it, ``bug_class`` what kind of bug that is."""

    name: str
    bug: str
    bug_class: str = ""
    stages: Stages = field(default_factory=Stages)
    alter: Callable[[Step], Step] = lambda step: step
    kind: str = "ring"
    """Kind of state in which the bug shows: ring, paged or online."""

    def why_not(self, step: Step) -> str | None:
        return ReferenceBackend().why_not(step)

    def run(self, step: Step) -> None:
        ReferenceBackend(self.name, self.stages).run(self.alter(step))
