"""The programs in pypto.language on a simulator or an NPU: golden cases of every kind, and mutants of the program.

Needs pypto (hw-native-sys/pypto, built from its sources), its assembler and, for a simulator, g++-15: docs/ascend.md.
Nothing is installed. The result is benchmarks/baselines/pypto.json.

Example: python tools/ascend_native.py --json build/pypto.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform as machine
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from kvcondense.backends.pypto import kernel, probe, worker
from kvcondense.golden.inputs import GoldenCase, make_inputs
from kvcondense.golden.run import compare, run_backend, run_reference

HISTORY = {"hca": 130, "csa": 20, "indexer": 20}
"""Earlier tokens, one call each; a ratio-128 window and a bit."""
MUTANTS = {
    "RoPE's pairs swapped": ("evens = pl.assemble(evens, pl.matmul(normed[:, NOPE:d], even",
                             "evens = pl.assemble(evens, pl.matmul(normed[:, NOPE:d], odd"),
    "a ring row too far": ("row = base + (p + j - (W - 1)) % RING", "row = base + (p + j - (W - 2)) % RING"),
    "ape of another phase": ("ape[phase : phase + 1, :]", "ape[0:1, :]"),
    "no bf16 before the norm": ("pl.cast(pl.cast(pooled[:, c : c + C], target_type=pl.BF16), target_type=pl.FP32)",
                                "pl.mul(pooled[:, c : c + C], 1.0)"),
}  # fmt: skip
"""What the program says, and what the mutant says instead."""


def main(words: list[str] | None = None) -> int:
    """Run everything; 0 if all cases pass and all mutants fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(words)
    name = probe.platform()
    problem = probe.problem(name)
    if problem is not None:
        print(f"cannot run: {problem}", file=sys.stderr)
        return 2
    cases = [_case(kind, rotate, history) for kind in HISTORY for history in (0, HISTORY[kind]) for rotate in (1, 0)]
    mutants = [_mutant(mutant) for mutant in MUTANTS]
    good = all(c["passed"] for c in cases) and all(m["caught"] for m in mutants)
    if options.json is not None:
        report = {
            "platform": name,
            "machine": machine.machine(),
            "versions": {package: _version(package) for package in ("pypto", "simpler", "torch")},
            "cases": cases,
            "mutants": mutants,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if good else 1


def _case(kind: str, rotate: int, history: int) -> dict[str, Any]:
    """One golden run, compared output by output."""
    began = time.perf_counter()
    inputs = make_inputs(GoldenCase(kind=kind, history=history, rotate=bool(rotate)))
    results = compare(inputs, run_backend(inputs, "pypto"), run_reference(inputs))
    found = {
        "kind": kind,
        "ratio": inputs.spec.ratio,
        "history": history,
        "rotate": bool(rotate),
        "passed": all(r.passed for r in results.values()),
        "worst": {output: float(f"{r.worst:.3g}") for output, r in results.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }
    worst = ", ".join(f"{output} {error:g}" for output, error in found["worst"].items())
    print(f"{'PASS' if found['passed'] else 'FAIL'} {kind}, history {history}, rotate {rotate}: {worst}", flush=True)
    return found


def _mutant(name: str) -> dict[str, Any]:
    """The csa case with history, by a program that is wrong; caught if an output fails."""
    old, new = MUTANTS[name]
    text = Path(kernel.__file__).read_text()
    if text.count(old) < 1:
        raise SystemExit(f"{name}: the program no longer says {old!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant_kernel.py"
        path.write_text(text.replace(old, new))
        in_process, real = worker.run, worker.kernel
        worker.kernel = _module(path)
        worker.run = lambda form, operands: worker._execute(form, probe.platform(), operands)
        try:
            inputs = make_inputs(GoldenCase(kind="csa", history=HISTORY["csa"], rotate=False))
            results = compare(inputs, run_backend(inputs, "pypto"), run_reference(inputs))
        finally:
            worker.run, worker.kernel = in_process, real
            worker._compiled.clear()
    failed = [output for output, r in results.items() if not r.passed]
    print(f"{'caught' if failed else 'SURVIVED'}: {name} ({', '.join(failed) or 'no output fails'})", flush=True)
    return {"mutant": name, "caught": bool(failed), "fails": failed}


def _module(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # its source is asked for
    specification.loader.exec_module(module)
    return module


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
