"""``kvcondense explain``, as it is typed: what each step of a request does, as lines, a trace or a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import completer, one_of

EXAMPLE = "Example: kvcondense explain --kind csa --prompt 22 --chunk 5 --drafts 3 --trace trace.json --page trace.html"
_MOST = 1 << 20


def explain(
    model: Annotated[str, typer.Option(help="Preset: demo, flash, pro or v41.", **one_of(names.MODELS))] = "flash",
    kind: Annotated[
        str,
        typer.Option(
            help="csa, hca or indexer; of v41: 'ratio 2' or 'ratio 1'.", autocompletion=completer(names.KINDS)
        ),
    ] = "csa",
    prompt: Annotated[int, typer.Option(min=0, max=_MOST, help="Tokens before the first decoded one.")] = 22,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of a prefill step.")] = 8,
    drafts: Annotated[
        int, typer.Option(min=0, max=_MOST, help="Drafts of a decode step; step i accepts i mod (drafts + 1).")
    ] = 3,
    steps: Annotated[int, typer.Option(min=0, max=_MOST, help="Decode steps.")] = 6,
    ring_rows: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Rows of the state's ring (default: the least).")
    ] = None,
    state_page: Annotated[
        int | None, typer.Option(min=1, max=_MOST, help="Rows of a state page, instead of a ring.")
    ] = None,
    page_rows: Annotated[int, typer.Option(min=1, max=1 << 16, help="Rows of a cache page.")] = 4,
    format: Annotated[
        str | None, typer.Option(help="Cache format (kvcondense info --formats).", **one_of(names.FORMATS))
    ] = None,
    trace_file: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Write the trace as JSON.")] = None,
    page_file: Annotated[
        Path | None, typer.Option("--page", metavar="FILE.html", help="Write the page that plays it.")
    ] = None,
    tour: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the page with its own traces.")] = None,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Say, step by step, what the plan of a request does: one line each, and, if asked for, a page that plays it.

    The trace holds nothing but the numbers of the library's plans.
    """
