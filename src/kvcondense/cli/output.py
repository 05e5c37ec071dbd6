"""What commands print: one line per fact, and the same as JSON when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE ('-': standard output).")
]


def say(text: str = "") -> None:
    """Print a line."""
    typer.echo(text)


def write_json(result: dict[str, Any], path: Path | None) -> None:
    """Write ``result`` to ``path`` ('-': standard output); None writes nothing."""
    if path is None:
        return
    text = json.dumps(result, indent=2) + "\n"
    if str(path) == "-":
        typer.echo(text, nl=False)
    else:
        path.write_text(text, encoding="utf-8")
