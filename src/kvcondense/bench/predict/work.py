"""What a case launches on an architecture: kernels, their programs, how often their code runs, and what they move.

A step from x has several forms (``forms_of``); how windows and kept rows are cut is read from what the kernels are
compiled for. Bytes of memory are those that a kernel must read or write once. Bytes of the last cache are what all its
programs ask for together: each reads anew what others have read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from kvcondense.backends.triton import decode, fused, tuning
from kvcondense.backends.triton.constants import Constants
from kvcondense.backends.triton.launches import Launch
from kvcondense.backends.triton.variants import Variant, launches, row_classes
from kvcondense.bench.cases import PAGE_ROWS, Case
from kvcondense.bench.fused import Layer
from kvcondense.bench.predict.flow import Runs
from kvcondense.bench.predict.machines import MACHINES
from kvcondense.layout.addresses import RingLayout
from kvcondense.layout.plan import Plan
from kvcondense.planning import Planner

ONE_LAUNCH, TILES, LIBRARY, OWN, STEP = "one launch", "tiles", "library, step", "product, step", "step"
PRODUCT = "library product"
_BF16, _FP32 = 2, 4
_POOLING, _KEEPING = ("one_window", "first_tokens", "together", "one_by_one"), ("keep_at", "keep")
"""Functions of the step's programs for windows, and for kept rows."""


@dataclass(frozen=True)
class Kernel:
    """One launch. variant, launch: what is compiled, None for the vendor's library, whose code is not looked at.

    programs; runs: how often code runs in the mean over them; ways: what single programs may run, of which the slowest
    counts; memory, cache: bytes; flops: of products, with the rows that a tile has more than there are tokens.
    """

    name: str
    variant: Variant | None
    launch: Launch | None
    programs: int
    memory: float
    cache: float
    flops: float = 0.0
    runs: Runs = field(default_factory=Runs)
    ways: tuple[Runs, ...] = ()


@dataclass(frozen=True)
class Part:
    """A compressor's share of a layer: its case and the plan of its step."""

    case: Case
    plan: Plan

    @property
    def windows(self) -> int:
        return self.plan.num_windows

    @property
    def kept(self) -> int:
        return self.plan.keep_token.shape[0]

    @property
    def tokens(self) -> int:
        return self.case.batch * self.case.tokens

    @property
    def row_bytes(self) -> int:
        """Of the rows that a step returns, fp32."""
        return _FP32 * self.windows * self.case.spec.head_dim

    @property
    def drafts_bytes(self) -> int:
        """Of kept rows beyond those that ``Case.bytes`` counts: a step whose tokens are drafts keeps all of them."""
        return self.kept * self.case.row_bytes - self.case.kept_bytes

    def step_bytes(self) -> int:
        """Of a step, from x or kv_score as the case is: ``Case.bytes``, rows, and drafts."""
        return self.case.bytes + self.row_bytes + self.drafts_bytes

    def of_windows(self) -> dict[str, float]:
        """How often parts of ``pool`` run: of all windows those whose tokens are all this step's, and of the others
        those that read the state.
        """
        whole = self.whole()
        other = len(whole) - sum(whole)
        share = float(other > 0 and self.case.start > 0)
        found = {"candidates>state_row": share, "candidates>tile": share}
        if whole and not self.case.hidden:
            found |= {"whole_window": sum(whole) / len(whole), "candidates": other / len(whole)}
        return found

    def whole(self) -> list[bool]:
        """Of each window of a request, whether all of its tokens are this step's."""
        case, spec = self.case, self.case.spec
        ends = range(case.start // spec.ratio + 1, (case.start + case.tokens) // spec.ratio + 1)
        return [end * spec.ratio - spec.window >= case.start for end in ends]

    def of_programs(self, each: int) -> tuple[dict[str, float], int]:
        """How often parts of a program for ``each`` windows run, and how many windows are pooled by themselves."""
        every = self.whole() * self.case.batch
        programs = [every[first : first + each] for first in range(0, len(every), each)]
        rest = [windows for windows in programs if len(windows) < each or not all(windows)]
        alone = [window for windows in rest for window in windows]
        share, inside = 1 - len(rest) / len(programs), sum(alone) / max(1, len(alone))
        return {
            "together": share, "one_by_one": 1 - share, "pool_together>whole_window": 1.0,
            "whole_window": inside, "candidates": 1 - inside,
        }, len(alone)  # fmt: skip


def plan_of(case: Case) -> Plan:
    """The plan of a case's step, as the bench runs it: in rings, each request's tokens as drafts once it has begun."""
    spec, batch = case.spec, case.batch
    drafts = case.tokens if case.start else 0
    pages = -(-((case.start + case.tokens) // spec.ratio + 1) // PAGE_ROWS)
    layout = RingLayout(batch, spec.required_ring_rows(drafts))
    return Planner([(spec, layout, PAGE_ROWS)]).step(
        query_start_loc=torch.arange(batch + 1) * case.tokens,
        start_positions=torch.full((batch,), case.start),
        state_slots=torch.arange(batch),
        block_table=torch.arange(batch * pages).view(batch, -1),
        draft_rows=drafts,
    )[1][0]


def forms_of(what: Case | Layer, arch: str) -> tuple[str, ...]:
    """How the backend may do a step on an architecture: first as it does, then, from x, the other ways, the last of
    which is ``batch_invariant``'s.
    """
    parts = _parts(what)
    case, tokens = parts[0].case, parts[0].tokens
    if not case.hidden:
        return (STEP,)
    with tuning.stand_in(arch):
        device = torch.device("cpu")
        one_launch = tuning.decode_programs(device, case.spec.window) is not None and tokens <= decode.TOKENS
        least = tuning.fused_tokens(device)
        library = tuning.library_product(device) and arch.startswith("sm_")
        most = tuning.one_launch_tokens(arch)
    fits = all(p.windows * p.case.spec.ratio <= 2 * p.tokens for p in parts)
    tiles = least is not None and tokens >= least and fits
    there = {ONE_LAUNCH: one_launch, LIBRARY: library, TILES: tiles, OWN: not tiles}
    first = (ONE_LAUNCH, LIBRARY) if most is None or tokens <= most else (LIBRARY, ONE_LAUNCH)
    return tuple(form for form in (*first, TILES, OWN) if there[form])


def work_of(what: Case | Layer, arch: str, form: str) -> list[Kernel]:
    """What a case or a layer launches in one of its forms on an architecture, in order."""
    parts = _parts(what)
    if form == ONE_LAUNCH:
        return [_decode(parts, arch)]
    if form == TILES:
        return [kernel for part in parts for kernel in _tiles(part, arch)]
    product = {LIBRARY: _library, OWN: partial(_product, arch=arch), STEP: None}[form]
    found = [product(part) for part in parts] if product else []
    return [*found, *(kernel for part in parts for kernel in _step(part, arch))]


def _parts(what: Case | Layer) -> list[Part]:
    return [Part(case, plan_of(case)) for case in (what.cases if isinstance(what, Layer) else (what,))]


def _variant(part: Part, form: str) -> Variant:
    """What is compiled for a part. Numbers of rows and of drafts are those of their class: one kernel serves each."""
    case, narrow = part.case, "bf16" if part.case.narrow else "fp32"
    rows = next(most for most in row_classes(case.spec) if part.windows <= most)
    drafts = max(1, case.tokens) if case.start else 1
    tokens = narrow if form == "step" else "bf16"
    return Variant(case.kind, "ring", tokens, narrow, case.format, rows=rows, form=form, drafts=drafts)


def _step(part: Part, arch: str) -> Iterator[Kernel]:
    """The step from kv_score: a launch for windows and kept rows, or one for each where the latter overwrite what
    windows read.
    """
    part = replace(part, case=replace(part.case, hidden=False))
    variant = _variant(part, "step")
    launch = launches(variant, arch)[0]
    c: Constants = launch.constants
    programs = -(-part.windows // c.windows) * c.blocks
    kept = part.kept * part.case.row_bytes
    total = programs + part.kept
    times = {**part.of_windows(), "finish#2": 1 / c.blocks, "needs_of#3": 1 / c.blocks}
    apes = programs
    if c.windows > 1 and programs:
        more, alone = part.of_programs(c.windows)
        times, apes = times | more, alone + programs * more["together"]
    ape = apes * c.window * c.block * _FP32 if c.has_ape else 0
    run = Runs(times | dict.fromkeys(_KEEPING, 0.0), {"one_by_one": c.windows})
    keep = Runs(times | dict.fromkeys(_POOLING, 0.0))
    if part.plan.overwrites or not (programs and part.kept):
        memory = part.step_bytes() - kept
        if programs:
            yield Kernel("windows", variant, launch, programs, memory, memory + ape, 0.0, run, (run,))
        if part.kept:
            bytes_ = kept + (kept if programs else part.step_bytes() - kept)
            yield Kernel("kept rows", variant, launch, part.kept, bytes_, bytes_, 0.0, keep, (keep,))
        return
    memory = part.step_bytes()
    mean = _mean((programs, part.kept), (run, keep))
    yield Kernel("step", variant, launch, total, memory, memory + ape, 0.0, mean, (run, keep))


def _library(part: Part) -> Kernel:
    """The vendor's product."""
    case, tokens, projected = part.case, part.tokens, part.case.spec.projected
    memory = _BF16 * case.config.hidden_size * (tokens + projected) + _FP32 * tokens * projected
    return Kernel(PRODUCT, None, None, 0, memory, memory, case.flops)


def _product(part: Part, arch: str) -> Kernel:
    """The backend's own product."""
    variant = _variant(part, "project")
    launch = launches(replace(variant, state="", format=""), arch)[0]
    c: Constants = launch.constants
    columns, hidden = part.case.spec.projected, part.case.config.hidden_size
    tiles = -(-part.tokens // fused.TILE)
    programs = tiles * (columns // c.block)
    memory = _BF16 * hidden * (part.tokens + columns) + _FP32 * part.tokens * columns
    asked = programs * _BF16 * hidden * (fused.TILE + c.block) + _FP32 * part.tokens * columns
    runs = _loop(hidden, arch, True, {})
    flops = 2.0 * programs * fused.TILE * hidden * c.block
    return Kernel("product", variant, launch, programs, memory, asked, flops, runs, (runs,))


def _loop(hidden: int, arch: str, near: bool, times: Mapping[str, float]) -> Runs:
    """Of a program that multiplies. near: its tokens lie side by side, and a descriptor copies them if there is any."""
    ways = ("accumulate#1", "accumulate#2")  # by descriptor, by pointers
    way = {ways[near]: 0.0} if tuning.boxes(arch) else {}
    return Runs({**way, **times}, {"accumulate": hidden / fused.DEPTH})


def _tiles(part: Part, arch: str) -> Iterator[Kernel]:
    """Windows and kept rows in tiles that multiply, in a launch or one for each, and the launch that finishes rows."""
    variant = _variant(part, "tiles")
    kernel, finish = launches(variant, arch)
    c: Constants = kernel.constants
    case, hidden = part.case, part.case.config.hidden_size
    columns = (4 if c.window > c.ratio else 2) * c.block
    pool = _loop(hidden, arch, True, {"keep_tile": 0.0, "tokens_of>with_state": float(case.start > 0)})
    nothing = {"tokens_of": 0.0, "pooled_alone": 0.0, "pooled_with": 0.0, "moved": 0.0}
    keep = _loop(hidden, arch, case.batch == 1, nothing)
    ways = [
        ("tiles", part.windows / fused.windows_per_tile(case.spec), part.row_bytes, pool),
        ("kept rows", part.kept / fused.TILE, part.kept * case.row_bytes, keep),
    ]
    ways = [way for way in ways if way[1]]
    asked, flops = _BF16 * hidden * (fused.TILE + columns), 2.0 * fused.TILE * hidden * columns
    for launch in [[way] for way in ways] if part.plan.overwrites else [ways] if ways else []:
        counts = [math.ceil(tiles) * c.blocks for _, tiles, _, _ in launch]
        programs, written = sum(counts), sum(bytes_ for _, _, bytes_, _ in launch)
        runs = [runs for _, _, _, runs in launch]
        memory = case.bytes - case.kept_bytes - case.cache_bytes + written
        yield Kernel(launch[0][0], variant, kernel, programs, memory, programs * asked + written,
                     programs * flops, _mean(counts, runs), tuple(runs))  # fmt: skip
    if part.windows:
        memory = 2 * part.row_bytes + case.cache_bytes
        yield Kernel("finish", variant, finish, part.windows, memory, memory, 0.0, Runs(), (Runs(),))


def _mean(counts: Sequence[int], runs: Sequence[Runs]) -> Runs:
    """Of programs of several kinds, so many of each; loops of all turn alike."""
    shares = [count / sum(counts) for count in counts]
    names = {name for one in runs for name in one.times}
    times = {name: sum(s * one.times.get(name, 1.0) for s, one in zip(shares, runs, strict=True)) for name in names}
    return Runs(times, runs[0].trips)


def _decode(parts: Sequence[Part], arch: str) -> Kernel:
    """One launch of a layer's one or two compressors: products, a barrier, then windows and kept rows."""
    from kvcondense.backends.triton.kernels.decode import SUMMED

    first, *others = (_variant(part, "decode") for part in parts)
    variant = replace(first, form="together", beside=replace(others[0], form="decode")) if others else first
    launch = launches(variant, arch)[0]
    every: list[Constants] = [_argument(launch, name) for name in ("c", "c_2")[: len(parts)]]
    block, tokens, hidden = _argument(launch, "B"), parts[0].tokens, parts[0].case.config.hidden_size
    span = -(-hidden // (fused.DEPTH * every[0].splits)) * fused.DEPTH
    products = [c.projected // block * c.splits for c in every]
    windows = [part.windows * c.blocks for part, c in zip(parts, every, strict=True)]
    kept = [part.kept for part in parts]
    with tuning.stand_in(arch):
        longest = max(part.case.spec.window for part in parts)
        each = tuning.decode_programs(torch.device("cpu"), longest, len(parts), sum(products))
        resident = (each or 1) * MACHINES[arch].processors
    programs = min(max(sum(products), sum(windows) + sum(kept)), resident)
    x = _BF16 * tokens * hidden
    memory = sum(part.step_bytes() for part in parts) - (len(parts) - 1) * x
    partials = sum(_FP32 * c.splits * tokens * c.projected for c in every)
    weights = sum(part.case.weight_bytes for part in parts)
    summed = sum(_FP32 * tokens * c.projected for c in every)  # written by the last of a block's programs
    asked = memory - x - weights + sum(products) * _BF16 * span * (tokens + block) + 2 * partials + 2 * summed
    flops = 2.0 * sum(products) * decode.TOKENS * span * block
    overwrites = any(part.plan.overwrites for part in parts)
    times = {
        **parts[0].of_windows(), "add_spans": 1 / every[0].splits, "finish#2": 1 / every[0].blocks,
        "needs_of#3": 1 / every[0].blocks,
        "grid_barrier": float(overwrites),
        "prefetch_all": 0.0,  # in the time that a launch takes
    }  # fmt: skip
    trips = {"stream": span / fused.DEPTH, "add_spans": -(-tokens // SUMMED.value)}
    for number, (p, w, k) in enumerate(zip(products, windows, kept, strict=True), 1):
        mark = "" if number == 1 else f"#{number}"
        trips |= {
            f"stream_all{mark}": p / programs,
            f"windows_all{mark}": w / programs,
            f"keeps_all{mark}": k / programs,
        }
    if every[0].holds:  # what the plan has of a program's first window and row is asked for ahead of the barrier
        more, more_kept = (_beyond(sum(items) / programs) for items in (windows, kept))
        times |= {"windows_all>window_at": more, "windows_all>request_at": more, "keeps_all>keep_at": more_kept}
    runs = Runs(times, trips)
    # Items are dealt out as one list: a program with most of one compressor's has fewer of the other's.
    most, marks = -(-sum(products) // programs), [name for name in trips if name.startswith("stream_all")]
    shares = []
    for name, p in zip(marks, products, strict=True):
        mine = -(-p // programs) if len(marks) > 1 else most
        shares.append({**dict.fromkeys(marks, float(most - mine)), name: float(mine)})
    after = [name for name in trips if not name.startswith("stream")]
    if sum(windows) + sum(kept) <= programs:  # each program has one of them at most
        ends = [dict.fromkeys((a for a in after if a != one), 0.0) for one in after]
    else:
        ends = [{}]
    ways = tuple(Runs(times, {**trips, **share, **end}) for share in shares for end in ends)
    return Kernel("one launch", variant, launch, programs, memory, asked, flops, runs, ways)


def _beyond(turns: float) -> float:
    """Of so many turns of a loop, the part that follows the first."""
    return 1 - 1 / turns if turns > 1 else 0.0


def _argument(launch: Launch, name: str) -> Any:
    """A value that the kernel is compiled for."""
    return launch.constexprs[launch.kernel.arg_names.index(name),]


def floor(what: Case | Layer, copy_rate: float, product_rate: float) -> float:
    """Seconds of bytes or of flops alone, whichever take longer."""
    return max(what.bytes / copy_rate, what.flops / product_rate)
