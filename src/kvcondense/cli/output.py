"""What commands print: lines and tables for people, as wide as their terminal, and the same as JSON when asked."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from kvcondense import files

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE ('-': standard output).")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors alone: the exit status, and --json, say the rest.")]
_HANG, _GAP = 6, 2
_Item = TypeVar("_Item")


def width() -> int | None:
    """Columns to fit into: those of the terminal (COLUMNS overrides); None in a pipe, where lines stay whole."""
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return max(40, shutil.get_terminal_size().columns)
    return None


class Output:
    """Lines go to standard output, or to standard error if the JSON takes its place. No colour, no control codes.

    quiet: there are no lines.
    """

    def __init__(self, json_file: Path | None, *, quiet: bool = False) -> None:
        self.json_file = json_file
        self.to_stdout = str(json_file) == "-"
        self.quiet = quiet

    def say(self, text: str = "", *, wrap: bool = True) -> None:
        """Print lines; what does not fit is continued below, indented, unless it should not be."""
        if self.quiet:
            return
        columns = width() if wrap else None
        typer.echo("\n".join(fit(line, columns) for line in text.split("\n")), err=self.to_stdout)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print rows under their columns; cells are wrapped where the terminal is narrow, but no word is cut.

        Where even that does not fit, each row becomes a paragraph: its first cell, then the others by name.
        """
        if self.quiet:
            return
        lines = [[str(value) for value in row] for row in (columns, *rows)]
        widths = _widths(lines, width())
        if widths is None:
            for first, *rest in lines[1:]:
                self.say(first)
                self.say("  " + "; ".join(f"{k} {v}" for k, v in zip(columns[1:], rest, strict=True)))
            return
        for line in lines:
            cells = [_wrap(text, w) or [""] for text, w in zip(line, widths, strict=True)]
            for parts in zip_longest(*cells, fillvalue=""):
                text = (" " * _GAP).join(f"{part:<{w}}" for part, w in zip(parts, widths, strict=True))
                typer.echo(text.rstrip(), err=self.to_stdout)

    def markdown(self, text: str) -> None:
        """Print a Markdown table: as it is into a pipe, in columns on a terminal."""
        if width() is None:
            self.say(text)
            return
        head, _, *rows = map(cells, text.strip().splitlines())
        self.table(head, rows)

    def track(self, items: Iterable[_Item], total: int, what: str) -> Iterator[_Item]:
        """The items, behind a bar that says how far they are; in a pipe, where nothing moves, without one."""
        stream = sys.stderr if self.to_stdout else sys.stdout
        if self.quiet or not stream.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, total, console=Console(file=stream), transient=True)

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result`` where --json said, if it said so."""
        if self.json_file is None:
            return
        text = json.dumps(_finite(result), indent=2, allow_nan=False) + "\n"
        if self.to_stdout:
            typer.echo(text, nl=False)
        else:
            files.write(self.json_file, text)


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table; a bar behind a backslash is one in a cell."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def fit(line: str, columns: int | None) -> str:
    """``line``, continued below and indented where it is longer than ``columns``."""
    if columns is None or len(line) <= columns:
        return line
    return "\n".join(_wrap(line, columns, " " * (len(line) - len(line.lstrip()) + _HANG)))


def _wrap(text: str, columns: int, below: str = "") -> list[str]:
    return textwrap.wrap(text, columns, subsequent_indent=below, break_on_hyphens=False, break_long_words=False)


def _widths(lines: Sequence[Sequence[str]], room: int | None) -> list[int] | None:
    """Width of each column so that rows fit into ``room``; None if they cannot without cutting a word."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [max((len(word) for text in column for word in text.split()), default=0) for column in columns]
    while room is not None and sum(widths) + _GAP * (len(widths) - 1) > room:
        spare = [w - low for w, low in zip(widths, least, strict=True)]
        if not any(spare):
            return None
        widest = max((w, i) for i, w in enumerate(widths) if spare[i])[1]
        widths[widest] -= 1
    return widths
