"""What the backend can launch for DeepSeek-V4's compressors: every such step, made small, and what it launches.

``variants`` has every entry of the tuning table, every state, every cache format, every type of tokens, and two windows
of a program; ``launches`` takes the step of one, so that what is compiled ahead is what a step asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.triton import TritonBackend, decode, fused, tuning
from kvcondense.backends.triton.launches import Launch, recorded
from kvcondense.backends.triton.planning import StaticPlanner
from kvcondense.config import ModelConfig
from kvcondense.errors import UnsupportedError
from kvcondense.formats import FORMATS
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.extremes import Bounds
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding

_MAIN = {"csa": "fp8_model1", "hca": "fp8_model1", "indexer": "mxfp4_indexer", "r2": "fp4_v41", "r1": "fp4_v41"}
_HIDDEN, _TOKENS, _STATE_PAGE, _LOG_ROWS = 4096, 2, 32, 8
_SHORT = 8
"""Tokens of windows of which a program may take several."""
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """One step: which compressor, kind of state, types of tokens and state ("" for none), format and rows.

    state: ring, paged, online, "apart" (a ring of kv and one of scores), or "filled" (pages that others have filled).

    form: "step", or from hidden states: "tiles", "decode", "together" (decode with the indexer's step) or "project",
    which is no step; or "plan", static plans, whose kernel serves all compressors. drafts: of a step, which rings have
    rows for; page_rows: of the cache; windows: of a program, None as the table has it. spec, beside: the compressor if
    it is not the one of that kind in ``specs``, and the variant whose step shares the launch.
    """

    kind: str
    state: str = "ring"
    tokens: str = "fp32"
    state_type: str = "fp32"
    format: str = ""
    rows: int = 16
    latent: bool = False
    rounding: Rounding = Rounding.REFERENCE
    form: str = "step"
    drafts: int = 2
    page_rows: int = 64
    windows: int | None = None
    spec: CompressorSpec | None = None
    beside: Variant | None = None

    @property
    def compressor(self) -> CompressorSpec:
        """The spec, with the variant's rounding."""
        return replace(self.spec or specs()[self.kind], rounding=self.rounding)

    def choice(self, arch: str) -> tuning.Choice:
        """The tiling of its step, if it does not multiply: the table's, but for the variant's windows of a program."""
        spec = self.compressor
        found = tuning.choose_for(arch, spec.ratio, spec.window, spec.head_dim, self.rows)
        return found if self.windows is None else replace(found, windows=self.windows)

    @property
    def multiplies(self) -> bool:
        """True if its kernels project."""
        return self.form not in ("step", "plan")

    @property
    def name(self) -> str:
        """Short and unique."""
        if self.form == "plan":
            return self.form
        if self.multiplies:
            return "-".join((self.kind, self.form, self.state or "stateless", self.state_type, self.format or "rows"))
        extra = ("latent",) * self.latent + (self.rounding.value,) * (self.rounding is Rounding.FUSED)
        extra += () if self.windows is None else (f"{self.windows}windows",)
        types = dict.fromkeys((self.tokens, self.state_type))  # once, if they are one
        return "-".join(
            (self.kind, self.state or "stateless", *types, f"{self.rows}rows", self.format or "rows", *extra)
        )


PLAN = Variant("hca", "", form="plan")
_STATELESS = ("plan", "project")


@functools.cache
def specs() -> dict[str, CompressorSpec]:
    """The compressors that are compiled."""
    flash, v41 = ModelConfig.FLASH, ModelConfig.V41_FLASH
    return {
        "hca": CompressorSpec.hca(flash),
        "csa": CompressorSpec.csa(flash),
        "indexer": CompressorSpec.indexer(flash),
        "r2": CompressorSpec.for_layer(v41, 2),
        "r1": CompressorSpec.for_layer(v41, 20),
    }


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every entry of the tuning table with each state, then every format, type and profile."""
    return tuple(dict.fromkeys(_variants()))


def few(arch: str) -> tuple[Variant, ...]:
    """One of each form and state on sm_90, elsewhere of each form with a ring for V4's main compressors; of programs
    with several windows, too.

    Minutes, not hours.
    """
    found = {(v.kind, v.form, v.state, v.windows, v.multiplies and v.state_type): v for v in reversed(variants())}
    if arch != "sm_90":
        near = [v for v in found.values() if v.kind in ("hca", "csa") and (v.state == "ring" or v.form in _STATELESS)]
        found = {(v.kind, v.form, v.windows): v for v in near}
    return tuple(v for v in variants() if v in found.values())


def _variants() -> Iterator[Variant]:
    kinds = specs()
    for kind, spec in kinds.items():
        main = _MAIN[kind]
        for rows in row_classes(spec):
            for state in ("ring", "paged", "") + (() if spec.overlap else ("online",)):
                yield Variant(kind, state, format=main, rows=rows)
        for form in FORMATS.values():
            if _fits(form, spec):
                yield Variant(kind, format=form.name)
        yield Variant(kind, latent=True, format="bf16", rounding=Rounding.FUSED)
        for tokens in ("bf16", "fp16"):
            yield Variant(kind, tokens=tokens, state_type="bf16", format="bf16")
        yield Variant(kind)
        yield Variant(kind, "filled", format=main)
        if spec.has_gate:
            yield Variant(kind, "apart", format=main)
        if spec.window <= _SHORT:
            yield Variant(kind, format=main, windows=2)
        for state, state_type in (("", "fp32"), ("ring", "fp32"), ("ring", "bf16"), ("paged", "fp32")):
            for form in ("tiles", "decode"):
                yield Variant(kind, state, "bf16", state_type, main, form=form)
                if spec.has_gate and state == "ring":
                    yield Variant(kind, "apart", "bf16", state_type, main, form=form)
            if kind == "csa":
                beside = Variant("indexer", state, "bf16", state_type, _MAIN["indexer"])
                yield Variant(kind, state, "bf16", state_type, main, form="together", beside=beside)
        yield Variant(kind, "", "bf16", form="project")
    yield PLAN


def of_model(
    compressors: dict[str, CompressorSpec], formats: tuple[str, str], state: str, drafts: int, page_tokens: int
) -> list[Variant]:
    """Steps of a model: unfused, in tiles, and in one launch, a CSA layer's two compressors together as well as alone;
    and their static plans.

    compressors: by a name in which the indexer's is "indexer"; formats: of main rows and of indexer keys; state: ring,
    paged, or online where windows do not overlap; page_tokens: of a page of the cache.
    """
    found, indexer = [], None
    for kind in sorted(compressors, key=lambda name: name != "indexer"):
        spec, form = compressors[kind], formats[kind == "indexer"]
        rows = max(1, page_tokens // spec.ratio)
        held = "ring" if state == "online" and spec.overlap else state
        one = Variant(kind, held, format=form, drafts=drafts, page_rows=rows, spec=spec)
        found += [replace(one, rows=most) for most in row_classes(spec)]
        small = replace(one, tokens="bf16", form="decode")
        if held != "online":
            found += [replace(small, form="tiles"), small]
        if kind == "indexer":
            indexer = small
        elif indexer is not None and spec.ratio == indexer.compressor.ratio and held != "online":
            found.append(replace(small, form="together", beside=indexer))
        found.append(replace(small, state="", format="", form="project"))
    return [*found, PLAN]


def _fits(form: Any, spec: CompressorSpec) -> bool:
    try:
        form.check(spec.head_dim, spec.rope_dim)
    except UnsupportedError:
        return False
    return True


@functools.cache
def row_classes(spec: CompressorSpec) -> tuple[int, ...]:
    """A number of rows for every entry that the tuning table has for this compressor, on any architecture."""
    found = {1 << 20}
    for part in tuning.table().values():
        found |= {e[2] for e in part["entries"] if (e[0], e[1]) == (spec.ratio, spec.head_dim) and e[2] is not None}
    return tuple(sorted(found))


def launches(variant: Variant, arch: str) -> list[Launch]:
    """What a step of this variant launches on a device of architecture ``arch``; nothing runs."""
    with recorded(arch) as found:
        _launch(variant, arch)
    return found


def _launch(variant: Variant, arch: str) -> None:
    spec = variant.compressor
    if variant.form == "plan":
        batch = RaggedBatch.build([0, _TOKENS], start_positions=[0])
        planner = StaticPlanner.of([(spec, None, None)], batch, Bounds(_TOKENS, _TOKENS, 0, None), [None])
        assert planner is not None
        planner.fill()
        return
    x = torch.zeros(_TOKENS, _HIDDEN, dtype=torch.bfloat16)
    if variant.form == "project":
        fused.project(x, _weight(spec), False)
    elif variant.form == "tiles":
        fused.run(_step(variant), x, _weight(spec))
    elif variant.form == "step":
        TritonBackend(choice=variant.choice(arch)).run(_step(variant))
    else:
        steps = [_step(v) for v in (variant, variant.beside) if v is not None]
        decode.run(steps, x, [_weight(step.spec) for step in steps])


def _weight(spec: CompressorSpec) -> torch.Tensor:
    return torch.zeros(spec.projected, _HIDDEN, dtype=torch.bfloat16)


def state_of(variant: Variant, requests: int, tokens: int, device: str = "cpu") -> StatePool | OnlineState | None:
    """An empty state of the variant's kind for so many requests of at most ``tokens`` tokens each."""
    spec, dtype = variant.compressor, _TYPES[variant.state_type]
    pages, ring_rows = requests * _pages(tokens), spec.required_ring_rows(variant.drafts)
    if variant.state == "online":
        return OnlineState.allocate(spec, requests, _LOG_ROWS, device=device)
    if variant.state == "paged":
        return StatePool.paged(spec, pages, _STATE_PAGE, dtype=dtype, device=device)
    if variant.state == "filled":
        rows = torch.zeros(pages, _STATE_PAGE, spec.state_dim, dtype=dtype, device=device)
        return StatePool.wrap(rows, paged=True, keep_all=True)
    if variant.state == "ring":
        return StatePool.ring(spec, requests, ring_rows, dtype=dtype, device=device)
    if variant.state == "apart":
        kv, score = torch.zeros(2, requests, ring_rows, spec.width, dtype=dtype, device=device)
        return StatePool.wrap(kv, score=score, paged=False)
    assert not variant.state, variant.state
    return None


def places(variant: Variant, requests: int, tokens: int, device: str = "cpu") -> dict[str, Any]:
    """Where a batch's requests live in ``state_of`` the same: arguments of ``RaggedBatch.build``."""
    if variant.state in ("paged", "filled"):
        table = torch.arange(requests * _pages(tokens), device=device)
        return {"state_block_table": table.view(requests, -1)}
    return {"state_slots": list(range(requests))} if variant.state else {}


def _pages(tokens: int) -> int:
    return -(-tokens // _STATE_PAGE)


def _step(variant: Variant) -> Step:
    """One request brings the token that ends its third window, and the next one."""
    spec = variant.compressor
    tokens = 3 * spec.ratio + 1
    state = state_of(variant, 1, tokens)
    cache = None
    if variant.format:
        scale = 1.0 if FORMATS[variant.format].tensor_scale else None
        cache = PagedCache.allocate(spec.head_dim, 1, variant.page_rows, format=variant.format, tensor_scale=scale)
    where = places(variant, 1, tokens)
    batch = RaggedBatch.build([0, _TOKENS], start_positions=[tokens - _TOKENS], slot_mapping=[0, 1], **where)
    plan = Plan.build(spec, batch, state_layout=None if state is None else state.layout, page_rows=variant.page_rows)
    rows = torch.zeros(plan.num_windows, spec.head_dim)
    return Step(
        spec=spec,
        plan=plan,
        kv_score=torch.zeros(_TOKENS, spec.projected, dtype=_TYPES[variant.tokens]),
        ape=torch.zeros(spec.ratio, spec.width) if spec.has_ape else None,
        gamma=torch.zeros(spec.head_dim),
        rope=RopeTable(torch.zeros(1, spec.rope_dim // 2), torch.zeros(1, spec.rope_dim // 2)),
        state=state,
        cache=cache,
        rows=rows,
        latent=torch.zeros_like(rows) if variant.latent else None,
        stored=variant.state == "filled",
    )
