"""``kvcondense tune``, as it is typed: measure the Triton kernels' tilings on this GPU, for the tuning table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import Quiet
from kvcondense.cli.values import Jobs, one_of, positive

EXAMPLE = "Example: kvcondense tune --out tuning.json --json timings.jsonl --budget 300"
FAILS = "no compressor has timings of all its classes"


def tune(
    kind: Annotated[
        list[str] | None,
        typer.Option(help="hca, csa or indexer; may be given again. Default: all.", **one_of(names.KINDS)),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table to write. Default: the library's own, which steps then use."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be chosen and write nothing.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(help="Begin no class of steps that would end later.", **positive("SECONDS")),
    ] = None,
    jobs: Jobs = None,
    quiet: Quiet = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="JSON lines, a tiling each ('-': standard output); an old FILE is FILE~.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the --json file: classes that it has are not timed again.")
    ] = False,
) -> None:
    """Time every tiling of the Triton kernels on this GPU and keep the fastest for each compressor and number of rows.

    Tilings are replayed as CUDA graphs with cold caches; one whose rows or bytes differ in a bit is left out. The
    chip's own casts to bf16, e4m3 and e2m1 are used, each by itself, only if all 2^32 floats become what integer
    arithmetic makes of them. Other architectures' parts of the table stay as they are, and so do the entries of a
    compressor if the budget ended before all of its classes were timed. A class's timings are in the --json file as
    soon as they are made; --resume goes on with a file of the same machine, versions and sources. The last line is the
    architecture's part of the table.
    """
