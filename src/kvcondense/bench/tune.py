"""An architecture's part of the tuning table, measured: tilings as graphs, their bits compared, the fastest kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcondense.backends import Step
from kvcondense.backends.triton import TritonBackend, tuning
from kvcondense.backends.triton.constants import SCALE_PART
from kvcondense.backends.triton.tuning import Choice
from kvcondense.bench import device as gpu
from kvcondense.bench import measure
from kvcondense.bench.cases import FORMAT, Case, make_inputs
from kvcondense.bench.runners import Kvcondense
from kvcondense.errors import KvCondenseError

# Up to this many rows (None: any number): requests, tokens of each, where they start; all of them complete windows.
CLASSES: tuple[tuple[int | None, int, int, int], ...] = ((16, 16, 1, 1023), (128, 128, 1, 1023), (None, 8, 8192, 0))
KINDS = {"hca": FORMAT, "csa": FORMAT, "indexer": "mxfp4_indexer"}
_WARPS = (1, 2, 4, 8, 16)
_LEAST_BLOCK, _MOST_ELEMENTS = 16, 1 << 14
_THREADS = 32
_PER_THREAD = (2, 64)
"""Elements of a tile that a thread may hold: fewer leave threads idle, more spill."""
_GAIN = 0.98
"""A tiling takes the place of the table's if it needs at most this part of its time: smaller gains are noise."""
_CAST_BLOCK, _CAST_PROGRAMS = 1024, 1 << 20


@dataclass(frozen=True)
class Timed:
    """A tiling of one class of steps. seconds: median with cold caches; None if its rows have other bits."""

    kind: str
    rows: int | None
    choice: Choice
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        us = None if self.seconds is None else round(1e6 * self.seconds, 2)
        block, warps = self.choice.block, self.choice.num_warps
        return {"kind": self.kind, "rows": self.rows, "block": block, "num_warps": warps, "us": us}


def candidates(case: Case, now: Choice) -> list[Choice]:
    """Tilings that are worth a try, the table's first."""
    spec = case.spec
    padded = 1 << (spec.window - 1).bit_length()
    found = [now]
    block = _LEAST_BLOCK
    while block <= spec.head_dim and block * padded <= _MOST_ELEMENTS:
        for warps in _WARPS:
            if _PER_THREAD[0] <= block * padded / (_THREADS * warps) <= _PER_THREAD[1]:
                found.append(replace(now, block=block, num_warps=warps))
        block *= 2
    return list(dict.fromkeys(found))


def time_class(kind: str, row_class: tuple[int | None, int, int, int], device: str, cast: bool) -> list[Timed]:
    """Every tiling of one kind and class; the table's first."""
    rows, batch, tokens, start = row_class
    case = Case(f"{kind}, at most {rows} rows", kind, tokens, batch, start, format=KINDS[kind])
    runner = Kvcondense(make_inputs(case, device), "triton", bare=True)
    step: Step = runner.primed()["step"]
    now = tuning.choose(step.rows.device, case.spec, step.plan.num_windows)
    choices = candidates(case, replace(now, hardware_cast=cast))
    assert step.cache is not None
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for choice in [now, *choices]:  # as the table has it now, before a cast that may be new
        step.rows.fill_(float("nan"))
        step.cache.data.fill_(0xA5)
        TritonBackend(choice=choice).run(step)
        seen.append((step.rows.clone(), step.cache.data.clone()))
    equal = [all(torch.equal(a, b) for a, b in zip(seen[0], s, strict=True)) for s in seen[1:]]
    works = [
        measure.Work(lambda: step, TritonBackend(choice=c).run, capturable=True)
        for c, same in zip(choices, equal, strict=True)
        if same
    ]
    medians = iter([measure.median(t) for t in gpu.interleaved(works, cold=True)])
    return [Timed(kind, rows, c, next(medians) if same else None) for c, same in zip(choices, equal, strict=True)]


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


def tune(device: str, kinds: list[str], say: Callable[[str], None]) -> tuple[str, dict[str, Any], list[Timed]]:
    """(architecture, its new part of the table, all timings). Entries of what is not timed stay as they are."""
    arch = tuning.architecture(torch.device(device))
    table = tuning.table()
    old = table.get(arch, table[tuning.ANY])
    cast = cast_is_exact(device)
    say(f"{arch}: the chip's cast to e4m3 {'equals' if cast else 'is not proven equal to'} the integer encoder's codes")
    entries, timings = [], []
    for kind in kinds:
        for row_class in CLASSES:
            timed = time_class(kind, row_class, device, cast)
            timings += timed
            chosen = best(timed)
            spec = Case("", kind, 1, 1, 0).spec
            block, warps = chosen.choice.block, chosen.choice.num_warps
            entries.append([spec.ratio, spec.head_dim, row_class[0], block, warps])
            seconds = [1e6 * (t.seconds or float("nan")) for t in (chosen, timed[0])]
            say(
                f"{kind}, rows {row_class[0] or 'any'}: {block} channels, {warps} warps: {seconds[0]:.2f} us "
                f"(before: {seconds[1]:.2f} us); {len(timed)} tried, {sum(t.seconds is None for t in timed)} wrong"
            )
    new = {(e[0], e[1]) for e in entries}
    entries += [e for e in old["entries"] if (e[0], e[1]) not in new]
    facts = {**measure.machine(), **gpu.machine(device)}
    source = f"measured on {facts['device']}, {facts['toolkit']}, triton {facts['triton']}, commit {facts['commit']}"
    return (
        arch,
        {**old, "source": source, "hardware_cast": cast, "entries": entries},
        timings,
    )


def cast_is_exact(device: str, spans: Callable[[], Iterator[tuple[int, int]]] | None = None) -> bool:
    """True if the chip's cast gives every one of the 2^32 floats the integer encoder's code.

    False where it does not, or cannot be compiled. ``spans``: (first, programs) of other sets of floats.
    """
    from kvcondense.bench import kernels

    kernel: Any = kernels.cast_kernel

    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        for first, programs in (spans or _all_floats)():
            kernel[(programs,)](first, wrong, SCALE_PART, _CAST_BLOCK)
            if int(wrong):
                return False
    except Exception:  # whatever a compiler raises: this chip has no such cast
        return False
    return True


def _all_floats() -> Iterator[tuple[int, int]]:
    step = _CAST_BLOCK * _CAST_PROGRAMS
    yield from ((first, _CAST_PROGRAMS) for first in range(0, 1 << 32, step))
