"""Records as JSON lines, each in its file before the next is made; files that were cut off can be gone on with."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcondense import files
from kvcondense.errors import CheckpointError, UnsupportedError
from kvcondense.files.reading import parsed
from kvcondense.files.schema import typed

Record = dict[str, Any]
_MOST_BYTES, _MOST_RECORDS = 4 << 20, 1 << 12


def text(record: Record) -> str:
    """A record's line."""
    return json.dumps(record) + "\n"


class Log:
    """Records of a run. The first says what it ran on; ``{"complete": part}`` comes behind the records of a part.

    path: a file, "-" for standard output, or None. kept: an earlier run's, that are not made again. keep_old: what the
    file holds goes to one of the same name with a ~ behind it, since it is long until the new one is complete.
    """

    def __init__(self, path: Path | None, head: Record, kept: Sequence[Record] = (), *, keep_old: bool = False) -> None:
        self.records: list[Record] = [head, *kept]
        self.complete = {r["complete"] for r in kept if "complete" in r}
        self._path = path
        lines = "".join(map(text, self.records))
        if path is None or str(path) == "-" or (path.exists() and not path.is_file()):
            self._write(lines)
            return
        if keep_old and path.is_file() and path.stat().st_size:
            shutil.copy2(path, path.with_name(path.name + "~"))
        files.write(path, lines)

    def _write(self, lines: str) -> None:
        if self._path is None:
            return
        if str(self._path) == "-":
            sys.stdout.write(lines)
            sys.stdout.flush()
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:  # a full disk names no file
            error.filename = str(self._path)
            raise

    def add(self, record: Record) -> None:
        """Keep a record; it is in the file when this returns."""
        self.records.append(record)
        self._write(text(record))

    def finish(self, part: str) -> None:
        """Say that all records of a part are there."""
        self.complete.add(part)
        self.add({"complete": part})


@dataclass
class _Head:
    """The first record, whatever else it says."""

    machine: dict[str, str | int | float | bool | None]
    rates: dict[str, float] | None = None


@dataclass
class _Any:
    """Any other record: what it may say that is looked at."""

    complete: str = ""
    case: str = ""
    runner: str = ""


@dataclass
class _Wrong:
    """A record of a runner whose rows were wrong, which has no timing."""

    runner: str


@dataclass
class _Timing:
    """A record with microseconds, whatever else it says."""

    us: float
    runner: str
    case: str = ""
    cache: str = ""
    floor_us: float = 1.0
    context: int = 1
    step: str = ""
    part: str = ""
    saved_bytes: float = 0.0
    moved_bytes: int = 0
    all_gather_bytes: int = 0
    file_bytes: float = 0.0
    swapped_bytes: float = 0.0
    of_plain: float = 1.0


_ALONGSIDE = {
    "cache": ("case", "floor_us"),
    "saved_bytes": ("case",),
    "moved_bytes": ("case", "all_gather_bytes"),
    "file_bytes": ("case",),
    "swapped_bytes": ("case", "of_plain"),
    "step": ("part",),
}
"""What a timing says -> what it must say, too."""


def check_timing(record: Record, name: str) -> None:
    """Raise CheckpointError unless tables and pictures can be made of the record: types, and numbers above 0."""
    measured = {"us", "context", *_ALONGSIDE}
    if "wrong" in record:
        typed(record, _Wrong, name)
        measured -= {"step"}
    if not record.keys() & measured:
        return
    timing = typed(record, _Timing, name)
    for key, also in _ALONGSIDE.items():
        for other in also if key in record else ():
            if other not in record:
                raise CheckpointError(f"{name} {other}", "it to be there", "nothing")
    for key in ("us", "floor_us", "context"):
        if not 0 < getattr(timing, key) < 1e18:
            raise CheckpointError(f"{name} {key}", "a number above 0", record[key])


def read(path: Path, argument: str, what: str, check: Callable[[Record, str], None] = check_timing) -> list[Record]:
    """Records of a file that ``what`` made, without a last line that was cut off; ``argument``: named in errors.

    check: raises for a record that is not as it should be. Raises UnsupportedError for any other file.
    """
    made = f"JSON lines of {what}"
    *lines, rest = files.read_text(path, made, _MOST_BYTES, argument).split("\n")  # a whole line ends in one
    try:
        records = [parsed(line, f"line {number}") for number, line in enumerate(lines, 1) if line]
        with contextlib.suppress(CheckpointError):
            records += [parsed(rest, "the last line")] if rest else []
        if not records:
            raise UnsupportedError(argument, made, path)
        if len(records) > _MOST_RECORDS:  # tables take a time that is quadratic in them
            raise UnsupportedError(argument, f"{made}, at most {_MOST_RECORDS}", f"{path}, of {len(records)}")
        typed(records[0], _Head, "the first record")
        for number, record in enumerate(records, 1):  # tables are made of the first, too
            typed(record, _Any, f"record {number}")
            check(record, f"record {number}")
    except CheckpointError as error:
        raise UnsupportedError(argument, made, f"{path} ({error})") from error
    return records


def finished(records: Sequence[Record]) -> list[Record]:
    """Without the first: records of the parts that are complete."""
    kept: list[Record] = []
    part: list[Record] = []
    for record in records[1:]:
        part.append(record)
        if "complete" in record:
            kept += part
        if "complete" in record or "failed" in record:
            part = []
    return kept


def resumed(
    path: Path | None,
    machine: Mapping[str, Any],
    what: str,
    check: Callable[[Record, str], None] = check_timing,
) -> tuple[Record | None, list[Record]]:
    """(first record, finished records) of a file to go on with; (None, []) if there is no file yet.

    Raises UnsupportedError if it is not ``what``'s, or was made on another machine, with other versions or sources.
    """
    if path is None or str(path) == "-":
        raise UnsupportedError("--resume", "--json FILE, to go on with", "none" if path is None else path)
    if not path.exists():
        return None, []
    head, *rest = read(path, "--resume", what, check)
    there = head["machine"]
    differing = [k for k in {**machine, **there} if machine.get(k) != there.get(k)]
    if differing:

        def named(of: Mapping[str, Any]) -> str:
            return ", ".join(f"{k} {of.get(k, 'none')}" for k in differing)

        raise UnsupportedError("--resume", f"a file made with {named(machine)}", f"{path}, with {named(there)}")
    return head, finished([head, *rest])
