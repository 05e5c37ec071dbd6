"""Records as JSON lines, each in its file before the next is made; files that were cut off can be gone on with."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcondense import files
from kvcondense.errors import RangeError, UnsupportedError

Record = dict[str, Any]
_MOST_BYTES = 16 << 20


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


def read(path: Path, argument: str, what: str) -> list[Record]:
    """Records of a file that ``what`` made, without a last line that was cut off; ``argument``: named in errors."""
    if path.stat().st_size > _MOST_BYTES:
        raise RangeError(argument, f"a file of at most {_MOST_BYTES} bytes", f"{path}, of {path.stat().st_size}")
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")  # a whole line ends in one
        records = [json.loads(line) for line in lines if line]
        if rest and (last := _parsed(rest)) is not None:
            records.append(last)
    except (ValueError, RecursionError) as error:
        raise UnsupportedError(argument, f"JSON lines of {what}", f"{path} ({error})") from error
    if not records or not all(isinstance(r, dict) for r in records) or "machine" not in records[0]:
        raise UnsupportedError(argument, f"JSON lines of {what}", path)
    return records


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


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


def resumed(path: Path | None, machine: Mapping[str, Any], what: str) -> tuple[Record | None, list[Record]]:
    """(first record, finished records) of a file to go on with; (None, []) if there is no file yet.

    Raises UnsupportedError if it is not ``what``'s, or was made on another machine, with other versions or sources.
    """
    if path is None or str(path) == "-":
        raise UnsupportedError("--resume", "--json FILE, to go on with", "none" if path is None else path)
    if not path.exists():
        return None, []
    head, *rest = read(path, "--resume", what)
    there = head["machine"]
    differing = [k for k in {**machine, **there} if machine.get(k) != there.get(k)]
    if differing:

        def named(of: Mapping[str, Any]) -> str:
            return ", ".join(f"{k} {of.get(k, 'none')}" for k in differing)

        raise UnsupportedError("--resume", f"a file made with {named(machine)}", f"{path}, with {named(there)}")
    return head, finished([head, *rest])
