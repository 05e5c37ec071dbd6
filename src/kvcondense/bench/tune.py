"""An architecture's part of the tuning table, measured: tilings as graphs, their bits compared, the fastest kept."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.triton import TritonBackend, tuning
from kvcondense.backends.triton.constants import SCALE_PART, small_float_part
from kvcondense.backends.triton.tuning import Choice
from kvcondense.bench import device as gpu
from kvcondense.bench import measure
from kvcondense.bench.cases import FORMAT, Case, make_inputs
from kvcondense.bench.records import Log, Record
from kvcondense.bench.runners import BARE, Kvcondense
from kvcondense.errors import CheckpointError, KvCondenseError
from kvcondense.files.schema import typed
from kvcondense.formats.elements import E2M1

# Up to this many rows (None: any number): requests, tokens of each, where they start; all of them complete windows.
RowClass = tuple[int | None, int, int, int]
Casts = tuple[str, ...]
CLASSES: tuple[RowClass, ...] = ((16, 16, 1, 1023), (128, 128, 1, 1023), (None, 8, 8192, 0))
KINDS = {"hca": FORMAT, "csa": FORMAT, "indexer": "mxfp4_indexer"}
_WARPS = (1, 2, 4, 8, 16)
_WINDOWS = (1, 2, 4)
"""Of a program that has all channels of each."""
_LEAST_BLOCK, _MOST_ELEMENTS = 16, 1 << 14
_THREADS = 32
_PER_THREAD = (2, 64)
"""Elements of a tile that a thread may hold: fewer leave threads idle, more spill."""
_GAIN = 0.98
"""A tiling takes the place of the table's if it needs at most this part of its time: smaller gains are noise."""
_CAST_BLOCK, _CAST_PROGRAMS = 1024, 1 << 20
_PARTS = {"bf16": None, "e4m3": SCALE_PART, "e2m1": small_float_part(E2M1)}
"""What ``cast_kernel`` encodes, by the names of ``tuning.CASTS``."""


@dataclass(frozen=True)
class Timed:
    """A tiling of one class of steps. seconds: median with cold caches; None if bits differ or it raised."""

    kind: str
    rows: int | None
    choice: Choice
    seconds: float | None
    error: str | None = None

    def as_dict(self) -> Record:
        """For JSON."""
        us = None if self.seconds is None else round(1e6 * self.seconds, 3)
        block, warps = self.choice.block, self.choice.num_warps
        record = {"kind": self.kind, "rows": self.rows, "block": block, "num_warps": warps}
        record |= {"windows": self.choice.windows, "us": us}
        return record if self.error is None else {**record, "error": self.error}

    @classmethod
    def from_dict(cls, record: Record) -> Timed:
        """Of ``as_dict``'s."""
        seconds = None if record["us"] is None else record["us"] / 1e6
        choice = Choice(record["block"], record["num_warps"], windows=record.get("windows", 1))
        return cls(record["kind"], record["rows"], choice, seconds, record.get("error"))


@dataclass
class _Record:
    """``Timed.as_dict`` as a file has it."""

    kind: str
    rows: int | None
    block: int
    num_warps: int
    us: float | None
    windows: int = 1
    error: str | None = None


def check_record(record: Record, name: str) -> None:
    """Raise CheckpointError for a tiling's record that ``Timed.from_dict`` cannot take."""
    if record.keys() & {"kind", "us", "block"}:
        about = typed(record, _Record, name)
        for key in ("us", "block", "num_warps", "windows", "rows"):
            value = getattr(about, key)
            if value is not None and not 0 < value < 1e18:
                raise CheckpointError(f"{name} {key}", "a number above 0", record[key])
        for key in ("block", "num_warps", "windows"):  # the table's entries come of them, and kernels of these
            if getattr(about, key).bit_count() != 1:
                raise CheckpointError(f"{name} {key}", "a power of two", record[key])


def candidates(case: Case, now: Choice) -> list[Choice]:
    """Tilings that are worth a try, the table's first."""
    spec = case.spec
    padded = 1 << (spec.window - 1).bit_length()
    found = [now]
    block = _LEAST_BLOCK
    while block <= spec.head_dim and block * padded <= _MOST_ELEMENTS:
        several = block == spec.head_dim and case.tokens >= spec.window  # else none is pooled with others
        for warps, windows in itertools.product(_WARPS, _WINDOWS if several else (1,)):
            if _PER_THREAD[0] <= windows * block * padded / (_THREADS * warps) <= _PER_THREAD[1]:
                found.append(replace(now, block=block, num_warps=warps, windows=windows))
        block *= 2
    return list(dict.fromkeys(found))


def case_of(kind: str, row_class: RowClass) -> Case:
    """The step that stands for a class."""
    rows, batch, tokens, start = row_class
    return Case(f"{kind}, at most {rows or 'any number of'} rows", kind, tokens, batch, start, format=KINDS[kind])


def _step(case: Case, device: str) -> Step:
    return Kvcondense(make_inputs(case, device), "triton", BARE).primed()["step"]


def _choices(case: Case, step: Step, casts: Casts) -> tuple[Choice, list[Choice]]:
    """The table's choice, and what is tried."""
    now = tuning.choose(step.rows.device, case.spec, step.plan.num_windows)
    return now, candidates(case, replace(now, casts=casts))


def compile_tiling(kind: str, row_class: RowClass, device: str, casts: Casts, number: int) -> None:
    """Run one tiling of a class once: in a process of its own, for the machine code that it leaves on disk."""
    case = case_of(kind, row_class)
    step = _step(case, device)
    TritonBackend(choice=_choices(case, step, casts)[1][number]).run(step)
    torch.cuda.synchronize()


def time_class(
    kind: str, row_class: RowClass, device: str, casts: Casts, ahead: Callable[..., None] | None = None
) -> list[Timed]:
    """Every tiling of one kind and class; the table's first. ``ahead``: compiles this many of a class beforehand."""
    rows, case = row_class[0], case_of(kind, row_class)
    step = _step(case, device)
    now, choices = _choices(case, step, casts)
    if ahead is not None:
        ahead(kind, row_class, len(choices))
    right = _outputs(step, TritonBackend(choice=now))  # as the table has it now, before casts that may be new
    works, wrong = [], {}
    for choice in choices:
        backend = TritonBackend(choice=choice)
        try:
            same = all(torch.equal(a, b) for a, b in zip(right, _outputs(step, backend), strict=True))
        except Exception as error:  # a tiling may take more than the chip has
            wrong[choice] = Timed(kind, rows, choice, None, f"{type(error).__name__}: {error}")
            continue
        if same:
            works.append(measure.Work(lambda: step, backend.run, capturable=True))
        else:
            wrong[choice] = Timed(kind, rows, choice, None)
    medians = iter([measure.median(t) for t in gpu.interleaved(works, cold=True)])
    return [wrong[c] if c in wrong else Timed(kind, rows, c, next(medians)) for c in choices]


def _outputs(step: Step, backend: TritonBackend) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and the cache's bytes, in memory that held something else."""
    assert step.cache is not None
    step.rows.fill_(float("nan"))
    step.cache.data.fill_(0xA5)
    backend.run(step)
    return step.rows.clone(), step.cache.data.clone()


@contextlib.contextmanager
def compiling_ahead(device: str, casts: Casts, jobs: int) -> Iterator[Callable[..., None] | None]:
    """Processes that compile a class's tilings side by side; idle while it is timed. One job needs none.

    What fails there fails again, and is seen, where the tiling is timed.
    """
    if jobs == 1:
        yield None
        return
    executor = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def ahead(kind: str, row_class: RowClass, count: int) -> None:
        with contextlib.suppress(BrokenProcessPool):
            for future in [executor.submit(compile_tiling, kind, row_class, device, casts, i) for i in range(count)]:
                future.exception()

    try:
        yield ahead
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def best(timed: list[Timed]) -> Timed:
    """The fastest, or the table's unless something is clearly faster."""
    right = [t for t in timed if t.seconds is not None]
    if not right:
        raise KvCondenseError("tilings", "one that gives the bits of the table's own", f"none of {len(timed)}")
    fastest = min(right, key=lambda t: t.seconds or 0.0)
    current = timed[0]
    if current.seconds is not None and (fastest.seconds or 0.0) > _GAIN * current.seconds:
        return current
    return fastest


@dataclass(frozen=True)
class Limits:
    """seconds: no class is begun that would, by the longest so far, end later; jobs: processes that compile."""

    seconds: float = float("inf")
    jobs: int = 1


def tune(log: Log, casts: Casts, kinds: list[str], say: Callable[[str], None], limits: Limits = Limits()) -> None:
    """Add the timings of classes that ``log`` has not, a class complete at a time."""
    begun, longest, device = time.monotonic(), 0.0, gpu.home()
    with compiling_ahead(device, casts, limits.jobs) as ahead:
        for kind in kinds:
            for row_class in CLASSES:
                name = case_of(kind, row_class).name
                before = time.monotonic()
                if name in log.complete:
                    say(f"{name}: in the file already")
                elif before - begun + longest > limits.seconds:
                    say(f"{name}: not timed, {limits.seconds - (before - begun):.0f} s are left")
                else:
                    timed = time_class(kind, row_class, device, casts, ahead)
                    for one in timed:
                        log.add(one.as_dict())
                    log.finish(name)
                    say(f"{name}: {_line(timed)}")
                    longest = max(longest, time.monotonic() - before)


def _line(timed: list[Timed]) -> str:
    chosen = best(timed)
    choice = chosen.choice
    now, then = (1e6 * (t.seconds or float("nan")) for t in (chosen, timed[0]))
    return (
        f"{choice.block} channels, {choice.num_warps} warps, windows of a program: {choice.windows}; "
        f"{now:.2f} us (before: {then:.2f} us); "
        f"{len(timed)} tried, {sum(t.seconds is None for t in timed)} wrong"
    )


def part_of(log: Log, casts: Casts, facts: Record) -> tuple[str, dict[str, Any] | None]:
    """(architecture, its part of the table); None if no compressor has timings of all its classes.

    Entries of compressors that have not stay as they are.
    """
    arch = tuning.architecture(torch.device(gpu.home()))
    table = tuning.table()
    old = table.get(arch, table[tuning.ANY])
    timings = [Timed.from_dict(r) for r in log.records if "block" in r]
    whole = [kind for kind in KINDS if all(case_of(kind, c).name in log.complete for c in CLASSES)]
    entries = []
    for kind in whole:
        spec = Case("", kind, 1, 1, 0).spec
        for rows in (c[0] for c in CLASSES):
            chosen = best([t for t in timings if (t.kind, t.rows) == (kind, rows)]).choice
            entries.append([spec.ratio, spec.head_dim, rows, chosen.block, chosen.num_warps, chosen.windows])
    if not whole:
        return arch, None
    new = {(e[0], e[1]) for e in entries}
    entries += [e for e in old["entries"] if (e[0], e[1]) not in new]
    what = "" if len(whole) == len(KINDS) else f"{', '.join(whole)}: "
    where = f"{facts['device']}, {facts['toolkit']}, triton {facts['triton']}, commit {facts['commit']}"
    return arch, {**old, "source": f"{what}measured on {where}", "hardware_casts": list(casts), "entries": entries}


def exact_casts(device: str) -> Casts:
    """Those of ``tuning.CASTS`` that ``cast_is_exact`` says yes to."""
    return tuple(name for name in tuning.CASTS if cast_is_exact(name, device))


def cast_is_exact(name: str, device: str, spans: Callable[[], Iterator[tuple[int, int]]] | None = None) -> bool:
    """True if the chip's cast to ``name`` gives every one of the 2^32 floats what integer arithmetic does.

    False where it does not, or cannot be compiled. ``spans``: (first, programs) of other sets of floats.
    """
    from kvcondense.bench import kernels

    kernel: Any = kernels.cast_kernel

    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        for first, programs in (spans or _all_floats)():
            kernel[(programs,)](first, wrong, _PARTS[name], _CAST_BLOCK)
            if int(wrong):
                return False
    except Exception:  # whatever a compiler raises: this chip has no such cast
        return False
    return True


def _all_floats() -> Iterator[tuple[int, int]]:
    step = _CAST_BLOCK * _CAST_PROGRAMS
    yield from ((first, _CAST_PROGRAMS) for first in range(0, 1 << 32, step))
