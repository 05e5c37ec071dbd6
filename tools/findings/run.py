"""Every implementation in a process of its own, some at a time, each with a limit; and what came of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from findings.registry import Implementation

ROOT = Path(__file__).resolve().parents[2]
CASTS = "casts"
"""In the place of an implementation's name: the interpreter's casts."""
_VERSIONS = ("kvcondense", "torch", "triton", "numpy", "ml_dtypes")
_KINDS = {"invariant": "invariants", "width": "widths", "chunks": "chunks", "wrong": "wrong"}
Record = dict[str, Any]
Say = Callable[[str], None]


def run(chosen: list[Implementation], peers: Path, jobs: int, minutes: float, say: Say) -> Record:
    """Results by name, and what they were made with."""
    with ThreadPoolExecutor(jobs) as pool:
        names = [CASTS, *(about.name for about in chosen)]
        casts, *found = pool.map(lambda name: _watched(name, peers, minutes, say), names)
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "versions": {name: metadata.version(name) for name in _VERSIONS},
        "casts": next((line["casts"] for line in casts if line["kind"] == CASTS), {}),
        "results": {about.name: gathered(lines) for about, lines in zip(chosen, found, strict=True)},
    }


def gathered(lines: list[Record]) -> Record:
    """The lines of one process: what it said of itself, its invariants, its widths, and why it ended early."""
    about = next((line for line in lines if line["kind"] == "about"), {})
    found: Record = {key: value for key, value in about.items() if key != "kind"}
    for kind, name in _KINDS.items():
        found[name] = [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == kind]
    why = [line["why"] for line in lines if line["kind"] == "error"]
    return {**found, "error": why[0] if why else ""}


def unexpected(chosen: list[Implementation], report: Record) -> list[str]:
    """What differs from what is known: sentences."""
    found = []
    for about in chosen:
        result = report["results"][about.name]
        if result["error"]:
            found.append(f"{about.name}: {result['error']}")
        found += [f"{about.name}: {w['what']} was not seen" for w in result["wrong"] if not w["seen"]]
        found += [f"{about.name}: chunks of {c['lengths']}: {c['detail']}" for c in result["chunks"] if c["detail"]]
        failed = tuple(i["name"] for i in result["invariants"] if i["detail"])
        if failed != about.fails:
            found.append(
                f"{about.name}: fails {', '.join(failed) or 'nothing'}, known {', '.join(about.fails) or 'none'}"
            )
    return found


def _watched(name: str, peers: Path, minutes: float, say: Say) -> list[Record]:
    """The lines of ``--one name``; an error's line last, if it did not end well or in time."""
    examples, begun, lines, late = ROOT / "examples" / "foreign", time.monotonic(), [], threading.Event()
    paths = [str(examples), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "KVCONDENSE_PEERS": str(peers),
        "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tools" / "findings.py"), "--one", name]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(60 * minutes, end)
    timer.start()
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    for text in process.stdout:
        lines.append(json.loads(text))
        say(f"{time.monotonic() - begun:5.0f} s  {name}: {_told(lines[-1])}")
    code = process.wait()
    timer.cancel()
    reader.join()
    if late.is_set():
        lines.append({"kind": "error", "why": f"not done after {minutes:g} minutes"})
    elif code and not any(line["kind"] == "error" for line in lines):
        last = errors[-1].strip() if errors else "no word"
        lines.append({"kind": "error", "why": f"ended with {code}: {last}"})
    if lines and lines[-1]["kind"] == "error":
        say(f"{time.monotonic() - begun:5.0f} s  {name}: {_told(lines[-1])}")
    return lines


def _told(line: Record) -> str:
    if line["kind"] == "invariant":
        status = "skipped" if line["skipped"] else "FAIL" if line["detail"] else "pass"
        return f"{line['name']}: {status} {line['skipped'] or line['detail']}".rstrip()
    if line["kind"] == "wrong":
        return f"{line['what']}: {'seen' if line['seen'] else 'NOT SEEN'}"
    if line["kind"] == "chunks":
        return f"{line['spec'].split()[0]} in chunks of {line['lengths']}: {line['detail'] or 'pass'}"
    if line["kind"] == "width":
        return f"verify steps of {line['spec']}: fail with drafts {line['fails'] or 'never'}"
    return line.get("why") or line["kind"]
