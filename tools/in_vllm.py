"""The vLLM plugin inside vLLM itself, on this CPU: its compressor modules, its engine, and where nothing is touched.

modules: vLLM's attention layers on vLLM's own pages and metadata play histories of requests; after every step all bytes
of the pages are compared between vLLM's kernels and the plugin, then deliberate errors must be seen. latents: the same
of V4.1's compressors, their latents and rings, planned and run as on a CPU and as on a GPU. engine: a small random
DeepSeek-V4 generates tokens without the plugin and with it. off: without KVCONDENSE_VLLM=1, and in a version whose
sources nobody read, nothing is touched. Where vLLM's C++ operators need more than this processor has, its Triton
kernels stand for its compressor, interpreted, and plain torch for the rest. ``make vllm`` prepares the environment.

Exit status 1 if a comparison fails or an error is not seen. Example:

    python tools/in_vllm.py --only modules --json build/vllm.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main() -> int:
    """Run what is asked for; 1 if something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", metavar="PART", choices=("modules", "latents", "engine", "off"), help="%(choices)s; all of them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    given = parser.parse_args()

    from in_vllm import run

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    report = run.run((given.only,) if given.only else run.PARTS, say)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in run.sentences(report):
        print(line)
    return 1 if run.failed(report) else 0


if __name__ == "__main__":
    sys.exit(main())
