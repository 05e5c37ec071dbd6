"""The work of ``kvcondense verify``: the golden run of a backend, or of a mutant, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcondense.backends import Backend
from kvcondense.cli.output import Output
from kvcondense.cli.work import page
from kvcondense.conformance.invariants import first_failure
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.own import load_factory
from kvcondense.errors import DtypeError, RangeError
from kvcondense.golden.compare import Comparison
from kvcondense.golden.inputs import GoldenCase, make_inputs
from kvcondense.golden.run import compare, rules, run_backend, run_reference
from kvcondense.spec import Rounding


def run(
    output: Output,
    *,
    kind: str | None,
    ratio: int | None,
    preset: str,
    backend: str,
    history: int,
    start_pos: str | None,
    rotate: bool,
    format: str,
    batch: int,
    scale: float,
    seed: int,
    mutant: str | None,
    list_mutants: bool,
    report_file: Path | None,
) -> bool | None:
    """Whether all outputs are right; of a mutant, whether nothing catches it."""
    say = output.say
    if list_mutants:
        for name in MUTANTS:
            say(name)
        output.finish({"mutants": {m.name: m.bug for m in MUTANTS.values()}})
        return None
    impl: str | Backend = MUTANTS[mutant] if mutant else backend
    kind = _kind(kind, ratio)
    case = GoldenCase(
        kind=kind,
        preset=preset,
        batch=batch,
        start_pos=_positions(start_pos),
        history=history,
        rotate=rotate,
        scale=scale,
        seed=seed,
        rounding=Rounding.REFERENCE,
        format=format,
    )
    inputs = make_inputs(case)
    spec = inputs.spec
    say(
        f"{kind}: ratio {spec.ratio}, window {spec.window}, head_dim {spec.head_dim}, preset {preset}, "
        f"format {format}, backend {mutant or backend}"
    )
    say(
        f"{batch} rows at {_span(inputs.start_pos)}, {_span([h.shape[0] for h in inputs.x_history])} earlier tokens, "
        f"{'rotate' if rotate else 'no rotate'}, seed {seed}"
    )
    ending = sum((p + 1) % spec.ratio == 0 for p in inputs.start_pos)
    say(f"the decoded token ends a window in {ending} of {batch} rows; where it does not, kv is 0")
    results = compare(inputs, run_backend(inputs, impl), run_reference(inputs))
    say(f"{'output':<12} {'result':<6} {'worst |error|':>14} {'bit-equal':>10} {'worst ulp':>10}")
    for name, r in results.items():
        equal = "-" if r.equal is None else f"{r.equal:.3%}"
        ulp = "-" if r.worst_ulp is None else str(r.worst_ulp)
        say(f"{name:<12} {_word(r.passed):<6} {r.worst:>14.3g} {equal:>10} {ulp:>10}")
        if r.detail:
            say(f"             {r.detail}")
    _why_right(output, results, rules(inputs))
    passed = all(r.passed for r in results.values())
    report: dict[str, Any] = {
        "case": {
            "kind": kind,
            "preset": preset,
            "history": history,
            "start_pos": inputs.start_pos,
            "rotate": rotate,
            "format": format,
        },
        "backend": mutant or backend,
        "outputs": {
            n: {
                "passed": r.passed,
                "worst": r.worst,
                "worst_ulp": r.worst_ulp,
                "bit_equal": r.equal,
                "ulps": dict(r.ulps),
                "allowed": rules(inputs)[n],
            }
            for n, r in results.items()
        },
    }
    if mutant:
        caught = None if passed else ("this case", "")
        if passed:
            say("This case cannot tell; trying the conformance kit.")
            outcome = first_failure(load_factory(f"mutant:{mutant}"))
            caught = outcome and (outcome.invariant, outcome.detail)
        report["caught_by"] = caught and caught[0]
        say(f"mutant {mutant} ({MUTANTS[mutant].bug}): " + (f"CAUGHT by {caught[0]}" if caught else "SURVIVED"))
        if caught and caught[1]:
            say(f"  {caught[1]}")
        passed = caught is None
    if report_file is not None:
        _page(report_file, report, results)
        say(f"written to {report_file}")
    output.finish(report)
    return passed


def _why_right(output: Output, results: dict[str, Comparison], allowed: dict[str, str]) -> None:
    """For outputs that pass and are not the reference's bits: what was allowed, and where differences are from."""
    odd: dict[str, list[str]] = {}
    for name, r in results.items():
        if r.passed and r.equal is not None and r.equal < 1:
            odd.setdefault(allowed[name], []).append(name)
    for rule, outputs in odd.items():
        output.say(f"{', '.join(outputs)} may differ in bits: each element e is within {rule}")
    if odd:
        output.say("(sums in another order differ in their last bits; where a value is near 0, that is many ulp)")


def _page(path: Path, report: dict[str, Any], results: dict[str, Comparison]) -> None:
    rows = [
        (name, _word(r.passed), r.worst, r.worst_ulp, None if r.equal is None else f"{r.equal:.3%}", r.detail)
        for name, r in results.items()
    ]
    parts = [
        page.heading("Outputs", "Against the original kernel's golden reference; kv_bytes counts bytes that differ."),
        page.table(("output", "result", "worst |error|", "worst ulp", "bit-equal", "detail"), rows),
        page.heading("How far elements are from the reference", "Zeros on both sides are left out."),
        page.histogram({name: dict(r.ulps) for name, r in results.items() if r.ulps}),
    ]
    facts = {**report["case"], "backend": report["backend"]}
    if "caught_by" in report:
        facts["mutant caught by"] = report["caught_by"] or "nothing: it survived"
    page.write(path, "kvcondense verify", facts, parts)


def _kind(kind: str | None, ratio: int | None) -> str:
    if ratio is None:
        return kind or "hca"
    kinds = {128: ("hca",), 4: ("csa", "indexer")}
    if ratio not in kinds or (kind or kinds[ratio][0]) not in kinds[ratio]:
        raise RangeError("--ratio", "128 (hca) or 4 (csa, indexer)", f"{ratio} with --kind {kind}" if kind else ratio)
    return kind or kinds[ratio][0]


def _positions(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DtypeError("--start-pos", "whole numbers separated by commas", repr(text)) from None


def _span(values: list[int]) -> str:
    distinct = sorted(set(values))
    return f"{distinct[0]}" if len(distinct) == 1 else ", ".join(map(str, values))


def _word(passed: bool) -> str:
    return "PASS" if passed else "FAIL"
