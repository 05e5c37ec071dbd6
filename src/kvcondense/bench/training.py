"""``kvcondense bench --training``: forward and backward of one document, beside eager autograd on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense import training
from kvcondense.bench import device as gpu
from kvcondense.bench import measure
from kvcondense.bench.cases import CONFIG, Case, make_inputs
from kvcondense.layout.batch import RaggedBatch
from kvcondense.rope_table import RopeTable
from kvcondense.spec import Rounding
from kvcondense.training import rows
from kvcondense.weights import CompressorWeights

CLOSE = 1e-3
"""How far a gradient may be from eager's, in RMS of it."""
CASES = {
    case.name: case
    for case in (
        Case("training 8192, ratio 128", "hca", 8192, 1, 0),
        Case("training 8192, ratio 4", "csa", 8192, 1, 0),
        Case("training 8192, indexer", "indexer", 8192, 1, 0, format="bf16"),
    )
}


@dataclass(frozen=True)
class Problem:
    """A document's kv_score [T, projected] and what is learned, all with gradients, and the gradient of the rows."""

    case: Case
    kv_score: torch.Tensor
    weights: CompressorWeights
    rope: RopeTable
    batch: RaggedBatch
    given: torch.Tensor

    @classmethod
    def make(cls, case: Case, device: str = "cpu") -> Problem:
        """The inputs of the bench's cases."""
        inputs, spec = make_inputs(case, device), case.spec
        gen = torch.Generator(device).manual_seed(1)
        return cls(
            case=case,
            kv_score=inputs.new[0].clone().requires_grad_(),
            weights=CompressorWeights(
                norm=inputs.norm.clone().requires_grad_(), ape=inputs.ape.clone().requires_grad_()
            ),
            rope=RopeTable.build(CONFIG, case.tokens, device=device),
            batch=RaggedBatch.build(torch.tensor([0, case.tokens], device=device), start_positions=[0]),
            given=torch.randn(case.windows, spec.head_dim, generator=gen, device=device),
        )

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What has gradients."""
        assert self.weights.ape is not None
        return [self.kv_score, self.weights.ape, self.weights.norm]

    def step(self, run: Callable[[Problem], torch.Tensor]) -> list[torch.Tensor]:
        """Rows and the gradients of the leaves."""
        out = run(self)
        return [out.detach(), *torch.autograd.grad(out, self.leaves, self.given)]


def ours(problem: Problem) -> torch.Tensor:
    """Rows by ``kvcondense.training``, in the fp32 chain."""
    spec = replace(problem.case.spec, rounding=Rounding.FUSED)
    return training.condense(spec, problem.kv_score, problem.weights, problem.rope, problem.batch).values


def eager(problem: Problem) -> torch.Tensor:
    """Rows by torch operations, as models are written: candidates [windows, W, d], a softmax over them, a sum."""
    spec, ape = replace(problem.case.spec, rounding=Rounding.FUSED), problem.weights.ape
    assert ape is not None
    r, d, count = spec.ratio, spec.head_dim, problem.case.windows
    kv, z = problem.kv_score[: count * r].view(count, r, -1).split(spec.width, dim=-1)  # [windows, r, N]
    z = z + ape
    if spec.overlap:
        kv = torch.cat([torch.nn.functional.pad(kv[:-1, :, :d], (0, 0, 0, 0, 1, 0)), kv[..., d:]], dim=1)
        none = torch.nn.functional.pad(z[:-1, :, :d], (0, 0, 0, 0, 1, 0), value=float("-inf"))
        z = torch.cat([none, z[..., d:]], dim=1)
    pooled = (kv * torch.softmax(z, dim=1)).sum(dim=1)
    position = torch.arange(count, device=kv.device) * r
    return rows.by_autograd(spec, pooled, problem.weights.norm, problem.rope, position)


def saved_bytes(run: Callable[[Problem], torch.Tensor], problem: Problem) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside its inputs."""
    inputs = {t.untyped_storage().data_ptr() for t in problem.leaves}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(problem)
    del out
    return sum(kept.values())


def run_case(
    case: Case, rates: measure.Rates, say: Callable[[str], None], *, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Records: both ways, warm, forward and backward together, after rows and gradients were compared."""
    problem = Problem.make(case, device)
    expected, found = problem.step(eager), problem.step(ours)
    worst = max(_off(a, b) for a, b in zip(found, expected, strict=True))
    if worst > CLOSE:
        say(f"{case.name}: ours is not timed, a gradient is off by {worst:.3g} of its RMS")
        yield {"case": case.name, "runner": "kvcondense.training", "wrong": worst}
        return
    ways = {"kvcondense.training": ours, "eager autograd": eager}
    works = [measure.Work(lambda: None, lambda _, r=run: problem.step(r)) for run in ways.values()]
    rates = rates.now() if device == "cpu" else rates
    floor = rates.floor(replace(case, tokens=3 * case.tokens), cold=True)  # read forward and backward, written once
    times = (measure if device == "cpu" else gpu).interleaved(works, cold=False)
    for (name, run), seconds in zip(ways.items(), times, strict=True):
        yield {
            "case": case.name,
            "runner": name,
            "cache": "warm",
            "us": round(1e6 * measure.median(seconds), 2),
            "floor_us": round(1e6 * floor, 2),
            "rounds": len(seconds),
            "off_by_rms": worst,
            "saved_bytes": saved_bytes(run, problem),
            "note": "pool, norm, RoPE, Hadamard, forward and backward",
        }


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.square().mean().sqrt())
