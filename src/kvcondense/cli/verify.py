"""``kvcondense verify``, as it is typed: the golden run of the original kernel, and the mutants that it must catch."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.paths import ReportFile
from kvcondense.cli.values import Seed, one_of, positive, whole

EXAMPLE = "Example: kvcondense verify --kind csa --history 1000 --start-pos 1000,1003 --no-rotate"
FAILS = "an output is not what it must be, or the --mutant is caught"


def verify(
    kind: Annotated[
        str | None,
        typer.Option(help="hca (ratio 128, default), csa (ratio 4, overlapping) or indexer.", **one_of(names.KINDS)),
    ] = None,
    ratio: Annotated[int | None, typer.Option(help="128 for hca, 4 for csa: instead of --kind.", **whole(1))] = None,
    preset: Annotated[
        str, typer.Option(help="Constants of the model: demo, flash or pro.", **one_of(names.MODELS))
    ] = "demo",
    backend: Annotated[
        str, typer.Option(help="Backend to check, or auto.", **one_of(names.BACKENDS, "auto"))
    ] = "reference",
    history: Annotated[
        int, typer.Option(help="Random earlier tokens; 0 is the original's empty state.", **whole(0, (1 << 17) - 1))
    ] = 1000,
    start_pos: Annotated[
        str | None, typer.Option(help="Position of the decoded token, or one per row: 127 or 127,1000,1003.")
    ] = None,
    rotate: Annotated[bool, typer.Option("--rotate/--no-rotate", help="Hadamard rotation of the row.")] = True,
    format: Annotated[
        str, typer.Option(help="Cache format; kvcondense info --formats lists them.", **one_of(names.FORMATS))
    ] = "bf16",
    batch: Annotated[int, typer.Option(help="Rows decoded together.", **whole(1, 1024))] = 4,
    scale: Annotated[float, typer.Option(help="Standard deviation of x (with history).", **positive())] = 1.0,
    seed: Seed = 0,
    mutant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Check a wrong compressor instead.", **one_of(names.MUTANTS)),
    ] = None,
    list_mutants: Annotated[bool, typer.Option("--list-mutants", help="Print the mutants' names, one a line.")] = False,
    report_file: ReportFile = None,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Compare a backend with the original kernel's golden reference: kv, kv_state, score_state, kv_cache.

    kv_bytes: every byte of the cache is what an independent encoder makes of the rows that the backend returned, and
    bytes that belong to no row are untouched. Exit status 0 only if all five pass. With --mutant, a wrong compressor
    takes the backend's place and the status is 1 because it is caught: by the case itself, or, if the case cannot see
    that bug, by an invariant of the conformance kit.
    """
