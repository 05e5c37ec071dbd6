"""Microseconds of CPU steps, alone and beside a process that does the same; OpenMP's threads spin or sleep.

Example: python tools/side_by_side.py --seconds 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

from kvcondense.bench.cases import CASES, make_inputs
from kvcondense.bench.runners import BARE, Kvcondense

NAMES = ("prefill 8192, ratio 4", "decode 16 on a boundary, ratio 128", "decode 16 on a boundary, ratio 4")
POLICIES = {"spinning": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}


def timed(name: str, seconds: float) -> float:
    """Mean microseconds of the bare step of a case, done over and over for ``seconds``."""
    runner = Kvcondense(make_inputs(CASES[name]), "cpu", BARE)
    state = runner.primed()
    runner.step(state)
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        runner.step(state)
        steps += 1
    return 1e6 * (time.perf_counter() - begin) / steps


def together(count: int, seconds: float, environment: dict[str, str]) -> list[float]:
    """The first of ``count`` processes side by side: a time for each case."""
    words = [sys.executable, __file__, "--inside", "--seconds", str(seconds)]
    clean = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    runs = [subprocess.Popen(words, env=clean | environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    said = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise RuntimeError("a process failed; what it said is above")
    return json.loads(said[0])


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each case (default: 4)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps([timed(name, options.seconds) for name in NAMES]))
        return
    columns = {
        f"{where}, {policy}": together(count, options.seconds, environment)
        for policy, environment in POLICIES.items()
        for where, count in (("alone", 1), ("beside", 2))
    }
    if options.json:
        print(json.dumps({head: dict(zip(NAMES, times, strict=True)) for head, times in columns.items()}, indent=1))
        return
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for i, name in enumerate(NAMES):
        print(f"| {name} | " + " | ".join(f"{times[i]:.0f}" for times in columns.values()) + " |")


if __name__ == "__main__":
    main()
