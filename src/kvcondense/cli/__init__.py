"""The command: verify, conformance, vectors, compress, convert, bundle, plan, explain, bench, tune, aot, warm, info.

Modules here say what can be typed and import no torch; those in ``work`` do it.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

import kvcondense
from kvcondense.cli import (
    aot,
    bench,
    bundle,
    compress,
    conformance,
    convert,
    explain,
    info,
    plan,
    tune,
    vectors,
    verify,
    warm,
)
from kvcondense.cli.command import add

app = typer.Typer(
    name="kvcondense",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvcondense {kvcondense.__version__}")
        raise typer.Exit


@app.callback(epilog="Exit status 0: it holds, or is done; 1: it does not hold; 2: it could not be asked.")
def top(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The DeepSeek-V4 KV compressor: check it, run it on a checkpoint, see what this machine can do."""


add(app, verify.verify, verify.EXAMPLE, verify.FAILS)
add(app, conformance.conformance, conformance.EXAMPLE, conformance.FAILS, conformance.VOID)
add(app, vectors.vectors, vectors.EXAMPLE, vectors.FAILS, vectors.VOID)
add(app, compress.compress, compress.EXAMPLE)
add(app, convert.convert, convert.EXAMPLE)
add(app, bundle.bundle, bundle.EXAMPLE, bundle.FAILS)
add(app, plan.plan, plan.EXAMPLE)
add(app, explain.explain, explain.EXAMPLE)
add(app, bench.bench, bench.EXAMPLE, bench.FAILS, bench.VOID)
add(app, tune.tune, tune.EXAMPLE, tune.FAILS)
add(app, aot.aot, aot.EXAMPLE, aot.FAILS)
add(app, warm.warm, warm.EXAMPLE, warm.FAILS)
add(app, info.info, info.EXAMPLE)


def main() -> None:
    """Entry point. Names of files that are no text are printed with escapes, and closed streams are not missed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it is open as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
