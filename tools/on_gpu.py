"""One command that turns ten minutes of a GPU into checks and figures, and loses nothing if it is cut off.

Nothing has to be installed but torch, Triton and pytest: sources are read where they lie. Every step is a process group
with a deadline; results.json holds all that ended, at every moment. Example, on a GPU and on none:

    python tools/on_gpu.py --stage first --out build/gpu
    python tools/on_gpu.py --stage first --out build/gpu --stand-in
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from on_gpu import timings
from on_gpu.runner import NOT_REACHED, OK, SKIPPED, Record, Results, run
from on_gpu.steps import STAGES, Asked, stage

_BUDGET_S = 570.0
_FILES = ("results.json", "log.txt", "records.jsonl", "bench.jsonl", "fused.jsonl", "tune.jsonl", "peers.jsonl")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default=STAGES[0], help="first: proof and the timings that decide")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder of results (default: $OUT)")
    parser.add_argument(
        "--budget", type=float, default=_BUDGET_S, metavar="SECONDS", help="for the stage (%(default)s)"
    )
    parser.add_argument("--step", action="append", metavar="NAME", help="only this step; may be given again")
    parser.add_argument("--earlier", type=Path, metavar="DIR", help="timings of an earlier --out to go on with")
    parser.add_argument("--peer-file", action="append", default=[], metavar="NAME=PATH", help="as of kvcondense bench")
    parser.add_argument("--plan", action="store_true", help="print the steps with their seconds, run none")
    parser.add_argument("--stand-in", action="store_true", help="a dry run without a GPU: tiny cases, interpreted")
    parser.add_argument(
        "--json", metavar="FILE", help="the plan or the results once more, as JSON ('-': standard output)"
    )
    return parser.parse_args()


def main() -> int:
    """Run the stage; 0 only if every step is ok."""
    given = arguments()
    to_stdout = given.json == "-"

    def say(text: str) -> None:
        print(text, file=sys.stderr if to_stdout else sys.stdout, flush=True)

    if given.out is None and not given.plan:
        say("error: --out: expected a folder, got none ($OUT is not set)")
        return 2
    if given.budget <= 0:
        say(f"error: --budget: expected more than 0 seconds, got {given.budget:g}")
        return 2
    out = Path(given.out or ".").resolve()
    steps = stage(given.stage, Asked(out, given.stand_in, given.peer_file))
    unknown = set(given.step or ()) - {s.name for s in steps}
    if unknown:
        say(f"error: --step: expected one of {', '.join(s.name for s in steps)}, got {', '.join(sorted(unknown))}")
        return 2
    steps = [s for s in steps if not given.step or s.name in given.step]
    if given.plan:
        scale = given.budget / sum(s.seconds for s in steps)
        for step in steps:
            say(f"{step.seconds * scale:>5.0f} s  {step.name:<13} {step.does}")
        write(given.json, {"stage": given.stage, "steps": {s.name: round(s.seconds * scale, 1) for s in steps}})
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for name in _FILES[3:] if given.earlier else ():
        if (given.earlier / name).exists() and not (out / name).exists():
            shutil.copy(given.earlier / name, out / name)
    head: Record = {"stage": given.stage, "budget": given.budget, **({"stand_in": True} if given.stand_in else {})}
    results = run(steps, out, given.budget, head, say)
    for line in summary(results):
        say(line)
    write(given.json, results.whole())
    return 0 if all(good(step, given.stand_in) for step in results.steps) else 1


def good(step: Record, stand_in: bool) -> bool:
    """True if a step ended as it should; a stand-in lacks the programs of a GPU machine, which is no fault."""
    return step["status"] == OK or (step["status"] == SKIPPED and (stand_in or step["excused"]))


def summary(results: Results) -> list[str]:
    """Timings beside what was expected, then a line for each step, which is the end of the output."""
    found = [r for step in results.steps for r in step.get("records", [])]
    device = next((r["device"] for r in found if "device" in r), "no GPU")
    table = timings.table(found, device)
    lines = ["", *table] if len(table) > 1 else []
    lines += ["", f"{'step':<14}{'status':<13}{'seconds':>8}  figure"]
    for step in results.steps:
        figure = step.get("reason") or step.get("figure", "")
        lines.append(f"{step['name']:<14}{step['status']:<13}{step['seconds']:>8.1f}  {figure}")
    skipped = sum(r.get("outcome") == "skipped" for r in found)
    if skipped and not results.head.get("stand_in"):
        lines.append(f"FAILED: there is a GPU, and {skipped} tests of it were skipped")
    if any(step["status"] == NOT_REACHED for step in results.steps):
        lines.append("FAILED: the plan was not finished")
    return [*lines, "a stand-in's times mean nothing"] if results.head.get("stand_in") else lines


def write(path: str | None, content: Any) -> None:
    """To the file of --json, if there is one."""
    text = json.dumps(content, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
    elif path is not None:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
