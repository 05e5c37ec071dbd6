"""One step of each form that a kernel can have, beside the reference: does it compile here, and give its rows."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense.api import condense
from kvcondense.backends import Step, get_backend
from kvcondense.backends.triton import TritonBackend, decode, tuning
from kvcondense.backends.triton.variants import Variant, places, state_of, variants
from kvcondense.bench.records import Record
from kvcondense.bench.run import CLOSE, off
from kvcondense.bench.runners import plain_gemm
from kvcondense.config import ModelConfig
from kvcondense.formats import FORMATS
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.weights import CompressorWeights

_HIDDEN, _PAGE_ROWS, _TENSOR_SCALE = 1024, 64, 0.02
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COUNTS = (3, 1, 16)
"""Requests of a step, a row each: 1 and multiples of 16 are compiled apart unless a kernel forbids it."""


@dataclass(frozen=True)
class Form:
    """A variant with a number of requests."""

    variant: Variant
    requests: int

    @property
    def name(self) -> str:
        return f"{self.variant.name} x {self.requests}"


def forms() -> list[Form]:
    """Every variant with three requests; one of each compressor and kernel with the other numbers, too."""
    found = [Form(v, COUNTS[0]) for v in variants() if _finishes_a_row(v)]
    rings = [f.variant for f in found if f.variant.state == "ring" and f.variant.state_type == "fp32"]
    plain = {(v.kind, v.form): v for v in reversed(rings)}  # the first of each
    return found + [Form(v, n) for n in COUNTS[1:] for v in plain.values()]


def _finishes_a_row(v: Variant) -> bool:
    """False of plans, and where a step of few tokens, without a state, ends no window."""
    if v.form == "plan":
        return False
    return bool(v.state) or v.form not in ("decode", "together") or COUNTS[0] * v.compressor.window <= decode.TOKENS


def check(form: Form, device: str) -> Record:
    """How far rows, and what a pool keeps, are from the reference's, in RMS; does the cache hold the rows' bytes?"""
    start = time.perf_counter()
    parts = [form.variant]
    if form.variant.form == "together":
        parts.append(form.variant.beside or replace(form.variant, kind="indexer", format="mxfp4_indexer"))
    jobs = [Job(v, form.requests, device) for v in parts]
    if form.variant.form == "project":
        worst, same = jobs[0].project(), True
    else:
        expected = [job.expected() for job in jobs]
        steps = [job.step() for job in jobs]
        _run(form.variant, steps, jobs)
        worst = max(off(s.rows, right) for s, right in zip(steps, expected, strict=True))
        worst = max(worst, *(job.kept_off() for job in jobs))
        same = all(job.holds(step) for job, step in zip(jobs, steps, strict=True))
    record = {"form": form.name, "off_by_rms": worst, "bytes_equal": same, "right": same and worst < CLOSE}
    return {**record, "seconds": round(time.perf_counter() - start, 2)}


def _run(variant: Variant, steps: list[Step], jobs: list[Job]) -> None:
    backend: Any = get_backend("triton")
    ws = [job.weights.w for job in jobs]
    if variant.form in ("decode", "together"):
        backend.run_fused("one launch", steps, jobs[0].x, ws)
    elif variant.form == "tiles":
        backend.run_fused("tiles", steps, jobs[0].x, ws)
    else:
        TritonBackend(choice=variant.choice(tuning.architecture(steps[0].rows.device))).run(steps[0])


class Job:
    """A compressor with a state that the reference has primed, and the tokens of a step that finishes a row each, or
    so many that programs with several windows find whole ones.
    """

    def __init__(self, variant: Variant, requests: int, device: str) -> None:
        self.variant, self.requests, self.device = variant, requests, device
        spec = self.spec = variant.compressor
        gen = torch.Generator(device).manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=gen, device=device)

        self.weights = CompressorWeights(
            norm=1 + 0.2 * random(spec.head_dim),
            ape=0.1 * random(spec.ratio, spec.width) if spec.has_ape else None,
            w=(random(spec.projected, _HIDDEN) / _HIDDEN**0.5).bfloat16(),
        )
        long = variant.form == "tiles" or variant.windows is not None
        self.start = 0 if not variant.state else spec.window + (0 if long else spec.ratio - 1)
        self.new = spec.window if not variant.state else 2 * (variant.windows or 1) * spec.ratio if long else 1
        self.rope = RopeTable.build(ModelConfig.FLASH, self.start + self.new + spec.ratio, device=device)
        self.history = 1.5 * random(requests * self.start, spec.projected)
        hidden = torch.Generator(device).manual_seed(2)  # main and indexer read the same
        self.x = torch.randn(requests * self.new, _HIDDEN, generator=hidden, device=device).bfloat16()
        self.kv_score = plain_gemm(self.x, self.weights.w)  # type: ignore[arg-type]
        if not variant.multiplies:
            self.kv_score = self.kv_score.to(_TYPES[variant.tokens])
        self.most = self.start + self.new  # tokens of a request
        self.state, self.cache = state_of(variant, requests, self.most, device), self._cache()
        self.kept: StatePool | None = None  # what a pool holds after the reference's step
        if isinstance(self.state, StatePool):  # rows that nobody writes are compared, too
            for part in self.state.memory:
                part.zero_()
        if self.start:
            self._reference(self.history, 0, self.state)

    def _cache(self) -> PagedCache | None:
        name = self.variant.format
        if not name:
            return None
        scale = _TENSOR_SCALE if FORMATS[name].tensor_scale else None
        pages = self.requests * self._pages
        cache = PagedCache.allocate(
            self.spec.head_dim, pages, _PAGE_ROWS, format=name, tensor_scale=scale, device=self.device
        )
        cache.strict = False
        cache.data.fill_(0)
        return cache

    @property
    def _pages(self) -> int:
        return -(-(self.most // self.spec.ratio + 1) // _PAGE_ROWS)

    def _batch(self, start: int, count: int, *, stores: bool = False) -> RaggedBatch:
        requests, device = self.requests, self.device
        where = places(self.variant, requests, self.most, device)
        if stores:
            where["block_table"] = torch.arange(requests * self._pages, device=device).view(requests, -1)
        bounds = torch.arange(requests + 1, device=device) * count
        return RaggedBatch.build(bounds, start_positions=[start] * requests, **where)

    def expected(self) -> torch.Tensor:
        """The reference's rows, from a copy of the state."""
        state = copy.deepcopy(self.state)
        if isinstance(state, StatePool):
            self.kept = state
        return self._reference(self.kv_score, self.start, state)

    def _reference(self, tokens: torch.Tensor, start: int, state: StatePool | OnlineState | None) -> torch.Tensor:
        """The rows of tokens that begin at ``start``, which the state keeps."""
        batch = self._batch(start, tokens.shape[0] // self.requests)
        return condense(self.spec, tokens, self.weights, self.rope, batch, state=state, impl="reference").values

    def step(self) -> Step:
        filled = self.variant.state == "filled"
        if filled:
            self._reference(self.kv_score, self.start, self.state)
        layout = None if self.state is None else self.state.layout
        batch = self._batch(self.start, self.new, stores=self.cache is not None)
        plan = Plan.build(self.spec, batch, state_layout=layout, page_rows=_PAGE_ROWS)
        rows = torch.full((plan.num_windows, self.spec.head_dim), float("nan"), device=self.device)
        latent = torch.empty_like(rows) if self.variant.latent else None
        tokens = self.kv_score[:0].float() if self.variant.multiplies else self.kv_score
        if filled:  # they are in the state: no value of kv_score may matter
            tokens = torch.full_like(tokens, float("nan"))
        w = self.weights
        return Step(
            self.spec, plan, tokens, w.ape, w.norm, self.rope, self.state, self.cache, rows, latent, stored=filled
        )

    def kept_off(self) -> float:
        """How far what the pool holds after the step is from what the reference keeps, in RMS of what it does hold."""
        if self.kept is None:
            return 0.0
        assert isinstance(self.state, StatePool)
        kept, got = (torch.stack([t.float() for t in s.memory]) for s in (self.kept, self.state))
        rms = kept[kept != 0].square().mean().sqrt() if kept.any() else kept.new_ones(())
        return float((got - kept).abs().max() / rms)

    def holds(self, step: Step) -> bool:
        """True if the cache holds the bytes of the step's rows and no others."""
        if self.cache is None:
            return True
        data = self.cache.data.clone()
        self.cache.data.fill_(0)
        self.cache.put(step.plan.window_slot, self.cache.encode(step.rows))
        return torch.equal(data, self.cache.data)

    def project(self) -> float:
        """How far the backend's own projection is from the vendor's, in RMS."""
        w = self.weights.w
        assert w is not None
        return off(TritonBackend(batch_invariant=True).project(self.x, w, None), self.kv_score)
