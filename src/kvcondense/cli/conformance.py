"""``kvcondense conformance``: run the conformance kit on an adapter, on the mutants, or for as long as you like."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from kvcondense.cli import completion, page
from kvcondense.cli.output import JsonFile, Output
from kvcondense.cli.page import ReportFile
from kvcondense.conformance.adapter import Factory, load_factory
from kvcondense.conformance.cases import Case
from kvcondense.conformance.invariants import INVARIANTS, Outcome, check, first_failure, play, whole
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.soak import soak
from kvcondense.errors import CheckpointError, RangeError

EXAMPLE = "Example: kvcondense conformance --adapter kvcondense.backends.reference --soak 2"
CORRECT = ("reference:ring", "reference:paged", "reference:online")
_MAX_CASE_BYTES = 1 << 20


def conformance(
    adapter: Annotated[
        str,
        typer.Option(
            help="module:factory, a module with a BACKEND, cpu or reference[:ring|paged|online], or mutant:NAME.",
            autocompletion=completion.adapters,
        ),
    ] = "reference",
    mutants: Annotated[bool, typer.Option("--mutants", help="Check that every wrong compressor is caught.")] = False,
    soak_minutes: Annotated[
        float | None, typer.Option("--soak", metavar="MINUTES", help="Random histories for so many minutes.")
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="Play the case in this file and judge it.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated histories.")] = 0,
    rounds: Annotated[int, typer.Option(help="Times as many histories per invariant.")] = 1,
    case_file: Annotated[Path, typer.Option(help="Where a failing case is written.")] = Path("kvcondense-case.json"),
    report_file: ReportFile = None,
    json_file: JsonFile = None,
) -> None:
    """Check an implementation of the compressor against the invariants, by generated serving histories.

    A failure is shrunk to the smallest history found, written to --case-file, and can be played with --replay. Exit
    status 0 only if nothing broke; with --mutants, only if every mutant is caught and no correct adapter is.
    """
    page.check(report_file)
    output = Output(json_file)
    if rounds < 1 or (soak_minutes is not None and soak_minutes < 0):
        raise RangeError("--rounds" if rounds < 1 else "--soak", "a positive number", min(rounds, soak_minutes or 0))
    if mutants:
        passed, report = _mutants(output, seed)
    else:
        make = load_factory(adapter)
        make()  # a factory that cannot work is an error before anything runs
        if replay is not None:
            passed, report = _replay(output, make, replay)
        elif soak_minutes is not None:
            passed, report = _soak(output, adapter, make, soak_minutes, seed, case_file)
        else:
            passed, report = _invariants(output, adapter, make, seed, rounds, case_file)
    if report_file is not None:
        page.write(report_file, "kvcondense conformance", _facts(report), _parts(report))
        output.say(f"written to {report_file}")
    output.finish(report)
    raise typer.Exit(0 if passed else 1)


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in report.items() if isinstance(v, str | int | float) and v != ""}


def _parts(report: dict[str, Any]) -> list[str]:
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


def _invariants(
    output: Output, name: str, make: Factory, seed: int, rounds: int, case_file: Path
) -> tuple[bool, dict[str, Any]]:
    outcomes = []
    for invariant in INVARIANTS:
        o = check(invariant, make, seed=seed, rounds=rounds)
        outcomes.append(o)
        word = "SKIP" if o.skipped else "PASS" if o.passed else "FAIL"
        counts = f"{o.played:>3} histories {o.request_steps:>5} request-steps"
        output.say(f"{word}  {o.invariant:<22} {o.skipped or counts}  {'' if o.skipped else o.promise}".rstrip())
        if not o.passed:
            _explain(output, name, o.detail, o.case, case_file)
            case_file = case_file.with_stem(f"{case_file.stem}-next")  # every failure keeps its own
    output.say("not asked here: I11 (graph capture needs a GPU), I13 (gradients)")
    failed = [o for o in outcomes if not o.passed]
    return not failed, {"adapter": name, "seed": seed, "invariants": [_plain(o) for o in outcomes]}


def _explain(output: Output, name: str, detail: str, case: Case | None, case_file: Path) -> None:
    output.say(f"      {detail}")
    if case is not None:
        case_file.write_text(case.to_json() + "\n", encoding="utf-8")
        output.say(f"      smallest history found: {case.to_json()}")
        output.say(f"      again: kvcondense conformance --adapter {name} --replay {case_file}")


def _plain(o: Outcome) -> dict[str, Any]:
    return {
        "invariant": o.invariant,
        "promise": o.promise,
        "passed": None if o.skipped else o.passed,
        "skipped": o.skipped,
        "histories": o.played,
        "request_steps": o.request_steps,
        "detail": o.detail,
        "case": o.case and o.case.to_json(),
    }


def _mutants(output: Output, seed: int) -> tuple[bool, dict[str, Any]]:
    output.say(f"{'wrong compressor':<24} {'caught by':<22} what is wrong with it")
    caught: dict[str, str | None] = {}
    for name, mutant in MUTANTS.items():
        outcome = first_failure(load_factory(f"mutant:{name}"), seed=seed)
        caught[name] = outcome and outcome.invariant
        output.say(f"{name:<24} {caught[name] or 'SURVIVED':<22} {mutant.bug}")
    wrongly = {}
    for name in CORRECT:
        outcome = first_failure(load_factory(name), seed=seed)
        wrongly[name] = outcome and outcome.detail
        output.say(
            f"{name:<24} {'WRONGLY CAUGHT' if outcome else 'passes':<22} {outcome.detail if outcome else ''}".rstrip()
        )
    alive = [n for n, by in caught.items() if by is None]
    output.say(f"{len(caught) - len(alive)} of {len(caught)} caught")
    return not alive and not any(wrongly.values()), {"mutants": caught, "correct": wrongly}


def _soak(
    output: Output, name: str, make: Factory, minutes: float, seed: int, case_file: Path
) -> tuple[bool, dict[str, Any]]:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    spoken = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("soak")

        def progress(histories: int, steps: int, seconds: float) -> None:
            nonlocal spoken
            text = f"{seconds:6.0f} s of {60 * minutes:.0f}: {histories} histories, {steps} request-steps"
            bar.update(task, description=text)
            if not console.is_terminal and time.perf_counter() - spoken > 30:
                spoken = time.perf_counter()
                typer.echo(text, err=True)

        result = soak(make, minutes, seed, progress)
    word = "PASS" if result.passed else "FAIL"
    output.say(
        f"{word}  soak of {name}, seed {seed}: {result.histories} histories, {result.request_steps} request-steps "
        f"in {result.seconds:.0f} s"
    )
    if not result.passed:
        _explain(output, name, result.detail, result.case, case_file)
    report = {"adapter": name, "seed": seed, "passed": result.passed, "detail": result.detail}
    report |= {"histories": result.histories, "request_steps": result.request_steps, "seconds": result.seconds}
    return result.passed, {**report, "case": result.case and result.case.to_json()}


def _replay(output: Output, make: Factory, file: Path) -> tuple[bool, dict[str, Any]]:
    if file.stat().st_size > _MAX_CASE_BYTES:
        raise CheckpointError(str(file), f"at most {_MAX_CASE_BYTES} bytes", file.stat().st_size)
    case = Case.from_json(file.read_text(encoding="utf-8"))
    found, steps = {}, 0
    judges = {i.judge: i.name for i in INVARIANTS if i.judge is not None} | {whole: "rows and state"}
    for judge, name in judges.items():
        detail, steps = play(case, make, judge)
        found[name] = detail
        output.say(f"{'FAIL' if detail else 'PASS'}  {name:<22} {detail or ''}".rstrip())
    return not any(found.values()), {"case": case.to_json(), "request_steps": steps, "found": found}
