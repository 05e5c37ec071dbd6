"""One part of a run in a process of its own: its result as JSON, with how far it came and why if it fails."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """``python -m in_vllm.child PART MODE FILE``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("modules", "engine", "off", "latents"))
    parser.add_argument("mode")
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    reached = ""

    def say(text: str) -> None:
        nonlocal reached
        reached = text
        print(f"  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        try:
            result = _run(given.part, given.mode, Path(folder), say)
        except Exception as error:  # the result says how far it came
            traceback.print_exc()
            lines = f"{type(error).__name__}: {error}".splitlines()
            result = {"status": "FAIL", "reached": reached, "error": lines[0][:300]}
    given.file.write_text(json.dumps(result), encoding="utf-8")


def _run(part: str, mode: str, folder: Path, say: Any) -> dict[str, Any]:
    if part == "off":  # without kvcondense, which a part of it looks for
        from in_vllm import off

        return off.run(mode, say)
    if part == "engine":
        from in_vllm import engine

        return engine.run(mode, folder, say)
    if part == "latents":
        from in_vllm import latents

        return latents.run(folder, say)
    from in_vllm import modules

    return modules.run(folder, say)


if __name__ == "__main__":
    main()
