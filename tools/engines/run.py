"""Every engine's cases on both backends, the deliberate errors that must be seen, and what is written of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engines.judge import FAIL, PASS, SKIPPED, Verdict, bound, judge
from engines.scenes import Kind, Memory, Scene, Step, ours, play
from kvcondense.bench.measure import machine

BACKENDS = ("reference", "cpu")
Record = dict[str, Any]
Say = Callable[[str], None]


def version_of(package: str, packages: Path) -> str:
    """Of an engine in its own folder or in this environment; empty if it is in neither."""
    folder = packages / package
    for found in metadata.distributions(path=[str(folder)]) if folder.is_dir() else ():
        if found.metadata["Name"].replace("_", "-") == package:
            return found.version
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def run(engines: Sequence[Any], packages: Path, only: str, say: Say) -> Record:
    """All cases whose engine and name contain ``only``. An engine is a module with NAME, PACKAGE, kinds and opened."""
    cases: list[Record] = []
    for engine in engines:
        kinds = [kind for kind in engine.kinds() if only.lower() in f"{engine.NAME}: {kind.name}".lower()]
        if not kinds:
            continue
        step = engine.opened(packages)
        about = {"engine": engine.NAME, "package": engine.PACKAGE, "version": version_of(engine.PACKAGE, packages)}
        for kind in kinds:
            named = {**about, "case": kind.name, "format": kind.format}
            if isinstance(step, str):
                cases.append({**named, "status": SKIPPED, "why": step})
                say(f"{SKIPPED}  {engine.NAME}: {kind.name}: {step}")
            else:
                cases += [{**named, **found} for found in _case(kind, step)]
                for found in cases[-len(BACKENDS) - len(kind.mutants) :]:
                    say(sentence(found))
    return {"machine": _machine(), "versions": _versions(), "cases": cases}


def casts(say: Say) -> Record:
    """Casts that Triton's interpreter gets wrong, as it is and corrected: only with none wrong do kernels count."""
    try:
        from engines import interpreter
    except ImportError as error:
        return {"why": f"not installed: {error.name}"}
    found = {}
    for name, corrected in (("as it is", False), ("corrected", True)):
        interpreter.correct(corrected)
        found[name] = {kind: {"wrong": wrong, "of": of} for kind, (wrong, of) in interpreter.wrong_casts().items()}
        counts = ", ".join(f"{kind} {count['wrong']} of {count['of']}" for kind, count in found[name].items())
        say(f"Triton's interpreter, {name}: wrong casts to {counts}")
    return found


def _case(kind: Kind, step: Callable[[Scene, Memory, Step], None]) -> list[Record]:
    """One scene: the engine once, kvcondense on each backend, then its deliberate errors."""
    scene, begun, found = Scene(kind), time.monotonic(), []
    theirs = play(scene, step)
    engine_s = time.monotonic() - begun
    for backend in BACKENDS:
        begun = time.monotonic()
        verdict = judge(scene, ours(scene, backend), theirs)
        seconds = round(engine_s + time.monotonic() - begun, 2)
        about = {"backend": backend, "status": verdict.status, "why": verdict.why, "bound": bound(scene)}
        found.append({**about, **_counts(verdict), "seconds": seconds})
    for mutant in kind.mutants:
        verdict = judge(scene, ours(scene, BACKENDS[-1], mutant), theirs)
        seen = verdict.status == FAIL
        found.append(
            {"mutant": mutant, "status": PASS if seen else FAIL, "why": verdict.why or "not seen", **_counts(verdict)}
        )
    return found


def _counts(verdict: Verdict) -> Record:
    return {
        "state_bytes": verdict.state_bytes,
        "state_differ": verdict.state_differ,
        "cache_bytes": verdict.cache_bytes,
        "cache_differ": verdict.cache_differ,
        "apart": float(f"{verdict.apart:.2e}"),
    }


def sentence(case: Record) -> str:
    """A case in one line."""
    head = f"{case['status']:7}  {case['engine']} {case['version']}: {case['case']}"
    if "mutant" in case:
        return f"{head}, wrong on purpose ({case['mutant']}): {case['why']}"
    if case["status"] == SKIPPED:
        return f"{head}: {case['why']}"
    states = f"{case['state_differ']} of {case['state_bytes']} bytes of state"
    rows = f"{case['cache_differ']} of {case['cache_bytes']} of rows"
    return f"{head}, {case['backend']}: differ {states}, {rows}" + (f" ({case['why']})" if case["why"] else "")


def failed(report: Record) -> list[Record]:
    """Cases that decide the exit status: a skip does not; casts that stay wrong do."""
    corrected = report.get("interpreter", {}).get("corrected", {})
    wrong = [{"case": f"casts to {kind}", **count} for kind, count in corrected.items() if count["wrong"]]
    return wrong + [case for case in report["cases"] if case["status"] == FAIL]


def _machine() -> Record:
    return {"processor": machine()["processor"], "threads": torch.get_num_threads()}


def _versions() -> Record:
    names = ("kvcondense", "torch", "numpy", "triton", "ml_dtypes", "mlx")
    return {name: found for name in names if (found := version_of(name, Path()))}
