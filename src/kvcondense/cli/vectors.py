"""``kvcondense vectors``, as it is typed: write test vectors, play them on an adapter, check what somebody returned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import AdapterName, ExecCommand, Timeout, one_of
from kvcondense.cli.voids import Void

EXAMPLE = "Example: kvcondense vectors write vectors && kvcondense vectors check vectors --against out --without begins"
FAILS = "check: an output is wrong or missing; mutants: one survives"
_PLAYED = ("adapter", "command", "timeout", "outputs")
VOID = (
    Void("action", ("against", "without", *_PLAYED), "write"),
    Void("action", ("against", "without", *_PLAYED), "mutants"),
    Void("action", ("against",), "play"),
    Void("action", _PLAYED, "check"),
    Void("command", ("adapter",)),
    Void("command", ("timeout",), missing=True),
)
_WORDS = one_of(names.NEEDS)


def _needs(context: typer.Context, value: list[str] | None) -> Any:
    """Each by a word of it, also where it was typed whole."""
    return _WORDS["callback"](context, [names.WHOLE_NEEDS.get(need, need) for need in value or ()])


def vectors(
    action: Annotated[
        str, typer.Argument(metavar="ACTION", help="write, play, check or mutants.", **one_of(names.VECTOR_ACTIONS))
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the vectors.")],
    against: Annotated[
        Path | None, typer.Option(metavar="OUT", help="check: folder with what an implementation returned.")
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(metavar="NEED", help="check, play: what the implementation does not do; may be repeated.",
                     **{**_WORDS, "callback": _needs}),
    ] = None,
    adapter: AdapterName = "reference",
    command: ExecCommand = None,
    timeout: Timeout = 60.0,
    outputs: Annotated[
        Path | None, typer.Option("--out", metavar="OUT", help="play: folder for what the adapter returns.")
    ] = None,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Test vectors: check an implementation in any language, with no Python beside it.

    write: some 200 vectors (4 MB): what is to be done as JSON, what must come out as safetensors, a README that says
    how. An implementation writes one file for each into a folder of its own; check compares. play: an adapter does the
    same. mutants: every wrong compressor must be caught by a vector.
    """
