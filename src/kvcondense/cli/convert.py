"""``kvcondense convert``: the rows of a cache file in another cache format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cachefile import PAGE_TOKENS, CacheFile
from kvcondense.cli.output import JsonFile, Output
from kvcondense.errors import CheckpointError, UnsupportedError

EXAMPLE = "Example: kvcondense convert cache.safetensors --out fp8.safetensors --format fp8_model1"

IndexerFormat = Annotated[
    str | None, typer.Option(help="Cache format of the indexer's rows (default: --format, which must fit).")
]
PageTokens = Annotated[int, typer.Option(help="Tokens per page, of formats that have pages.")]
TensorScale = Annotated[float | None, typer.Option(help="The scale of fp8_tensor.")]
Strict = Annotated[
    bool, typer.Option("--strict/--saturate", help="Refuse values that the format cannot hold, or saturate them.")
]


def convert(
    source: Annotated[Path, typer.Argument(help="Cache file that kvcondense compress wrote.")],
    out: Annotated[Path, typer.Option(help="Result: the same rows, state and header; replaced whole.")],
    format: Annotated[
        str | None, typer.Option(help="Cache format of the main rows (default: as they are); see info --formats.")
    ] = None,
    indexer_format: Annotated[
        str | None, typer.Option(help="Cache format of the indexer's rows (default: as they are).")
    ] = None,
    page_tokens: PageTokens = PAGE_TOKENS,
    tensor_scale: TensorScale = None,
    strict: Strict = True,
    json_file: JsonFile = None,
) -> None:
    """Decode the rows of a cache file and encode them again.

    From bf16 the bytes are those that compressing into the new format would have given. From a quantised format bits
    are gone already: the header's converted_from says so, and such a file cannot be continued with compress --resume.
    """
    if format is None and indexer_format is None:
        raise UnsupportedError("--format", "a format for the main rows or the indexer's", "none")
    if not out.parent.is_dir():
        raise CheckpointError("--out", "a file in a folder that exists", str(out))
    wanted = {"main": format, "indexer": indexer_format}
    before = CacheFile.load(source)
    after = before.convert(
        {part: name for part, name in wanted.items() if name is not None},
        page_tokens=page_tokens,
        tensor_scale=tensor_scale,
        strict=strict,
    )
    after.save(out)
    output = Output(json_file)
    output.say(f"layer {after.layer}, {after.position} tokens: {source} -> {out}")
    for old, new in zip(describe(before), describe(after), strict=True):
        output.say(f"  {old}" if old == new else f"  {old}\n    -> {new}")
    output.finish(after.header())


def describe(file: CacheFile) -> list[str]:
    """A line for each part: rows, format, bytes, live state."""
    lines = []
    for name, part in file.parts.items():
        n = part.spec.visible_rows(file.position)
        fmt, d, page_rows = part.cache.format, part.spec.head_dim, part.cache.page_rows
        nbytes = -(-n // page_rows) * fmt.page_bytes(d, page_rows)
        pages = "" if page_rows == 1 else f" in pages of {page_rows}"
        lines.append(
            f"{name:<8} ratio {part.spec.ratio:<4} rows [{n}, {d}] {fmt.name}{pages}, {nbytes} bytes; "
            f"live state {part.state.shape[0]} rows"
        )
    return lines
