"""The work of ``kvcondense convert``: decode the rows of a cache file and encode them again."""

from __future__ import annotations

from pathlib import Path

from kvcondense.cachefile import CacheFile
from kvcondense.cli.output import Output
from kvcondense.errors import CheckpointError, UnsupportedError


def run(
    output: Output,
    *,
    source: Path,
    out: Path,
    format: str | None,
    indexer_format: str | None,
    page_tokens: int,
    tensor_scale: float | None,
    strict: bool,
    verify: bool,
) -> None:
    """Write the same rows in other formats."""
    if format is None and indexer_format is None:
        raise UnsupportedError("--format", "it, --indexer-format, or both", "neither")
    wanted = {"main": format, "indexer": indexer_format}
    before = CacheFile.load(source, verify=verify)
    if before.position == 0:
        raise CheckpointError("SOURCE", "a cache file of at least one token", f"{source}, of none")
    after = before.convert(
        {part: name for part, name in wanted.items() if name is not None},
        page_tokens=page_tokens,
        tensor_scale=tensor_scale,
        strict=strict,
    )
    after.save(out)
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
