"""``kvcondense explain``, as it is typed: what each step of a request does, as lines, a trace or a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import completer, one_of, whole

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
    prompt: Annotated[int, typer.Option(help="Tokens before the first decoded one.", **whole(0, _MOST))] = 22,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill step.", **whole(1))] = 8,
    drafts: Annotated[
        int, typer.Option(help="Drafts of a decode step; step i accepts i mod (drafts + 1).", **whole(0, _MOST))
    ] = 3,
    steps: Annotated[int, typer.Option(help="Decode steps.", **whole(0, _MOST))] = 6,
    ring_rows: Annotated[
        int | None, typer.Option(help="Rows of the state's ring (default: the least).", **whole(1, _MOST))
    ] = None,
    state_page: Annotated[
        int | None, typer.Option(help="Rows of a state page, instead of a ring.", **whole(1, _MOST))
    ] = None,
    page_rows: Annotated[int, typer.Option(help="Rows of a cache page.", **whole(1, 1 << 16))] = 4,
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
