"""``kvcondense tune``: measure the Triton kernels' tilings on this GPU and write its part of the tuning table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.runtime import installed
from kvcondense.cli.output import Output
from kvcondense.errors import RangeError, UnsupportedError, require_known

EXAMPLE = "Example: kvcondense tune --out tuning.json --json timings.jsonl --budget 300"
_WHAT = "kvcondense tune"


def tune(
    kind: Annotated[
        list[str] | None, typer.Option(help="hca, csa or indexer; may be given again. Default: all.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", show_default=False, help="Table to write. Default: the library's own, which steps then use."
        ),
    ] = tuning.TABLE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be chosen and write nothing.")] = False,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Begin no class of steps that would end later.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile. Default: one per processor.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="JSON lines, a tiling each ('-': standard output).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the --json file: classes that it has are not timed again.")
    ] = False,
) -> None:
    """Time every tiling of the Triton kernels on this GPU and keep the fastest for each compressor and number of rows.

    Tilings are replayed as CUDA graphs with cold caches; one whose rows or bytes differ in a bit is left out. The
    chip's own cast to e4m3 is used only if it equals the integer encoder for all 2^32 floats. Other architectures'
    parts of the table stay as they are, and so do the entries of a compressor if the budget ended before all of its
    classes were timed. A class's timings are in the --json file as soon as they are made; --resume goes on with a file
    of the same machine, versions and sources. The last line is the architecture's part of the table.
    """
    from kvcondense.bench import device as gpu
    from kvcondense.bench import measure

    if not installed() or not gpu.available():
        raise UnsupportedError("tune", "triton and a GPU", "none found")
    from kvcondense.bench import records
    from kvcondense.bench import tune as tuner

    for name in kind or ():
        require_known("--kind", name, tuner.KINDS, error=RangeError)
    for option, value in (("--budget", budget), ("--jobs", jobs)):
        if value is not None and value <= 0:
            raise RangeError(option, "more than 0", value)
    output = Output(json_file)
    facts = {**measure.machine(), **gpu.machine()}
    kept = records.resumed(json_file, facts, _WHAT)[1] if resume else []
    cast = tuner.cast_is_exact(gpu.home())
    output.say(f"the chip's cast to e4m3 {'equals' if cast else 'is not proven equal to'} the integer encoder's codes")
    log = records.Log(json_file, {"machine": facts, "hardware_cast": cast}, kept)
    limits = tuner.Limits(budget or float("inf"), jobs or os.cpu_count() or 1)
    tuner.tune(log, cast, kind or list(tuner.KINDS), output.say, limits)
    arch, part = tuner.part_of(log, cast, facts)
    if part is None:
        output.say("no compressor has timings of all its classes: the table stays as it is")
        raise typer.Exit(1)
    if not dry_run:
        out.write_text(tuning.dump({**tuning.table(), arch: part}), encoding="utf-8")
        output.say(f"written to {out}")
    log.add({"architecture": arch, "table": part})
