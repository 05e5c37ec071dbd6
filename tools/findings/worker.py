"""One implementation in a process of its own: every invariant, a line of JSON each as soon as it is known."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from findings.registry import Implementation

WIDEST = 16
"""Verify steps are tried with up to so many drafts."""


def say(**what: Any) -> None:
    """A line for whoever started this."""
    print(json.dumps(what), flush=True)


def work(about: Implementation) -> None:
    """Ask everything; the lines are about, invariant and width."""
    import torch

    from kvcondense.conformance import invariants
    from kvcondense.conformance.adapter import Capabilities
    from kvcondense.conformance.cases import Case
    from kvcondense.conformance.coverage import unasked
    from kvcondense.conformance.histories import step
    from kvcondense.conformance.own import load_factory

    torch.set_num_threads(1)
    make = load_factory(about.adapter)
    able = make().capabilities
    declared = {
        f.name: getattr(able, f.name) for f in fields(able) if getattr(able, f.name) != getattr(Capabilities(), f.name)
    }
    say(
        kind="about",
        version=version(about),
        specs=able.specs,
        declared=declared,
        left_out=unasked(able),
        sums=sums(about),
    )
    for invariant in invariants.INVARIANTS:
        if about.only and invariant.name not in about.only:
            continue
        found = invariants.check(invariant, make)
        case = None if found.case is None else json.loads(found.case.to_json())
        say(
            kind="invariant",
            name=found.invariant,
            promise=found.promise,
            skipped=found.skipped,
            played=found.played,
            request_steps=found.coverage.request_steps,
            detail=found.detail,
            case=case,
        )
    for spec in about.widths:
        _widths(spec, make)
    for lengths in about.chunks:
        for spec in able.specs:
            case = Case(spec, 1, tuple(step(n) for n in lengths))
            detail, _ = invariants.play(case, make, invariants.whole)
            say(kind="chunks", lengths=lengths, spec=spec, detail=str(detail or ""))
    if not about.only:
        for what, invariant, spoilt in (
            ("the norm's weights, a channel further", "I9 numerics", _norm_rolled),
            ("the first token of every step, zeros", "I1 composition", _token_lost),
        ):
            say(kind="wrong", what=what, invariant=invariant, seen=_seen(invariant, make, spoilt))


def _seen(name: str, make: Any, spoilt: Any) -> bool:
    """Whether one of the invariant's histories fails, if the adapter is spoilt."""
    from kvcondense.conformance import invariants

    invariant = next(i for i in invariants.INVARIANTS if i.name == name)
    assert invariant.cases is not None
    assert invariant.judge is not None
    cases = invariant.cases(random.Random(name), make().capabilities)
    return any(invariants.play(case, lambda: spoilt(make()), invariant.judge)[0] is not None for case in cases)


def _norm_rolled(adapter: Any) -> Any:
    init = adapter.init

    def wrong(setup: Any) -> None:
        init(replace(setup, weights=replace(setup.weights, norm=setup.weights.norm.roll(1))))

    adapter.init = wrong
    return adapter


def _token_lost(adapter: Any) -> Any:
    step = adapter.step

    def wrong(kv_score: Any, batch: Any) -> None:
        kv_score = kv_score.clone()
        kv_score[batch.query_start_loc[:-1][batch.lengths > 0]] = 0
        step(kv_score, batch)

    adapter.step = wrong
    return adapter


def _widths(spec: str, make: Any) -> None:
    """How many drafts a verify step may have: behind full rings all are rejected, then true tokens follow."""
    from kvcondense.conformance import invariants
    from kvcondense.conformance.cases import Case
    from kvcondense.conformance.compressors import compressor
    from kvcondense.conformance.histories import step

    window, failed = compressor(spec).spec.window, {}
    for drafts in range(1, WIDEST + 1):
        ops = (*(step(window),) * 3, step(drafts + 1, drafts=drafts, junk="1e4"), step(window + window // 2))
        case = Case(spec, 1, ops)
        detail, _ = invariants.play(case, make, invariants.whole)
        if detail is not None:
            failed[drafts] = (case, detail)
    first = min(failed, default=0)
    case, detail = failed.get(first, (None, ""))
    say(
        kind="width",
        spec=spec,
        tried=WIDEST,
        fails=sorted(failed),
        detail=str(detail),
        case=None if case is None else json.loads(case.to_json()),
    )


def sums(about: Implementation) -> dict[str, str]:
    """SHA-256 of its files, the first 16 digits."""
    root = Path(os.environ.get("KVCONDENSE_PEERS", "")) / about.folder
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:16] for name in about.files}


def version(about: Implementation) -> str:
    """As it is known, or as the installed package says."""
    installed = about.version if " " not in about.version else ""
    return f"{installed} {metadata.version(installed)}" if installed else about.version


def casts() -> None:
    """Casts that Triton's interpreter gets wrong, as it is and corrected."""
    from engines import run

    say(kind="casts", casts=run.casts(lambda _: None))
