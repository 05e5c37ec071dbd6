"""Soak: long random serving histories, compared bit by bit, until the time is up or something breaks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvcondense.conformance.adapter import Capabilities, Factory
from kvcondense.conformance.cases import Case, Op, shrink
from kvcondense.conformance.compressors import compressor
from kvcondense.conformance.coverage import Coverage
from kvcondense.conformance.histories import fair, menu
from kvcondense.conformance.invariants import play, whole

_REQUESTS, _STEPS = 8, 60


@dataclass(frozen=True)
class Soaked:
    """What a soak did: histories, what they visited, seconds; and the smallest failing case, if any."""

    histories: int
    coverage: Coverage
    seconds: float
    detail: str = ""
    case: Case | None = None

    @property
    def request_steps(self) -> int:
        """Steps, times the requests that had tokens in them."""
        return self.coverage.request_steps

    @property
    def passed(self) -> bool:
        return not self.detail


def soak(
    make: Factory, minutes: float, seed: int = 0, progress: Callable[[int, int, float], object] = lambda *_: None
) -> Soaked:
    """Play random histories of 8 requests for so many minutes; at least one.

    Each mixes chunks of awkward lengths, drafts of junk that are rejected, spare tokens, requests and rows of nobody,
    recycled and poisoned slots, requests moved to other slots and forks; then every request's rows and state must
    equal, bit for bit, those of the same implementation fed that request alone in one call, and no other byte may have
    changed.
    """
    able, rng = make().capabilities, random.Random(f"soak {seed}")
    begun = time.perf_counter()
    histories, visited = 0, Coverage()
    while not histories or time.perf_counter() - begun < 60 * minutes:
        case = history(rng, able)
        detail, seen = play(case, make, whole)
        histories += 1
        visited.add(seen)
        progress(histories, visited.request_steps, time.perf_counter() - begun)
        if detail is not None:
            small = shrink(case, lambda c: fair(c, able) and play(c, make, whole)[0] is not None, budget=400)
            detail = play(small, make, whole)[0] or detail
            return Soaked(histories, visited, time.perf_counter() - begun, detail, small)
    return Soaked(histories, visited, time.perf_counter() - begun)


def history(rng: random.Random, able: Capabilities) -> Case:
    """A random history of what an adapter can do."""
    spec = rng.choice(able.specs)
    n = _REQUESTS if able.ragged else 1
    lengths = menu(spec, able)
    ops = []
    for _ in range(_STEPS):
        if able.chunks and able.max_draft and rng.random() < 0.25:
            width = rng.randrange(1, able.max_draft + 1)
            junk = rng.choice(("", "nan", "inf", "1e4"))
            counts = tuple(rng.choice((0, width, width + 1)) for _ in range(n))
            op = Op("step", counts, width, junk, rng.randrange(width) if junk and rng.random() < 0.5 else 0)
        elif able.chunks:
            # Mostly decode steps, as in serving; now and then a chunk.
            counts = tuple(rng.choice(lengths) if rng.random() < 0.2 else rng.randrange(2) for _ in range(n))
            op = Op("step", counts)
        else:
            op = Op("step", (1,) * n) if ops else Op("step", (compressor(spec).spec.window + rng.randrange(9),) * n)
        padding = rng.randrange(4) if able.spare and able.chunks else 0
        order = tuple(rng.sample(range(n), n)) if able.ragged else ()
        inert = rng.randrange(1, 9) if able.inert and able.ragged and able.chunks and rng.random() < 0.1 else 0
        unmapped = able.unmapped and able.chunks and rng.random() < 0.1
        ops.append(replace(op, padding=padding, order=order, inert=inert, unmapped=unmapped))
        roll = rng.random()
        if roll < 0.05 and able.recycles and able.chunks:
            ops.append(Op("recycle", q=rng.randrange(n), junk=rng.choice(("", "nan"))))
        elif roll < 0.10 and able.exports:
            ops.append(Op("move", q=rng.randrange(n)))
        elif roll < 0.13 and able.exports and n > 1:
            q, to = rng.sample(range(n), 2)
            ops.append(Op("fork", q=q, to=to))
    case = Case(spec, n, tuple(ops), rng.randrange(1 << 30))
    while len(case.ops) > 1 and not fair(case, able):  # longer than positions go
        case = replace(case, ops=case.ops[:-1])
    return case
