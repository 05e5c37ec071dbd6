"""``kvcondense conformance``, as it is typed: the conformance kit on an adapter, on the mutants, or for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.paths import ReportFile
from kvcondense.cli.values import AdapterName, ExecCommand, Seed, Timeout, positive, whole
from kvcondense.cli.voids import Void

EXAMPLE = "Example: kvcondense conformance --adapter kvcondense.backends.reference --soak 2"
FAILS = "an invariant is broken, or a mutant survives"
_OF_INVARIANTS = ("rounds", "junit_file")
VOID = (
    Void("mutants", ("soak_minutes", "replay", "adapter", "command", "timeout", "folder", *_OF_INVARIANTS)),
    Void("replay", ("soak_minutes", "seed", "folder", *_OF_INVARIANTS)),
    Void("soak_minutes", _OF_INVARIANTS),
    Void("command", ("adapter",)),
    Void("command", ("timeout",), missing=True),
)


def conformance(
    adapter: AdapterName = "reference",
    command: ExecCommand = None,
    timeout: Timeout = 60.0,
    mutants: Annotated[bool, typer.Option("--mutants", help="Check that every wrong compressor is caught.")] = False,
    soak_minutes: Annotated[
        float | None,
        typer.Option("--soak", help="Random histories for so many minutes.", **positive("MINUTES")),
    ] = None,
    replay: Annotated[Path | None, typer.Option(help="Play the case in this file and judge it.")] = None,
    seed: Seed = 0,
    rounds: Annotated[int, typer.Option(help="Times as many histories per invariant.", **whole(1, 1_000_000))] = 1,
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where failing cases and a summary of them are written.")
    ] = Path("kvcondense-conformance"),
    report_file: ReportFile = None,
    junit_file: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE.xml", help="Write the invariants as JUnit XML.")
    ] = None,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Check an implementation of the compressor against the invariants, by generated serving histories.

    A failure is shrunk to the smallest history found and written into --folder, with a summary.md to link to; --replay
    plays it again. Exit status 0 only if nothing broke; with --mutants, only if every mutant is caught and no correct
    adapter is.
    """
