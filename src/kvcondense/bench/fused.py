"""``kvcondense bench --fused``: steps from hidden states, fused and not, beside the product alone and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense.backends import Step, fused_form, get_backend
from kvcondense.backends.triton import decode, tuning
from kvcondense.bench import measure
from kvcondense.bench.cases import CONFIG, Case, Inputs, make_inputs
from kvcondense.bench.run import CLOSE, off, timings
from kvcondense.bench.runners import BARE, Kvcondense, plain_gemm

GEMM = "GEMM alone"
UNFUSED, EACH_UNFUSED = "GEMM + step", "GEMM each + step"
IN_ORDER = "in full order"
Run = Callable[[Sequence[Step], torch.Tensor, Sequence[torch.Tensor]], None]


@dataclass(frozen=True)
class Layer:
    """Compressors that read the same x, which counts once."""

    name: str
    cases: tuple[Case, ...]

    @property
    def bytes(self) -> int:
        """Bytes that must be read or written once."""
        first = self.cases[0]
        x = 2 * first.batch * first.tokens * CONFIG.hidden_size
        return sum(c.bytes for c in self.cases) - (len(self.cases) - 1) * x

    @property
    def flops(self) -> int:
        """Of the projections."""
        return sum(c.flops for c in self.cases)


def _layers() -> Iterator[Layer]:
    for name, kinds in (("HCA", ("hca",)), ("CSA", ("csa",)), ("CSA + indexer", ("csa", "indexer"))):

        def layer(what: str, tokens: int, batch: int, start: int, name: str = name, kinds: Any = kinds) -> Layer:
            formats = {"indexer": "mxfp4_indexer"}
            cases = [Case(what, k, tokens, batch, start, hidden=True) for k in kinds]
            return Layer(f"{name}, {what}", tuple(replace(c, format=formats.get(c.kind, c.format)) for c in cases))

        for batch in (1, 4, 16, 64):
            yield layer(f"decode {batch} within a window", 1, batch, 1000)
            yield layer(f"decode {batch} on a boundary", 1, batch, 1023)
        yield layer("verify 8 x 8 across a boundary", 8, 8, 1019)
        if len(kinds) == 1:
            for tokens in (8192, 65536, 524288):
                yield layer(f"prefill {tokens}", tokens, 1, 0)
            yield layer("prefill 8 x 8192", 8192, 8, 0)


LAYERS = {layer.name: layer for layer in _layers()}


class Steps:
    """A layer's step as a way to run it; state, plan and rows are made once."""

    def __init__(self, name: str, parts: Sequence[Kvcondense], run: Run) -> None:
        self.name, self.parts, self.run = name, parts, run
        self.ws = [part.inputs.w for part in parts]

    def primed(self) -> list[dict[str, Any]]:
        """States that have taken the history."""
        return [part.primed() for part in self.parts]

    def step(self, states: list[dict[str, Any]]) -> None:
        """Take the new tokens: what is timed."""
        self.run([state["step"] for state in states], self.parts[0].new, self.ws)

    def rows(self) -> Iterator[torch.Tensor]:
        """Rows [B, windows, d] of each part: the step's own or, if there are none, those of the tokens that follow."""
        states = self.primed()
        self.step(states)
        for part, state in zip(self.parts, states, strict=True):
            case, rest = part.inputs.case, part.inputs.rest
            if case.windows:
                yield state["step"].rows.view(case.batch, case.windows, -1)
            else:
                yield part.feed({**state, "position": case.start + case.tokens}, rest)


def ways(inputs: Sequence[Inputs]) -> list[Steps]:
    """Fused, even where the table would not, in one launch if that is possible; where kernels start early, the same in
    full order; GEMM and step, of two compressors with a GEMM for both and with one for each; and, for small steps, the
    way that gives a token the same bits in every step.
    """
    backend: Any = get_backend("triton")
    invariant: Any = replace(backend, batch_invariant=True)
    parts = [Kvcondense(i, "triton", BARE) for i in inputs]
    x = parts[0].new
    weight = torch.cat([i.w for i in inputs])  # one GEMM for all
    sizes = [i.w.shape[0] for i in inputs]
    steps = [state["step"] for state in (part.primed() for part in parts)]
    one_launch = all(decode.why_not(step, x, i.w) is None for step, i in zip(steps, inputs, strict=True))
    form = "one launch" if one_launch else _form(invariant, steps, x, inputs)
    found = []
    if form is not None:
        found.append(Steps(f"fused, {form}", parts, lambda s, x, ws: backend.run_fused(form, s, x, ws)))

    def ordered(steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
        with tuning.in_full_order():
            backend.run_fused(form, steps, x, ws)

    if form is not None and tuning.launch_options(x.device):
        found.append(Steps(f"{IN_ORDER}, {form}", parts, ordered))

    def unfused(steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
        del ws
        for step, kv_score in zip(steps, plain_gemm(x, weight).split(sizes, dim=1), strict=True):
            backend.run(replace(step, kv_score=kv_score))

    found.append(Steps(UNFUSED, parts, unfused))

    def each(steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
        for step, w in zip(steps, ws, strict=True):
            backend.run(replace(step, kv_score=plain_gemm(x, w)))

    if len(parts) > 1:  # as the backend does it, to which weights come one by one
        found.append(Steps(EACH_UNFUSED, parts, each))
    if form == "one launch":

        def apart(steps: Sequence[Step], x: torch.Tensor, ws: Sequence[torch.Tensor]) -> None:
            for step, w in zip(steps, ws, strict=True):
                invariant.run(replace(step, kv_score=invariant.project(x, w, None)))

        found.append(Steps("batch-invariant", parts, apart))
    return found


def _form(backend: Any, steps: Sequence[Step], x: torch.Tensor, inputs: Sequence[Inputs]) -> str | None:
    """The form that all of them take, if there is one."""
    taken = {fused_form(backend, step, x, i.w) for step, i in zip(steps, inputs, strict=True)}
    return taken.pop() if len(taken) == 1 else None


def run_layer(
    layer: Layer, rates: measure.Rates, say: Callable[[str], None], *, device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Records of one layer: for each way whose rows are right, and the GEMM alone, warm and cold medians."""
    inputs = [make_inputs(case, device) for case in layer.cases]
    expected = [reference_rows(i) for i in inputs]
    works, notes = [], []
    for way in ways(inputs):
        worst = max(off(rows, right) for rows, right in zip(way.rows(), expected, strict=True))
        if worst > CLOSE:
            say(f"{layer.name}: {way.name} is not timed, its rows are off by {worst:.3g} of their RMS")
            yield {"case": layer.name, "runner": way.name, "wrong": worst}
            continue
        states = way.primed()
        works.append(measure.Work(lambda s=states: s, way.step, capturable=True))
        notes.append({"runner": way.name, "off_by_rms": worst, "note": "project, pool, norm, RoPE, store, state"})
    x, weight = inputs[0].new.flatten(0, 1), torch.cat([i.w for i in inputs])
    works.append(measure.Work(lambda: None, lambda _: plain_gemm(x, weight), capturable=True))
    notes.append({"runner": GEMM, "off_by_rms": None, "note": "no rows; bf16 to fp32"})
    yield from timings(layer, works, notes, rates, device)


def reference_rows(inputs: Inputs) -> torch.Tensor:
    """Rows of the reference for the case's tokens, or those that follow it."""
    runner = Kvcondense(inputs, "reference")
    state = runner.primed()
    rows = runner.feed(state, inputs.new)
    return rows if inputs.case.windows else runner.feed(state, inputs.rest)
