"""Decode steps in pypto.language, the original kernel's own, on Ascend NPUs or on their simulators on this processor.

A call takes one token for each request, from hidden states (``compress``) or from kv_score (``condense``); steps of
several tokens are as many calls. Nothing of pypto is imported before a step asks. Shapes are compile-time values: a
batch of another sixteen, another pool or another cache compiles anew, for a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcondense.backends import Step
from kvcondense.backends.pypto import calls, probe
from kvcondense.layout.addresses import RingLayout
from kvcondense.layout.state import StatePool
from kvcondense.spec import Rounding


@dataclass(frozen=True)
class PyptoBackend:
    """Rings of fp32 rows, the REFERENCE profile, ape and gate, bf16 rows in the cache."""

    name: str = "pypto"
    stand_in: bool = True
    """Never the choice of "auto": a simulator takes a fifth of a second for a token."""
    kit: tuple[str, ...] = ("csa", "hca", "indexer")
    """Compressors of the conformance kit that have an ape, a gate and the profile."""
    stores: tuple[str, ...] = ("bf16",)
    """Cache formats."""
    from_hidden: bool = True
    """The projection is part of the kernel: what is to be tested goes in as hidden states."""

    def why_not(self, step: Step) -> str | None:
        """None if this step can run here, else the reason."""
        return probe.problem(probe.platform()) or _why_no_form(step)

    def run(self, step: Step) -> None:
        """Do the step from kv_score: everything but the projection."""
        calls.run(step)

    def why_not_project(self, x: torch.Tensor, w: torch.Tensor) -> str | None:
        """Always a reason: a projection alone is no program of this backend."""
        del x, w
        return "it projects in the same program as the step; kv_score never is in memory"

    def fused_forms(self, step: Step, x: torch.Tensor, w: torch.Tensor) -> dict[str, str | None]:
        """The step from hidden states, "decode", and why not."""
        return {"decode": _why_no_product(x, w) or self.why_not(step)}

    def run_fused(self, form: str, steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
        """Steps from the same x, one after the other."""
        del form
        for step, w in zip(steps, ws, strict=True):
            calls.run(step, x, w)


def _why_no_form(step: Step) -> str | None:
    """What a step has that the program does not."""
    spec, state, cache = step.spec, step.state, step.cache
    if step.kv_score.device.type != "cpu":
        return f"kv_score is on {step.kv_score.device}; tensors are handed over in host memory"
    if not isinstance(state, StatePool) or not isinstance(state.layout, RingLayout):
        return "the state is no ring of rows, which pypto needs"
    if state.layout.raw_scores or state.score is not None or step.stored:
        return "scores of the state have no ape, or lie elsewhere, or others have written them"
    if state.data.dtype is not torch.float32 or state.data.dim() != 2 or not state.data.is_contiguous():
        return "the state is not one fp32 tensor [rows, 2 N] without gaps"
    if spec.rounding is not Rounding.REFERENCE:
        return f"rounding {spec.rounding.value}; the program rounds as the reference does"
    if not (spec.has_gate and spec.has_ape):
        return "the compressor has no gate or no ape"
    if spec.head_dim % 16 or spec.rope_dim % 16 or spec.rope_dim == 0:
        return f"head_dim {spec.head_dim} and rope_dim {spec.rope_dim}; tiles take multiples of 16"
    if step.latent is not None:
        return "rows before RoPE are not handed out"
    if cache is not None and (cache.format.name != "bf16" or not cache.data.is_contiguous() or cache.strict):
        return f"cache format {cache.format.name}; the program stores bf16 rows without gaps"
    return None


def _why_no_product(x: torch.Tensor, w: torch.Tensor) -> str | None:
    if x.dtype is not torch.bfloat16 or w.dtype is not torch.bfloat16:
        return f"x is {x.dtype} and w {w.dtype}; products are of bf16"
    if x.shape[1] % 16 or x.shape[1] == 0:
        return f"{x.shape[1]} hidden channels; tiles take multiples of 16"
    return None if w.is_contiguous() else "w has gaps"


BACKEND = PyptoBackend()
