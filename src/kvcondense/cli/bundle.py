"""``kvcondense bundle``, as it is typed: look at a bundle, check it, cut a prefix of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import Verify, one_of, whole

EXAMPLE = "Example: kvcondense bundle cut long.bundle --position 8192 --out prefix.bundle --format fp8_model1"
FAILS = "check: the file is damaged"


def bundle(
    action: Annotated[str, typer.Argument(metavar="ACTION", help="info, check or cut.", **one_of(names.ACTIONS))],
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Bundle that kvcondense.bundle wrote.")],
    out: Annotated[Path | None, typer.Option(help="cut: the result; replaced whole.")] = None,
    position: Annotated[
        int | None,
        typer.Option(help="cut: where the request is to stand (default: where it stands); info says where it can.",
                     **whole(0)),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="cut: cache format of the main rows (default: as is).", **one_of(names.FORMATS))
    ] = None,
    indexer_format: Annotated[
        str | None, typer.Option(help="cut: cache format of indexers' rows (default: as is).", **one_of(names.FORMATS))
    ] = None,
    verify: Verify = True,
    recover: Annotated[
        bool, typer.Option("--recover", help="Take the other mark where one is damaged: the last append may be lost.")
    ] = False,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Look at a bundle: rows and live state of all compressors of one request.

    info: position, compressors, commits, and where the request can go on. check: read every byte that counts and
    compare it with its digests. cut: write the request as it stood at --position, in one commit, and in other formats
    if asked; what rows have lost is recorded.
    """
