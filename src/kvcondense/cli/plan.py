"""``kvcondense plan``, as it is typed: bytes of state and cache that a model takes, and how many requests fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import FormatPair, Model, PageTokens, one_of, whole

EXAMPLE = "Example: kvcondense plan --model flash --context 1M --batch 64 --memory 80GiB --plot memory.png"


def plan(
    model: Model = "flash",
    context: Annotated[str, typer.Option(help="Tokens per request: 4096, 128k, 1M (k = 1024).")] = "1M",
    batch: Annotated[int, typer.Option(help="Requests.", **whole(1))] = 1,
    draft: Annotated[int, typer.Option(help="Tokens of a step that may be rejected.", **whole(0))] = 0,
    format: FormatPair = "fp8_model1,mxfp4_indexer",
    state: Annotated[
        str, typer.Option(help="ring, or online where windows do not overlap.", **one_of(names.STATES))
    ] = "ring",
    page_tokens: PageTokens = names.PAGE_TOKENS,
    memory: Annotated[str | None, typer.Option(help="How many requests fit in this: 80GiB, 141GB, bytes.")] = None,
    time: Annotated[
        bool, typer.Option("--time", help="Time the planning of a decode step of 1024 requests on this machine, too.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw memory against context.")] = None,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Print the bytes of state and cache of a model's compressors, by kind of layer and in total.

    State: a ring of the least rows, fp32, or the online form. Cache: whole pages. Compared with a cache that keeps one
    main row per token in the same layers. Not counted: weights, the sliding windows of recent tokens, activations.
    """
