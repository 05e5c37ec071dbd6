"""What commands print: lines for people, and the same as JSON when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON to FILE ('-': standard output).")
]


class Output:
    """Lines go to standard output, or to standard error if the JSON takes its place."""

    def __init__(self, json_file: Path | None) -> None:
        self.json_file = json_file
        self.to_stdout = str(json_file) == "-"

    def say(self, text: str = "") -> None:
        """Print a line."""
        typer.echo(text, err=self.to_stdout)

    def finish(self, result: dict[str, Any]) -> None:
        """Write ``result`` where --json said, if it said so."""
        if self.json_file is None:
            return
        text = json.dumps(result, indent=2) + "\n"
        if self.to_stdout:
            typer.echo(text, nl=False)
        else:
            self.json_file.write_text(text, encoding="utf-8")
