"""A small DeepSeek-V4 reads a text, kvcondense compresses what its layers saw, and transformers checks the rows.

Makes a model with transformers (real head_dim 512, RoPE 64, ratios 4 and 128, an indexer; narrow everywhere else),
saves it, runs a text through it in fp32 and keeps what enters each compressor. transformers' compressors turn that into
rows in fp32 and in bf16, and so does the ``kvcondense compress`` command, from the saved checkpoint and hidden states.
Then cache files made in one go, in chunks, and interrupted and resumed are compared, and files as engines hold them.

Run: make demo, or python tools/demo.py --out build/demo
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from demo.report import Report

_STEPS = 20


def main() -> int:
    """Run everything; exit status 1 if any comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the model and the results")
    parser.add_argument("--json", type=Path, help="write the comparison as JSON to this file")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(
        "This takes about half a minute on two cores; the first time, 20 s more to compile the CPU kernels.", flush=True
    )
    report = Report(_STEPS)
    with report.progress:
        sentences = run(args.out, report)
    print()
    print("\n".join(sentences))
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.seconds.items() if name != "all")
    print(f"\nSeconds: {parts}; all {report.seconds['all']:.0f}. Picture: {args.out / 'demo.png'}")
    if args.json:
        result = {"passed": report.ok, "seconds": report.seconds, "checks": report.checks}
        args.json.write_text(json.dumps(result, indent=2))
    return 0 if report.ok else 1


def run(out: Path, report: Report) -> list[str]:
    """All parts; what came of it, in three sentences."""
    report.begin("imports")
    report.step("importing torch and transformers")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from demo import compare, model, picture  # they import torch and transformers
    from transformers.utils import logging

    from kvcondense.backends.cpu import native

    logging.disable_progress_bar()
    report.begin("CPU kernels")
    cached = {kernel.name: kernel.cached for kernel in native.status()}
    for kernel in native.STEP + native.PLAN + native.MARKS:
        report.step(f"CPU kernel {kernel}" + ("" if cached[kernel] else ": compiling, once for this machine"))
        native.address(kernel)
    report.begin("rows")
    report.say(f"Rows, beside those of transformers ({model.TOKENS} bytes of {model.TEXT.name}, 3 layers)")
    found = compare.compare_rows(out, report)
    report.begin("files")
    report.say("Files of the same rows")
    compare.compare_files(out / "bf16", report)
    report.begin("picture")
    report.step("drawing")
    picture.draw(found, out / "demo.png")
    report.end()
    return picture.sentences(found, report.ok)


if __name__ == "__main__":
    sys.exit(main())
