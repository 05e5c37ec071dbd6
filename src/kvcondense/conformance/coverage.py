"""What histories visited: phases (a position modulo the ratio), lengths, slots; and what a declaration left unasked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import fields

from kvcondense.conformance.adapter import Capabilities
from kvcondense.conformance.compressors import SMALL, compressor

_UNASKED = {
    "ragged": "several requests in a step",
    "chunks": "chunks that begin in the middle of a sequence",
    "inert": "requests with state slot -1",
    "spare": "tokens behind the last request",
    "unmapped": "windows with cache slot -1",
    "recycles": "slots that start over",
    "exports": "moved and forked requests",
    "refuses": "bad metadata",
    "exact": "equal bits under any split, and what is judged by them: rollback, isolation, inertness, moves",
    "returns_state": "the state's bytes",
}


class Coverage:
    """Sets of what was seen, by compressor and kind."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.request_steps = 0

    def step(self, spec: str, slot: int, start: int, tokens: int, drafts: int) -> None:
        """A request's part of a step: ``tokens`` from position ``start``, the last ``drafts`` of which are drafts."""
        if not tokens:
            return
        self.request_steps += 1
        ratio, seen = compressor(spec).spec.ratio, self.seen[spec]
        seen["phases"].add(start % ratio)
        seen["chunk lengths"].add(tokens)
        seen["ends"].add((start + tokens) % ratio)
        seen["state slots"].add(slot)
        seen["positions"].update((start, start + tokens - 1))
        if drafts:
            seen["phases of verify steps"].add(start % ratio)
            seen["drafts"].add(drafts)

    def requests(self, spec: str, count: int, spare: int) -> None:
        """A whole step: requests that had tokens, and spare tokens behind them."""
        self.seen[spec]["requests"].add(count)
        self.seen[spec]["spare tokens"].add(spare)

    def add(self, other: Coverage) -> None:
        """What another one saw, too."""
        self.request_steps += other.request_steps
        for spec, kinds in other.seen.items():
            for kind, values in kinds.items():
                self.seen[spec][kind] |= values

    def told(self) -> dict[str, dict[str, str]]:
        """For each compressor and kind, the values as ranges: "1-8, 15-17"."""
        return {
            spec: {kind: _told(spec, kind, values) for kind, values in kinds.items()}
            for spec, kinds in self.seen.items()
        }


def _told(spec: str, kind: str, values: set[int]) -> str:
    if kind == "positions":
        return f"{min(values)} to {max(values)}"
    if kind in ("phases", "ends", "phases of verify steps"):
        return f"{len(values)} of {compressor(spec).spec.ratio}"
    return ranges(values)


def ranges(values: Iterable[int]) -> str:
    """Integers, runs of them drawn together: "1-3, 7"."""
    found: list[list[int]] = []
    for v in sorted(values):
        if found and v == found[-1][1] + 1:
            found[-1][1] = v
        else:
            found.append([v, v])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def unasked(able: Capabilities) -> list[str]:
    """What a declaration keeps the kit from asking, a line each."""
    names: Mapping[str, bool] = {f.name: getattr(able, f.name) for f in fields(able) if f.name in _UNASKED}
    found = [_UNASKED[name] for name, value in names.items() if not value]
    if able.ragged and not able.chunks:
        found.append("several requests in a step (without chunks)")
    if not able.max_draft:
        found.append("drafts")
    elif not able.mixed:
        found.append("drafts at the end of longer chunks")
    if able.max_positions < 1 << 20:
        found.append(f"positions from {able.max_positions} on")
    elif not (able.exports or able.offsets):
        found.append("positions beyond what a prefix reaches (neither exports nor offsets)")
    ratios = {compressor(s).spec.ratio for s in able.specs}
    missing = sorted({compressor(s).spec.ratio for s in SMALL} - ratios)
    if missing:
        found.append(f"compressors of ratio {', '.join(map(str, missing))}")
    return found
