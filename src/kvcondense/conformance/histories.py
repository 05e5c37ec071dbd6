"""Histories that broke engines, generated: what each invariant is tried on. ``able`` is what the adapter can do."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from kvcondense.conformance.adapter import Capabilities
from kvcondense.conformance.cases import Case, Op
from kvcondense.conformance.compressors import compressor
from kvcondense.spec import CompressorSpec

_FAR = 70_000
_PHASES = 8
"""Of a window: up to so many, every width of drafts is tried from each of them."""


def step(*counts: int, **more: Any) -> Op:
    """A step with so many tokens of each request."""
    return Op("step", counts, **more)


def menu(spec: str, able: Capabilities) -> list[int]:
    """Chunk lengths that broke engines, and those around the engine's own."""
    r = compressor(spec).spec.ratio
    around_windows = [0, 1, 1, r - 1, r, r + 1, 2 * r - 1, 2 * r, 2 * r + 1]
    tiles = [127, 128, 129, 130, 255, 257] if r == 128 else []
    return [*around_windows, *tiles, *(n + by for n in able.chunk_lengths for by in (-1, 0, 1))]


def widths(spec: CompressorSpec, most: int) -> list[int]:
    """Numbers of drafts up to ``most``: small ones, and one beside each number of rows that an implementation may keep:
    a window's, an overlap's, 8 (a common one), and all that were declared, where a ring wraps."""
    edges = (spec.ratio, spec.window - spec.ratio, spec.window, 8, most)
    found = {1, 3, 7, *(edge + by for edge in edges for by in (-1, 0, 1))}
    return sorted(w for w in found if 1 <= w <= most)


def numerics(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """One request at a time: a prefill, then single tokens, at three input scales; 2e-3 is near the root of eps.

    Then a prefill with scores up to 6e3 and down to -6e3, whose exponentials no fp32 holds.
    """
    for spec in able.specs:
        w = compressor(spec).spec.window
        for scale in (1.0, 0.1, 2e-3):
            ops = (step(3 * w + rng.randrange(4)), *(step(1),) * min(compressor(spec).spec.ratio + 1, 6))
            yield Case(spec, 1, ops, rng.randrange(1 << 30), scale)
        yield Case(spec, 1, (step(2 * w),), rng.randrange(1 << 30), 3e3)


def emission(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Chunks that end right before, at and after a window."""
    for spec in able.specs:
        r = compressor(spec).spec.ratio
        for length in (r - 1, r, 2 * r + 1):
            yield Case(spec, 1, (step(length), step(1)), rng.randrange(1 << 30))


def composition(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """One sequence in chunks of lengths that broke engines, every one of the engine's own among them."""
    for spec in able.specs:
        w, lengths = compressor(spec).spec.window, menu(spec, able)
        chunks = [[rng.choice(lengths) for _ in range(rng.randrange(3, 7))] for _ in range(4)]
        if able.chunk_lengths:
            chunks += [[rng.randrange(1, max(w, 2)), n - 1, n, n + 1, 1] for n in able.chunk_lengths]
        if not able.chunks:
            chunks = [[w + rng.randrange(6), *[1] * 6] for _ in range(2)]
        for lengths in chunks:
            yield Case(spec, 1, tuple(step(n) for n in lengths), rng.randrange(1 << 30))


def rollback(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Verify steps of every width that matters, from every phase of a window, widths interleaved.

    Most have one token that is sure and drafts of junk, all rejected: the next one starts a position later. Some
    have drafts that are accepted. Then true tokens over the places of the rejected ones, and decode: what a draft left
    behind shows now.
    """
    for spec in able.specs:
        s, most = compressor(spec).spec, able.max_draft
        yield Case(spec, 1, tuple(_verified(s, rng, most)), rng.randrange(1 << 30))
        if able.mixed:
            chunk = step(2 * s.window + rng.randrange(s.ratio), drafts=min(2, most), junk="nan")
            ops = (chunk, step(s.ratio), step(s.window + most, drafts=most, junk="1e4"), step(1), step(s.window + 1))
            yield Case(spec, 1, ops, rng.randrange(1 << 30))
        if able.ragged:
            d = max(1, most - 1)
            ops = (
                step(s.window + 1, s.window + 3), step(d + 1, d + 1, drafts=d, junk="nan"),
                step(2, d + 1, drafts=d, junk="1e4", order=(1, 0)), step(d + 1, 1, drafts=d, junk="inf"),
                step(s.ratio, s.ratio), step(1, s.window),
            )  # fmt: skip
            yield Case(spec, 2, ops, rng.randrange(1 << 30))


def fair(case: Case, able: Capabilities) -> bool:
    """Whether a history asks for no more than is declared: what it becomes when it is made smaller, too."""
    steps = [op for op in case.ops if op.kind == "step"]
    if not able.mixed and any(max(op.counts) > op.drafts + 1 for op in steps if op.drafts):
        return False
    longest = max((sum(op.counts[q] for op in steps) for q in range(case.requests)), default=0)
    if case.first + longest > able.max_positions:
        return False
    return able.chunks or _prefills_and_tokens(case)


def _prefills_and_tokens(case: Case) -> bool:
    """Whether every request has a first step of any length, and then single tokens."""
    begun: set[int] = set()
    for op in case.ops:
        if op.kind == "recycle":
            begun.discard(op.q)
        for q, count in enumerate(op.counts):
            if q in begun and count > 1:
                return False
            begun |= {q} if count else set()
    return True


def _verified(spec: CompressorSpec, rng: random.Random, most: int) -> list[Op]:
    """One request: a prefill, verify steps of all widths from all phases, then the truth."""
    every, junk = widths(spec, most), itertools.cycle(("nan", "1e4", "inf"))
    rng.shuffle(every)
    at = 2 * spec.window - spec.ratio // 2 + rng.randrange(spec.ratio)
    ops, phases = [step(at)], set(range(spec.ratio))

    def verify(drafts: int, accepted: int = 0) -> None:
        nonlocal at
        phases.discard(at % spec.ratio)
        at += 1 + accepted
        ops.append(step(drafts + 1, drafts=drafts, junk=next(junk), accepted=accepted))

    for drafts in every:  # one sure token moves a request by one, from phase to phase
        for _ in range(min(spec.ratio, _PHASES)):
            verify(drafts)
        verify(drafts, rng.randrange(drafts + 1))
    for drafts in itertools.cycle(every):
        if not phases:
            break
        verify(drafts)
    return [*ops, step(every[-1], drafts=every[-1]), *[step(1)] * 3, step(spec.window + 1), step(spec.ratio)]


def isolation(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Requests of unequal lengths, in another order at every step."""
    for spec in able.specs:
        for n in (2, 4, 9):
            ops = []
            for _ in range(4):
                counts = [rng.choice(menu(spec, able)[:7]) for _ in range(n)]
                ops.append(step(*counts, order=tuple(rng.sample(range(n), n))))
            yield Case(spec, n, tuple(ops), rng.randrange(1 << 30))


def inertness(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Steps with spare tokens of NaN behind the last request."""
    for spec in able.specs:
        n = 2 if able.ragged else 1
        ops = tuple(
            step(*(rng.choice(menu(spec, able)[:6]) for _ in range(n)), padding=rng.randrange(1, 6)) for _ in range(4)
        )
        yield Case(spec, n, ops, rng.randrange(1 << 30))


def inert(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Steps with one more request, of NaN, that has state slot -1."""
    for spec in able.specs:
        r = compressor(spec).spec.ratio
        ops = tuple(step(rng.choice(menu(spec, able)[1:6]), inert=n) for n in (2 * r, 1, r))
        yield Case(spec, 1, (*ops, step(r)), rng.randrange(1 << 30))


def unmapped(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Steps whose cache rows are mapped token by token, some of them to nobody; slot 0 is a legal slot."""
    for spec in able.specs:
        r = compressor(spec).spec.ratio
        ops = (step(2 * r, unmapped=True), step(5), step(r, unmapped=True), step(2 * r + 1, unmapped=True), step(r))
        yield Case(spec, 1, ops, rng.randrange(1 << 30))


def recycled(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """A slot starts over, for prompts of every awkward length, in memory that holds another request or NaN."""
    for spec in able.specs:
        r, w = compressor(spec).spec.ratio, compressor(spec).spec.window
        for length in (1, r - 1, r, r + 1, w, w + 1):
            after = (step(w + 1),) if able.chunks else (step(1),) * 3
            again = (Op("recycle"), step(length), *after) if able.recycles else ()
            yield Case(spec, 1, (step(w + r - 1), *again), rng.randrange(1 << 30))


def positions(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Sequences that start far out: where the RoPE table of a model before YaRN ends, and at the end of all."""
    for spec in able.specs:
        s, last = compressor(spec).spec, able.max_positions
        far = [_FAR, last - 1024] if able.exports or able.offsets else [_FAR]
        ops = (step(2 * s.window), step(s.ratio))
        for first in sorted({max(0, min(f, last - 3 * s.window - s.ratio)) // s.ratio * s.ratio for f in far}):
            yield Case(spec, 1, ops, rng.randrange(1 << 30), first=first)


def addresses(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """A cache of more than 2^31 elements; pages that nobody touches cost no memory."""
    for spec in able.specs:
        s = compressor(spec).spec
        ops = (step(2 * s.window + 1), *(step(1),) * 3) if not able.chunks else (step(2 * s.window + 1), step(s.ratio))
        yield Case(spec, 1, ops, rng.randrange(1 << 30), far=True)


def moves(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """A request exported and loaded into another slot, then forked."""
    for spec in able.specs:
        s = compressor(spec).spec
        for stop in (s.ratio, s.window + rng.randrange(s.ratio), 2 * s.window - 1):
            ops = (step(stop, 1), Op("move"), step(s.ratio, 2), Op("fork", to=1), step(1, 2), step(s.window, 3))
            yield Case(spec, 2, ops, rng.randrange(1 << 30))


def forks(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """Requests forked right behind a verify step, while what was rejected still lies in their state."""
    for spec in able.specs:
        s = compressor(spec).spec
        most = min(able.max_draft, s.window + 1)
        verify = step(most + 1, 1, drafts=most, junk=rng.choice(("nan", "1e4")), accepted=rng.randrange(most))
        both = step(1, most + 1, drafts=most, junk="1e4")
        before = step(s.window + rng.randrange(s.ratio), 1)
        ops = (before, verify, Op("fork", to=1), both, verify, step(s.ratio, s.window))
        yield Case(spec, 2, ops, rng.randrange(1 << 30))


def codes(rng: random.Random, able: Capabilities) -> Iterator[Case]:
    """First windows of rows that every rounding leaves alone, in quantised caches. After a Hadamard none is certain."""
    for spec in able.specs:
        what = compressor(spec)
        if what.format.plain is None and not what.spec.rotate:
            n = 6 if able.ragged else 1
            for _ in range(6 // n):
                yield Case(spec, n, (step(*(what.spec.ratio,) * n),), rng.randrange(1 << 30), pattern=True)
