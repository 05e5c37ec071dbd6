"""The work of ``kvcondense conformance``: invariants, mutants, a soak or a replay."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from kvcondense import files
from kvcondense.cli.output import Output
from kvcondense.cli.paths import require_folder
from kvcondense.cli.work import junit, page, summary
from kvcondense.cli.work.adapters import adapter_of
from kvcondense.cli.work.summary import Cause
from kvcondense.conformance import histories
from kvcondense.conformance.adapter import Factory
from kvcondense.conformance.cases import Case
from kvcondense.conformance.coverage import Coverage, unasked
from kvcondense.conformance.invariants import (
    INVARIANTS,
    Invariant,
    Outcome,
    check,
    exported,
    first_failure,
    judged_by_golden,
    play,
    portable,
    whole,
)
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.own import load_factory
from kvcondense.conformance.soak import soak
from kvcondense.errors import CheckpointError, KvCondenseError

CORRECT = ("reference:ring", "reference:paged", "reference:online")
_MAX_CASE_BYTES = 1 << 20


def run(
    output: Output,
    *,
    adapter: str,
    command: str | None,
    timeout: float,
    mutants: bool,
    soak_minutes: float | None,
    replay: Path | None,
    seed: int,
    rounds: int,
    folder: Path,
    report_file: Path | None,
    junit_file: Path | None,
) -> bool:
    """Whether nothing broke."""
    if mutants:
        passed, report = _mutants(output, seed)
    else:
        require_folder("--folder", folder)
        tried = Tried(output, *adapter_of(adapter, command, timeout), seed, folder)
        if replay is not None:
            passed, report = _replay(tried, replay)
        elif soak_minutes is not None:
            passed, report = _soak(tried, soak_minutes)
        else:
            passed, report = _invariants(tried, rounds, junit_file)
    if report_file is not None:
        page.write(report_file, "kvcondense conformance", _facts(report), _parts(report))
        output.say(f"written to {report_file}")
    output.finish(report)
    return passed


@dataclass
class Tried:
    """What is tried, as it was typed, and where what breaks is written."""

    output: Output
    typed: str
    make: Factory
    seed: int
    folder: Path

    def explain(self, detail: str, case: Case | None, name: str) -> Cause:
        """Say what broke, and keep the history under ``name``."""
        self.output.say(f"      {detail}")
        if case is None:
            return Cause(name, detail, None, f"kvcondense conformance {self.typed} --seed {self.seed}")
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"{name.replace(' ', '-')}.json"
        files.write(file, case.to_json() + "\n")
        again = f"kvcondense conformance {self.typed} --replay {shlex.quote(str(file))}"
        self.output.say(f"      smallest history found: {case.to_json()}")
        self.output.say(f"      again: {again}")
        return Cause(name, detail, case, again)


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in report.items() if isinstance(v, str | int | float) and v != ""}


def _parts(report: dict[str, Any]) -> list[str | page.Figure]:
    """Tables and plots of whatever was run."""
    if "invariants" in report:
        rows = [
            (i["invariant"], _word(i["passed"]), i["promise"], i["histories"], i["request_steps"],
             i["detail"] or i["skipped"] or "", i["case"] or "")
            for i in report["invariants"]
        ]  # fmt: skip
        columns = ("invariant", "result", "promise", "histories", "request-steps", "detail", "smallest history")
        steps = {i["invariant"]: i["request_steps"] for i in report["invariants"]}
        return [page.heading("Invariants"), page.table(columns, rows), page.tally(steps, "request-steps played")]
    if "mutants" in report:
        rows = [(n, by or "SURVIVED", MUTANTS[n].bug) for n, by in report["mutants"].items()]
        good = [(n, "WRONGLY CAUGHT" if detail else "passes", detail or "") for n, detail in report["correct"].items()]
        kills = Counter(by for by in report["mutants"].values() if by)
        return [
            page.heading("Mutants", "Wrong compressors, and the invariant that caught each."),
            page.table(("mutant", "caught by", "what is wrong with it"), rows),
            page.tally(kills, "mutants caught"),
            page.heading("Correct ones"),
            page.table(("adapter", "result", "detail"), good),
        ]
    found = report.get("found", {"soak": report.get("detail")})
    return [page.table(("check", "result", "detail"), [(n, _word(not d), d or "") for n, d in found.items()])]


def _word(passed: bool | None) -> str:
    return "SKIP" if passed is None else "PASS" if passed else "FAIL"


def _invariants(tried: Tried, rounds: int, junit_file: Path | None) -> tuple[bool, dict[str, Any]]:
    output, able = tried.output, tried.make().capabilities
    outcomes: list[Outcome] = []
    causes: list[Cause] = []
    visited = Coverage()
    wrong_rows = ""
    raised: dict[str, str] = {}  # an error of the adapter's own is one finding, whatever was asked when it came up
    for invariant in INVARIANTS:
        o = check(invariant, tried.make, seed=tried.seed, rounds=rounds, known=raised)
        outcomes.append(o)
        visited.add(o.coverage)
        word = "SKIP" if o.skipped else "PASS" if o.passed else "FAIL"
        counts = f"{o.played:>3} histories {o.coverage.request_steps:>5} request-steps"
        output.say(f"{word}  {o.invariant:<22} {o.skipped or counts}  {'' if o.skipped else o.promise}".rstrip())
        if o.raised in raised:
            output.say(f"      the error of {raised[o.raised]} again ({o.raised})")
        elif wrong_rows and o.case is not None and _elsewhere(invariant) and not (o.case.first or o.case.far):
            output.say(f"      the wrong rows of {wrong_rows} again: they need no far position")
        elif not o.passed:
            raised |= {o.raised: o.invariant} if o.raised else {}
            causes.append(tried.explain(o.detail, o.case, o.invariant))
            wrong_rows = wrong_rows or (o.invariant if invariant.judge is judged_by_golden else "")
    for line in summary.visits(visited):
        output.say(line)
    left = [*unasked(able), "I11 (graph capture needs a GPU), I13 (gradients)"]
    output.say(f"not asked: {'; '.join(left)}")
    if junit_file is not None:
        junit.write(junit_file, tried.typed, outcomes)
    if causes:
        broken = sum(not o.passed for o in outcomes)
        output.say(f"{len(causes)} {'cause' if len(causes) == 1 else 'causes'} of {broken} failures")
        file = summary.write(tried.folder, tried.typed, tried.seed, outcomes, causes, visited, left)
        output.say(f"summary written to {file}")
    report = {"adapter": tried.typed, "seed": tried.seed, "invariants": [_plain(o) for o in outcomes]}
    return not causes, {**report, "visited": visited.told(), "not_asked": left}


def _elsewhere(invariant: Invariant) -> bool:
    """Whether it asks what another one asks, too, but far out."""
    return invariant.cases in (histories.positions, histories.addresses)


def _plain(o: Outcome) -> dict[str, Any]:
    return {
        "invariant": o.invariant,
        "promise": o.promise,
        "passed": None if o.skipped else o.passed,
        "skipped": o.skipped,
        "histories": o.played,
        "request_steps": o.coverage.request_steps,
        "detail": o.detail,
        "raised": o.raised or None,
        "case": o.case and o.case.to_json(),
    }


def _mutants(output: Output, seed: int) -> tuple[bool, dict[str, Any]]:
    output.say(f"{'wrong compressor':<26} {'caught by':<22} what is wrong with it")
    caught: dict[str, str | None] = {}
    for name, mutant in MUTANTS.items():
        outcome = first_failure(load_factory(f"mutant:{name}"), seed=seed)
        caught[name] = outcome and outcome.invariant
        output.say(f"{name:<26} {caught[name] or 'SURVIVED':<22} {mutant.bug}")
    wrongly = {}
    for name in CORRECT:
        outcome = first_failure(load_factory(name), seed=seed)
        wrongly[name] = outcome and outcome.detail
        output.say(
            f"{name:<26} {'WRONGLY CAUGHT' if outcome else 'passes':<22} {outcome.detail if outcome else ''}".rstrip()
        )
    alive = [n for n, by in caught.items() if by is None]
    output.say(f"{len(caught) - len(alive)} of {len(caught)} caught")
    return not alive and not any(wrongly.values()), {"mutants": caught, "correct": wrongly}


def _soak(tried: Tried, minutes: float) -> tuple[bool, dict[str, Any]]:
    output, seed = tried.output, tried.seed
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    spoken = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=output.quiet or not console.is_terminal) as bar:
        task = bar.add_task("soak")

        def progress(histories: int, steps: int, seconds: float) -> None:
            nonlocal spoken
            text = f"{seconds:6.0f} s of {60 * minutes:.0f}: {histories} histories, {steps} request-steps"
            bar.update(task, description=text)
            if not (output.quiet or console.is_terminal) and time.perf_counter() - spoken > 30:
                spoken = time.perf_counter()
                console.print(text)

        result = soak(tried.make, minutes, seed, progress)
    word = "PASS" if result.passed else "FAIL"
    output.say(
        f"{word}  soak, {tried.typed} --seed {seed}: {result.histories} histories, {result.request_steps} "
        f"request-steps in {result.seconds:.0f} s"
    )
    for line in summary.visits(result.coverage):
        output.say(line)
    if not result.passed:
        tried.explain(result.detail, result.case, "soak")
    report = {"adapter": tried.typed, "seed": seed, "passed": result.passed, "detail": result.detail}
    report |= {"histories": result.histories, "request_steps": result.request_steps, "seconds": result.seconds}
    return result.passed, {**report, "case": result.case and result.case.to_json()}


def _replay(tried: Tried, file: Path) -> tuple[bool, dict[str, Any]]:
    text = files.read_text(file, "a case that conformance wrote", _MAX_CASE_BYTES, "--replay")
    try:
        case = Case.from_json(text)
    except KvCondenseError as error:
        raise CheckpointError("--replay", "a case that conformance wrote", f"{file} ({error})") from error
    found, steps = {}, 0
    # An invariant by its first name; what was promised is judged alone, and what was not is not.
    judges = {i.judge: i.name for i in reversed(INVARIANTS) if i.judge not in (None, portable)}
    able = tried.make().capabilities
    judges |= {whole: "rows and state", exported: "exported state"}
    for judge, promised in ((whole, able.exact), (exported, able.exports)):
        if not promised:
            del judges[judge]
    for judge, name in judges.items():
        found[name], seen = play(case, tried.make, judge)
        steps = seen.request_steps
        tried.output.say(f"{'FAIL' if found[name] else 'PASS'}  {name:<22} {found[name] or ''}".rstrip())
    return not any(found.values()), {"case": case.to_json(), "request_steps": steps, "found": found}
