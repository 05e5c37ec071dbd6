"""``kvcondense convert``, as it is typed: the rows of a cache file in another cache format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import FilePageTokens, Strict, TensorScale, Verify, one_of

EXAMPLE = "Example: kvcondense convert cache.safetensors --out fp8.safetensors --format fp8_model1"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Cache file that kvcondense compress wrote.")],
    out: Annotated[Path, typer.Option(help="Result: the same rows, state and header; replaced whole.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="Cache format of the main rows (default: as they are); see info --formats.", **one_of(names.FORMATS)
        ),
    ] = None,
    indexer_format: Annotated[
        str | None,
        typer.Option(help="Cache format of the indexer's rows (default: as they are).", **one_of(names.FORMATS)),
    ] = None,
    page_tokens: FilePageTokens = names.PAGE_TOKENS,
    tensor_scale: TensorScale = None,
    strict: Strict = True,
    verify: Verify = True,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Decode the rows of a cache file and encode them again.

    From bf16 the bytes are those that compressing into the new format would have given. From a quantised format bits
    are gone already: the header's converted_from says so, and such a file cannot be continued with compress --resume.
    """
