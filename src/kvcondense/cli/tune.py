"""``kvcondense tune``: measure the Triton kernels' tilings on this GPU and write its part of the tuning table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.runtime import installed
from kvcondense.cli.output import JsonFile, Output
from kvcondense.errors import RangeError, UnsupportedError, require_known

EXAMPLE = "Example: kvcondense tune --out tuning.json --json timings.json"


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
    json_file: JsonFile = None,
) -> None:
    """Time every tiling of the Triton kernels on this GPU and keep the fastest for each compressor and number of rows.

    Tilings are replayed as CUDA graphs with cold caches; one whose rows or bytes differ in a bit is left out. The
    chip's own cast to e4m3 is used only if it equals the integer encoder for all 2^32 floats. Other architectures'
    parts of the table stay as they are.
    """
    if not installed() or not torch.cuda.is_available():
        raise UnsupportedError("tune", "triton and a GPU", "none found")
    from kvcondense.bench import tune as tuner

    for name in kind or ():
        require_known("--kind", name, tuner.KINDS, error=RangeError)
    output = Output(json_file)
    arch, part, timings = tuner.tune("cuda", kind or list(tuner.KINDS), output.say)
    if not dry_run:
        out.write_text(tuning.dump({**tuning.table(), arch: part}), encoding="utf-8")
        output.say(f"written to {out}")
    output.finish({"architecture": arch, "table": part, "timings": [t.as_dict() for t in timings]})
