"""Histories that broke engines, generated: what each invariant is tried on. ``able`` is what the adapter can do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from kvcondense.conformance.adapter import Capabilities
from kvcondense.conformance.cases import SPECS, Case, Op
from kvcondense.spec import CompressorSpec

_FAR = 70_000
_LAST = (1 << 20) - 1024
_PHASES = 8
"""Of a window; of a longer one, as many that follow one another."""


def step(*counts: int, **more: Any) -> Op:
    """A step with so many tokens of each request."""
    return Op("step", counts, **more)


def menu(spec: str) -> list[int]:
    """Chunk lengths that broke engines."""
    r = SPECS[spec].ratio
    return [
        0,
        1,
        1,
        r - 1,
        r,
        r + 1,
        2 * r - 1,
        2 * r,
        2 * r + 1,
        *((127, 128, 129, 130, 255, 257) if r == 128 else ()),
    ]


def widths(spec: CompressorSpec, most: int) -> list[int]:
    """Numbers of drafts up to ``most``: small ones, and one beside each number of rows that an implementation may keep:
    a window's, an overlap's, 8 (a common one), and all that were declared, where a ring wraps."""
    edges = (spec.ratio, spec.window - spec.ratio, spec.window, 8, most)
    found = {1, 3, 7, *(edge + by for edge in edges for by in (-1, 0, 1))}
    return sorted(w for w in found if 1 <= w <= most)


def numerics(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """One request at a time: a prefill, then single tokens, at three input scales; 2e-3 is near the root of eps.

    Then a prefill with scores up to 1e4 and down to -1e4, whose exponentials no fp32 holds.
    """
    for spec in SPECS:
        w = SPECS[spec].window
        for scale in (1.0, 0.1, 2e-3):
            ops = (step(3 * w + rng.randrange(4)), *(step(1),) * min(SPECS[spec].ratio + 1, 6))
            yield Case(spec, 1, ops, rng.randrange(1 << 30), scale)
    for spec in SPECS:
        yield Case(spec, 1, (step(2 * SPECS[spec].window),), rng.randrange(1 << 30), 3e3)


def emission(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Chunks that end right before, at and after a window."""
    for spec in SPECS:
        r = SPECS[spec].ratio
        for length in (r - 1, r, 2 * r + 1):
            yield Case(spec, 1, (step(length), step(1)), rng.randrange(1 << 30))


def composition(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """One sequence in chunks of lengths that broke engines."""
    for spec in SPECS:
        for _ in range(4 if able.chunks else 2):
            chunks = [rng.choice(menu(spec)) for _ in range(rng.randrange(3, 7))]
            if not able.chunks:
                chunks = [SPECS[spec].window + rng.randrange(6), *[1] * 6]
            yield Case(spec, 1, tuple(step(n) for n in chunks), rng.randrange(1 << 30))


def rollback(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Verify steps of every width that matters, from every phase of a window, widths interleaved.

    Most have one token that is sure and drafts of junk, all rejected: the next one starts a position later. Some
    have drafts that are accepted. Then true tokens over the places of the rejected ones, and decode: what a draft left
    behind shows now.
    """
    for spec in SPECS:
        s = SPECS[spec]
        every, junk = widths(s, able.max_draft), itertools.cycle(("nan", "1e4", "inf"))
        rng.shuffle(every)
        ops = [step(2 * s.window - s.ratio // 2 + rng.randrange(s.ratio))]
        for drafts in every:
            ops += [step(drafts + 1, drafts=drafts, junk=next(junk)) for _ in range(min(s.ratio, _PHASES))]
            ops.append(step(drafts + 1, drafts=drafts, junk=next(junk), accepted=rng.randrange(drafts + 1)))
        ops += [step(every[-1], drafts=every[-1]), *[step(1)] * 3, step(s.window + 1), step(s.ratio)]
        yield Case(spec, 1, tuple(ops), rng.randrange(1 << 30))


def isolation(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Requests of unequal lengths, in another order at every step."""
    for spec in SPECS:
        for n in (2, 4):
            ops = []
            for _ in range(4):
                counts = [rng.choice(menu(spec)[:7]) for _ in range(n)]
                ops.append(step(*counts, order=tuple(rng.sample(range(n), n))))
            yield Case(spec, n, tuple(ops), rng.randrange(1 << 30))


def inertness(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Steps with spare tokens of NaN behind the last request."""
    for spec in SPECS:
        n = 2 if able.ragged else 1
        ops = tuple(
            step(*(rng.choice(menu(spec)[:6]) for _ in range(n)), padding=rng.randrange(1, 6)) for _ in range(4)
        )
        yield Case(spec, n, ops, rng.randrange(1 << 30))


def recycled(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """A slot starts over, for prompts of every awkward length, in memory that holds another request or NaN."""
    for spec in SPECS:
        r, w = SPECS[spec].ratio, SPECS[spec].window
        for length in (1, r - 1, r, r + 1, w, w + 1):
            again = (Op("recycle"), step(length), step(w + 1)) if able.recycles else ()
            yield Case(spec, 1, (step(w + r - 1), *again), rng.randrange(1 << 30))


def positions(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Sequences that start far out."""
    for spec in SPECS:
        s = SPECS[spec]
        for first in (_FAR, _LAST):
            yield Case(spec, 1, (step(2 * s.window), step(s.ratio)), rng.randrange(1 << 30), 1.0, first // 128 * 128)


def addresses(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """A cache of more than 2^31 bytes; pages that nobody touches cost no memory."""
    for spec in SPECS:
        s = SPECS[spec]
        yield Case(spec, 1, (step(2 * s.window + 1), step(s.ratio)), rng.randrange(1 << 30), far=True)


def moves(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """A request exported and loaded into another slot, then forked."""
    for spec in SPECS:
        s = SPECS[spec]
        for stop in (s.ratio, s.window + rng.randrange(s.ratio), 2 * s.window - 1):
            ops = (step(stop, 1), Op("move"), step(s.ratio, 2), Op("fork", to=1), step(1, 2), step(s.window, 3))
            yield Case(spec, 2, ops, rng.randrange(1 << 30))
