"""``kvcondense info``, as it is typed: versions, what each backend can do here, preset compressors, cache formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import one_of, whole

EXAMPLE = "Example: kvcondense info --format fp8_model1 --error"


def info(
    formats: Annotated[bool, typer.Option("--formats", help="List the cache formats.")] = False,
    names_alone: Annotated[bool, typer.Option("--names", help="With --formats: the names alone, one a line.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="With --formats: the generated part of docs/formats.md.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="Show one cache format: byte map and picture.", **one_of(names.FORMATS))
    ] = None,
    error: Annotated[
        bool, typer.Option("--error", help="With --format: its error on rows like a trained model's.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the CPU kernels now that are not compiled yet, to fill an image.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="List the compressors of a model directory, from headers alone.")
    ] = None,
    vllm: Annotated[
        bool,
        typer.Option("--vllm", help="What the plugin replaces in the vLLM that is installed, or why nothing."),
    ] = False,
    head_dim: Annotated[
        int, typer.Option(help="Channels, for formats that take any number.", **whole(1, 1 << 16))
    ] = names.EXAMPLE_DIM,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Say which versions are installed, which backends can run here or why not, and what the presets compress.

    With --formats or --format: the cache formats, down to the byte. With --checkpoint: layer, kind, ratio, shapes,
    types and sizes of each compressor that is stored there, the scheme of their names, and how they are stored.
    """
