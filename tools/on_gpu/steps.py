"""The plan: steps of both stages in the order of what they can tell, with the seconds that each may take."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from on_gpu import timings
from on_gpu.runner import Record, Step

STAGES = ("first", "second")
_PYTEST = ("-m", "pytest", "tests/gpu", "-p", "no:benchmark", "-p", "no:cacheprovider", "-W", "default")
_PLUGIN = ("-p", "on_gpu.tests_log")


@dataclass(frozen=True)
class Asked:
    """What the command line said."""

    out: Path
    stand_in: bool
    peer_files: Sequence[str] = ()

    @property
    def environment(self) -> dict[str, str]:
        """Kernels are compiled, or interpreted by a stand-in, which no GPU may help."""
        if self.stand_in:
            return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "ON_GPU_STAND_IN": "1"}
        return {"TRITON_INTERPRET": "0"}

    def probe(self, name: str, does: str, seconds: float, figure: object, **more: object) -> Step:
        """A step of ``on_gpu.probes``."""
        words = [sys.executable, "-m", "on_gpu.probes", name, "--records", str(self.out / "records.jsonl")]
        words += ["--stand-in"] * self.stand_in
        return Step(name, does, seconds, words, figure, environment=self.environment, **more)  # type: ignore[arg-type]

    def command(self, name: str, does: str, seconds: float, words: Sequence[str], file: str, **more: object) -> Step:
        """A step that is a kvcondense command with a file of records, which it goes on with."""
        module = "on_gpu.stand_in" if self.stand_in else "kvcondense"
        words = [sys.executable, "-m", module, *words, "--json", str(self.out / file), "--resume"]
        figure = more.pop("figure", timings.worst)
        return Step(name, does, seconds, words, figure, file, environment=self.environment, **more)  # type: ignore[arg-type]

    def tests(self, name: str, does: str, seconds: float, words: Sequence[str], before: Sequence[str] = ()) -> Step:
        """A step of pytest, under another program or by itself."""
        environment = {**self.environment, "ON_GPU_RECORDS": str(self.out / "records.jsonl")}
        missing = f"{before[0]} is not on the PATH" if before and not shutil.which(before[0]) else ""
        if before:  # freed memory goes back to the driver, so that reads of it are seen
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        command = [*before, sys.executable, *_PYTEST, *_PLUGIN, *words]
        return Step(name, does, seconds, command, _outcomes, skip=missing, environment=environment)


def stage(name: str, asked: Asked) -> list[Step]:
    """The steps of a stage; what they take together fits into the ten minutes that one call may have."""
    return _first(asked) if name == STAGES[0] else _second(asked)


def _first(asked: Asked) -> list[Step]:
    bench = ("bench", "--backend", "triton")
    cases, layers = timings.CASES, timings.LAYERS
    if asked.stand_in:
        cases, layers = timings.FEW_CASES, timings.FEW_LAYERS
    workers = str(max(1, min(14, (os.cpu_count() or 2) - 1)))
    no_ncu = "" if shutil.which("ncu") else "ncu is not on the PATH"
    return [
        asked.probe("machine", "what this is", 20, _machine, vital=True),
        asked.probe("rates", "bandwidths and the GEMM's rate", 25, _rates),
        asked.probe("barrier", "the grid barrier alone", 35, _barrier),
        asked.probe("forms", "a row of every form, and the cases to come, beside the reference", 165, _forms),
        asked.tests("tests", "tests/gpu", 100, ("-n", workers, "-m", "not alone")),
        asked.tests("alone", "tests that need the GPU to themselves", 15, ("-n", "0", "-m", "alone")),
        asked.command("timings", "steps from kv_score", 90, [*bench, *timings.options(cases)], "bench.jsonl"),
        asked.command(
            "from x",
            "steps from hidden states",
            75,
            [*bench, "--fused", *timings.options(layers)],
            "fused.jsonl",
        ),
        asked.probe("counters", "hardware counters of five kernels", 45, lambda r: f"{len(r)} kernels", skip=no_ncu),
    ]


def _second(asked: Asked) -> list[Step]:
    bench = ("bench", "--backend", "triton")
    some = asked.stand_in
    fused = timings.options(["CSA, verify 8 x 8"]) if some else ()
    rest = timings.options(["decode 16 on a boundary, ratio 4"]) if some else ()
    peers = [word for text in asked.peer_files for word in ("--peer-file", text)]
    sanitizer = ("compute-sanitizer", "--error-exitcode", "1", "--tool")
    small = ("-n", "0", "-m", "sanitizer")
    limits = ("--jobs", "1") if some else ()
    return [
        asked.probe("machine", "what this is", 20, _machine, vital=True),
        asked.command(
            "tune", "every tiling", 150, ["tune", "--dry-run", "--budget", "120", *limits], "tune.jsonl", figure=_tuned
        ),
        asked.command(
            "alternatives", "fused, GEMM and step, batch-invariant", 150, [*bench, "--fused", *fused], "fused.jsonl"
        ),
        asked.tests("memcheck", "small unfused cases", 50, small, (*sanitizer, "memcheck")),
        asked.tests("racecheck", "small unfused cases", 70, small, (*sanitizer, "racecheck")),
        asked.command(
            "peers",
            "engines' kernels from files",
            40,
            [*bench, *timings.options(timings.CASES), *peers],
            "peers.jsonl",
            skip="" if peers else "no --peer-file was given",
            excused=not peers,
        ),
        asked.command("all timings", "what the first stage left", 90, [*bench, *rest], "bench.jsonl"),
    ]


def _machine(records: list[Record]) -> str:
    found = records[-1]
    if "device" not in found:
        return "no GPU"
    return f"{found['device']}, torch {found['torch']}, triton {found['triton']}, commit {found['commit']}"


def _rates(records: list[Record]) -> str:
    found = records[0]
    return f"copy {found['memory'] / 1e12:.2f} TB/s, bf16 GEMM {found['gemm'] / 1e12:.0f} TFLOP/s"


def _barrier(records: list[Record]) -> str:
    return "; ".join(
        f"{r['each']} per processor " + ("refused" if "refused" in r else f"{r['us_per_barrier']} us, {r['late']} late")
        for r in records
    )


def _forms(records: list[Record]) -> str:
    return f"{sum(r['right'] for r in records)} of {len(records)} right"


def _outcomes(records: list[Record]) -> str:
    counts = Counter(r["outcome"] for r in records)
    return ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "none ran"


def _tuned(records: list[Record]) -> str:
    classes = [r["complete"] for r in records if "complete" in r]
    tried = [r for r in records if "block" in r]
    gains = []
    for kind, rows in dict.fromkeys((r["kind"], r["rows"]) for r in tried):
        us = [r["us"] for r in tried if (r["kind"], r["rows"]) == (kind, rows)]
        gains.append((us[0] or float("nan")) / min(u for u in us if u))
    return f"{len(classes)} classes, {len(tried)} tilings; at most {max(gains):.2f} x faster than the table's"
