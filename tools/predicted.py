"""What the model says of every architecture, for a few cases: ``python tools/predicted.py`` writes the baseline.

``python tools/predicted.py --table`` prints it as the table of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "benchmarks" / "baselines" / "predicted.json"
CASES = (
    "decode 64 on a boundary, ratio 128",
    "decode 256 on a boundary, ratio 128",
    "decode 64 on a boundary, ratio 4",
    "prefill 1 x 8192, ratio 128",
    "prefill 1 x 8192, ratio 4",
    "prefill 1 x 65536, ratio 4",
    "HCA, decode 1 within a window",
    "HCA, decode 64 on a boundary",
    "CSA, decode 1 within a window",
    "CSA + indexer, decode 1 within a window",
    "HCA, prefill 8192",
    "CSA, prefill 8192",
)


def predictions() -> dict[str, Any]:
    """By architecture and case: microseconds, floor, and what decides."""
    import triton

    from kvcondense.bench.predict import table
    from kvcondense.bench.predict.machines import MACHINES
    from kvcondense.bench.predict.model import predict

    found: dict[str, Any] = {"triton": triton.__version__, "predicted": {}}
    for arch, machine in MACHINES.items():
        print(f"{arch}, {machine.name}", flush=True)
        answers = {name: predict(table.CASES[name], arch, machine) for name in CASES}
        found["predicted"][arch] = {
            name: {"us": round(a.us, 2), "floor_us": round(a.floor_us, 2), "bound": a.bound, "form": a.form}
            for name, a in answers.items()
        }
    return found


def markdown(found: dict[str, Any]) -> str:
    """Cases by architectures: microseconds, and how many times the floor."""
    every = found["predicted"]
    lines = [f"| us, x floor | {' | '.join(every)} |", "|---" * (len(every) + 1) + "|"]
    for name in CASES:
        cells = [f"{c['us']:.3g}, {c['us'] / c['floor_us']:.2g}" for c in (every[arch][name] for arch in every)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the baseline, or prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the baseline as Markdown")
    if parser.parse_args().table:
        print(markdown(json.loads(FILE.read_text(encoding="utf-8"))), end="")
    else:
        FILE.write_text(json.dumps(predictions(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
