"""Steps as child processes with deadlines, and the file that holds what came of them at every moment."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
OK, FAILED, SKIPPED, TIMED_OUT, KILLED = "ok", "failed", "skipped", "timed out", "killed"
RUNNING, NOT_REACHED = "running", "not reached"
_GRACE_S, _TAIL = 4.0, 3000
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Step:
    """A command, its planned seconds, the file of its records in the results' folder, and the figure that matters.

    skip: why it is not run; excused: a skip that nobody has to mend; vital: no step after it makes sense if it fails.
    """

    name: str
    does: str
    seconds: float
    command: Sequence[str]
    figure: Callable[[list[Record]], str]
    records: str = "records.jsonl"
    skip: str = ""
    excused: bool = False
    vital: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class Results:
    """``results.json``: every step of a stage, those of other stages kept; written beside and renamed."""

    def __init__(self, out: Path, head: Record, steps: Sequence[Step]) -> None:
        self.path, self.head = out / "results.json", head
        self.others = [s for s in self._earlier() if s["stage"] != head["stage"]]
        self.steps: list[Record] = [
            {"stage": head["stage"], "name": s.name, "status": NOT_REACHED, "seconds": 0.0} for s in steps
        ]

    def _earlier(self) -> list[Record]:
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads(self.path.read_text(encoding="utf-8"))["steps"]
        return []

    def put(self, index: int, **what: Any) -> None:
        """Change what is known of a step; it is on disk when this returns."""
        self.steps[index].update(what)
        beside = self.path.with_suffix(".json.new")
        beside.write_text(json.dumps(self.whole(), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    def whole(self) -> Record:
        """All of it."""
        return {**self.head, "steps": [*self.others, *self.steps]}


class Interrupted(BaseException):
    """This process was asked to end."""


def run(steps: Sequence[Step], out: Path, budget: float, head: Record, say: Callable[[str], None]) -> Results:
    """Run the steps in their order. Each may use what those before it left of their time."""
    results, begun = Results(out, head, steps), time.monotonic()
    scale, planned, broken = budget / max(sum(s.seconds for s in steps), 1e-9), 0.0, ""
    before = [signal.signal(s, _interrupt) for s in (signal.SIGTERM, signal.SIGINT)]
    try:
        for index, step in enumerate(steps):
            planned += step.seconds * scale
            reason = step.skip or broken
            if reason:
                results.put(index, status=SKIPPED, reason=reason, excused=step.excused and not broken, records=[])
                say(f"{step.name}: skipped, {reason}")
                continue
            say(f"{step.name}: {step.does} (until {planned:.0f} s)")
            results.put(index, status=RUNNING)
            outcome = _one(step, out, begun + planned, results, index)
            say(f"{step.name}: {outcome} after {results.steps[index]['seconds']:.0f} s")
            if outcome != OK:
                say("\n".join("    " + line for line in results.steps[index]["tail"].splitlines()[-8:]))
                broken = f"{step.name} {outcome}" if step.vital else ""
    except Interrupted:
        for index, step in enumerate(results.steps):
            if step["status"] == RUNNING:  # between its start and its end there is more than the wait
                results.put(index, status=KILLED, records=[])
        say("ended from outside: what there is has been written")
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    return results


def _interrupt(number: int, frame: Any) -> None:
    del frame
    signal.signal(number, signal.SIG_IGN)  # nothing interrupts the writing of what there is
    raise Interrupted


def _one(step: Step, out: Path, deadline: float, results: Results, index: int) -> str:
    """Run one step to its end or its deadline; its status."""
    log, records = out / "log.txt", out / step.records
    at = [p.stat().st_size if p.exists() else 0 for p in (log, records)]
    was = _identity(records)
    if step.records != "records.jsonl":
        at[1] = 0  # a file of the step's own, which it goes on with
    begun, status = time.monotonic(), KILLED
    with log.open("ab") as output:
        child = subprocess.Popen(
            step.command, cwd=ROOT, env=_environment(step), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, preexec_fn=_own_group,
        )  # fmt: skip
        try:
            code = child.wait(max(deadline - time.monotonic(), 0.0))
            status = OK if code == 0 else FAILED if code > 0 else KILLED
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        finally:
            _end(child)
            found = _lines(records, at[1]) if _identity(records) != was else []  # a refused file is none of its own
            results.put(
                index, status=status, seconds=round(time.monotonic() - begun, 1), exit=child.returncode,
                figure=_figure(step, found), tail=_tail(log, at[0]), records=found,
            )  # fmt: skip
    return status


def _own_group() -> None:
    """Of the child, before it begins: a group of its own, which ends with this process even if that is killed."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole group, also what is left of it if the child has ended: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        if child.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE_S)


def _environment(step: Step) -> dict[str, str]:
    paths = [str(ROOT / "src"), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **settings, **step.environment}


def _identity(path: Path) -> tuple[int, ...]:
    """Of a file's content: it changes when the file is written or replaced."""
    try:
        of = path.stat()
    except OSError:
        return ()
    return of.st_ino, of.st_mtime_ns, of.st_size


def _lines(path: Path, offset: int) -> list[Record]:
    """Records from ``offset`` on; one that was cut off is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_bytes()[offset:].splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _tail(path: Path, offset: int) -> str:
    return path.read_bytes()[offset:][-_TAIL:].decode("utf-8", errors="replace")


def _figure(step: Step, records: list[Record]) -> str:
    try:
        return step.figure(records)
    except (ArithmeticError, KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
        return f"none ({type(error).__name__})"
