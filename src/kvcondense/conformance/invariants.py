"""The invariants, each as generated cases that an adapter must survive; and the check that shrinks what it finds."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import torch

from kvcondense.conformance import histories, stored_bytes
from kvcondense.conformance.adapter import Capabilities, Factory
from kvcondense.conformance.cases import Case, shrink
from kvcondense.conformance.compressors import compressor
from kvcondense.conformance.coverage import Coverage
from kvcondense.conformance.exported import against_tokens
from kvcondense.conformance.histories import step
from kvcondense.conformance.judge import against_codes, against_golden, against_itself, bits
from kvcondense.conformance.own import BackendAdapter
from kvcondense.conformance.play import Player, raw
from kvcondense.conformance.script import Request
from kvcondense.conformance.stored import CANARY
from kvcondense.formats import FORMATS
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec

Judge = Callable[[Player], str | None]
Cases = Callable[[random.Random, Capabilities], Iterator[Case]]


@dataclass(frozen=True)
class Invariant:
    """A promise: ``cases`` makes histories from a random source, ``judge`` says what is wrong, or None."""

    name: str
    promise: str
    cases: Cases | None = None
    judge: Judge | None = None
    needs: tuple[str, ...] = ()
    """Capabilities without which it is not asked for."""
    special: Callable[[Factory], str | None] | None = None
    """A check that is no history, instead of ``cases`` and ``judge``."""


@dataclass(frozen=True)
class Outcome:
    """What became of an invariant: cases played and what they visited; the smallest failing case, if any."""

    invariant: str
    promise: str
    skipped: str = ""
    played: int = 0
    coverage: Coverage = field(default_factory=Coverage)
    detail: str = ""
    case: Case | None = None
    raised: str = ""
    """Where, if it was an error of the adapter's own."""

    @property
    def passed(self) -> bool:
        return not self.detail


def words(error: BaseException) -> str:
    """What an error says, in a line that can be printed and written anywhere."""
    try:
        text = str(error)
    except Exception:
        return "an error that cannot say what it is"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


class Raised(str):
    """An error that the adapter ran into, in a line; ``place``: which error, and the line of code that raised it."""

    place: str

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        """Of what was caught."""
        found = cls(f"{type(error).__name__}: {words(error)}")
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {last.filename}:{last.lineno}"
        found.place = str(getattr(error, "place", where))  # of another process, the line here says nothing
        return found


def play(case: Case, make: Factory, judge: Judge) -> tuple[str | None, Coverage]:
    """What is wrong after ``case``, and what it visited."""
    visited = Coverage()

    def run(make: Factory) -> str | None:
        player = Player(case, make)
        try:
            player.run()
        finally:
            visited.add(player.coverage)
        return judge(player)

    return _told(run, make), visited


def _told(run: Callable[[Factory], str | None], make: Factory) -> str | None:
    """What ``run`` finds wrong; an error that the adapter runs into, whatever it is, is wrong too."""
    try:
        return run(make)
    except (Exception, SystemExit) as error:  # an adapter that ends the program has not passed
        return Raised.of(error)


def check(
    invariant: Invariant, make: Factory, *, seed: int = 0, rounds: int = 1, known: Collection[str] = ()
) -> Outcome:
    """Play an invariant's cases on an adapter; the first failure is shrunk, unless it raised where ``known`` says."""
    able = make().capabilities
    outcome = Outcome(invariant.name, invariant.promise)
    missing = [n for n in invariant.needs if not getattr(able, n)]
    if missing:
        return replace(outcome, skipped=f"the adapter does not declare {', '.join(missing)}")
    if invariant.special is not None:
        detail = _told(invariant.special, make)
        return replace(outcome, played=1, detail=detail or "", raised=getattr(detail, "place", ""))
    assert invariant.cases is not None
    assert invariant.judge is not None
    judge, played = invariant.judge, 0
    for r in range(rounds):
        for case in invariant.cases(random.Random(f"{invariant.name} {seed} {r}"), able):
            if not histories.fair(case, able):
                continue
            detail, visited = play(case, make, judge)
            played += 1
            outcome.coverage.add(visited)
            place = getattr(detail, "place", "")
            if place and place in known:
                return replace(outcome, played=played, detail=detail, raised=place)
            if detail is not None:
                small = shrink(case, lambda c: histories.fair(c, able) and play(c, make, judge)[0] is not None)
                detail = play(small, make, judge)[0] or detail
                return replace(outcome, played=played, detail=detail, case=small, raised=place)
    if not played:
        return replace(outcome, skipped="nothing that is declared has such histories")
    return replace(outcome, played=played)


def first_failure(make: Factory, *, seed: int = 0) -> Outcome | None:
    """The first invariant that an adapter breaks."""
    for invariant in INVARIANTS:
        outcome = check(invariant, make, seed=seed)
        if not outcome.passed:
            return outcome
    return None


def _each(compare: Callable[[Player, Request], str | None]) -> Judge:
    def judge(player: Player) -> str | None:
        found = (compare(player, request) for request in player.live)
        return next((f for f in found if f is not None), None)

    return judge


def whole(player: Player) -> str | None:
    """Guards untouched, and every request's rows and state those of the same implementation fed it alone."""
    return player.guard() or _each(against_itself)(player)


def _emitted(player: Player) -> str | None:
    """Row c is there from the step on that brings position c * r + r - 1, and nothing else is."""
    request = player.live[0]
    rows = player.rows(player.frame.slots(request, player.own_rows(request)))
    if bool((raw(rows) == CANARY).all(-1).any()):
        return f"a row of the {player.spec.visible_rows(request.done)} that are visible was not written"
    return player.guard()


def _deterministic(player: Player) -> str | None:
    rows = [bits(player.adapter.rows(player.frame.slots(q, player.own_rows(q)))) for q in player.live]
    for _ in range(3):
        again = Player(player.case, player.make)
        again.run()
        for old, q in zip(rows, again.live, strict=True):
            if not torch.equal(old, bits(again.adapter.rows(again.frame.slots(q, again.own_rows(q))))):
                return "the same history gave other bytes on another run"
    return None


def unwritten(spec: CompressorSpec, done: int) -> int | None:
    """The next position behind ``done`` that no request can go on from: the last of a window; None if there is none."""
    if spec.window == 1:
        return None
    return next(p for p in range(done + 1, done + spec.ratio + 2) if (p + 1) % spec.ratio == 0)


def _refusals(make: Factory) -> str | None:
    """Bad metadata raises, and neither cache nor state changes."""
    words = make().capabilities.specs[0]
    spec, page_rows = compressor(words).spec, compressor(words).page_rows
    most = 3 * spec.window + 64  # tokens: more than anybody keeps for no drafts at all

    def fresh() -> Player:
        # The second request is long: no position that is tried lies beyond the last one.
        player = Player(Case(words, 2, (step(9, 9), step(0, 2 * most))), make)
        player.run()
        return player

    wrongs: dict[str, tuple[dict, int]] = {
        "a state slot beyond the last one": ({"state_slots": [1000]}, 1),
        "more drafts than the state has room for": ({"draft_rows": [most]}, most),
        "a missing cache page": ({"block_table": torch.full((1, 400), -1)}, most),
        "a cache page beyond the last one": ({"block_table": torch.full((1, 400), 1 << 40)}, most),
        "too few tokens": ({"query_start_loc": [0, most]}, 3),
    }
    if (far := unwritten(spec, 9)) is not None:
        wrongs["a position that nobody wrote up to"] = ({"start_positions": [far]}, 1)
    for what, (change, count) in wrongs.items():
        player = fresh()
        request = player.live[0]
        good = player.frame.batch([request], [count], [0])
        assert good.block_table is not None
        every = player.frame.slots(request, torch.arange(player.frame.pages * page_rows))
        fields = {
            "query_start_loc": good.query_start_loc,
            "start_positions": good.start_positions,
            "state_slots": good.state_slots,
            "block_table": torch.cat([good.block_table, torch.zeros(1, 400, dtype=torch.int64)], dim=1),
        }
        before = bits(player.rows(every)).clone()
        tokens = torch.ones(count, spec.projected)
        try:
            player.adapter.step(tokens, RaggedBatch.build(**{**fields, **change}))
        except Exception:
            pass
        else:
            return f"{what} was accepted"
        if not torch.equal(before, bits(player.rows(every))):
            return f"{what} raised only after the cache was written"
        if player.adapter.capabilities.exact and (wrong := _each(against_itself)(player)):
            return f"{what} changed the state: {wrong}"
    return None


def _stored(make: Factory) -> str | None:
    """Every byte of a cache in every quantised format (kvcondense's own backends)."""
    adapter = make()
    assert isinstance(adapter, BackendAdapter)
    found = (stored_bytes.check(fmt)(adapter.impl) for fmt in FORMATS.values() if fmt.scaled is not None)
    return next((f for f in found if f is not None), None)


judged_by_golden = _each(against_golden)
exported = _each(against_tokens)


def portable(player: Player) -> str | None:
    """A request goes on elsewhere, and its state is what kvcondense's would be: others can go on with it, too."""
    return whole(player) or exported(player)


_SPLIT = ("exact", "chunks")
_BOTH = ("exact", "chunks", "ragged")

INVARIANTS: tuple[Invariant, ...] = (
    Invariant("I6 emission", "row c is written when its last position arrives", histories.emission, _emitted),
    Invariant("I9 numerics", "rows are the reference's, but for bf16 flips", histories.numerics, judged_by_golden),
    Invariant("I9 codes", "rows that are certain have the format's bytes", histories.codes, against_codes),
    Invariant("I9 bytes", "every byte of every cache format", needs=("formats",), special=_stored),
    Invariant("I1 composition", "any split gives the same rows and state", histories.composition, whole, ("exact",)),
    Invariant("I5 only-written reads", "a recycled slot shows nothing old", histories.recycled, whole, ("exact",)),
    Invariant("I3 isolation", "slots, order and neighbours do not show", histories.isolation, whole, _BOTH),
    Invariant("I2 rollback", "rejected drafts leave no trace", histories.rollback, whole, (*_SPLIT, "max_draft")),
    Invariant("I4 inertness", "spare tokens of NaN do nothing", histories.inertness, whole, (*_SPLIT, "spare")),
    Invariant("I4 inert request", "state slot -1 does nothing", histories.inert, whole, (*_BOTH, "inert")),
    Invariant("I4 slot -1", "it writes nothing", histories.unmapped, whole, (*_SPLIT, "unmapped")),
    Invariant("I7 position", "rows rotate at c r, up to 2^20", histories.positions, judged_by_golden, ("chunks",)),
    Invariant("I7 address", "rows beyond element 2^31 are not lost", histories.addresses, judged_by_golden),
    Invariant("I8 portability", "moved and forked requests go on", histories.moves, portable, (*_BOTH, "exports")),
    Invariant(
        "I8 fork",
        "a fork takes over no draft that was rejected",
        histories.forks,
        whole,
        (*_BOTH, "exports", "max_draft"),
    ),
    Invariant("I10 determinism", "the same bytes on every run", histories.isolation, _deterministic, _BOTH[1:]),
    Invariant(
        "I12 fail closed",
        "bad metadata raises before any write",
        needs=("refuses", "ragged", "chunks"),
        special=_refusals,
    ),
)
