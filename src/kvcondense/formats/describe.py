"""Formats for people: byte map, picture of a page, and the tables of docs/formats.md. All derived from descriptors."""

from __future__ import annotations

from typing import Any

from kvcondense.formats.catalog import FORMATS
from kvcondense.formats.descriptor import PAD, SCALES, CacheFormat, Field

EXAMPLE_DIM = 512
"""Channels in examples of formats that take any head_dim."""
COLUMNS = 96
"""Characters to a line of a picture."""


def byte_map(fmt: CacheFormat, head_dim: int) -> list[dict[str, Any]]:
    """One line per field: where row i of a page of P rows has it, and what it holds."""
    lines = []
    for f in fmt.fields(head_dim):
        start = " + ".join(
            t for t in (f"{f.base} P" if f.base else "", f"{f.stride} i", str(f.offset) if f.offset else "") if t
        )
        if f.tile > 1:
            start = f"tiles of {f.tile} x {f.tile}"
        lines.append({"field": f.name, "byte": start, "bytes": f.nbytes, "holds": _holds(fmt, f)})
    if fmt.scales_outside:
        where = "" if fmt.tensor_scale else "[num_pages, P]: "
        lines.append({"field": SCALES, "byte": "outside", "bytes": 4, "holds": where + _rule(fmt)})
    if (beside := fmt.second(head_dim)) is not None:
        where = f"[num_pages, P, {beside.count}]: "
        lines.append(
            {
                "field": beside.name,
                "byte": "second buffer",
                "bytes": beside.nbytes,
                "holds": where + _holds(fmt, beside),
            }
        )
    return lines


def stride(fmt: CacheFormat, head_dim: int) -> str:
    """The page stride as a formula."""
    row = fmt.row_bytes(head_dim)
    return f"{row} P" if fmt.align == 1 else f"ceil({row} P / {fmt.align}) * {fmt.align}"


def picture(fmt: CacheFormat, head_dim: int, page_rows: int = 2, columns: int = COLUMNS) -> list[str]:
    """A page of a few rows as a strip of boxes, one for each field of each row, with the byte where each begins."""
    page_rows = max(page_rows, fmt.tile)
    page = fmt.page_bytes(head_dim, page_rows)
    boxes = sorted(
        (f.byte(page_rows, i), f"{f.name} {i}" if f.tile == 1 else f"{f.name} {i}..{i + f.tile - 1}")
        for f in fmt.fields(head_dim)
        for i in range(0, page_rows, f.tile)
    )
    end = page_rows * fmt.row_bytes(head_dim)
    if end < page:
        boxes.append((end, "tail"))
    lines, top, bottom = [], "", ""
    for begin, label in boxes:
        width = max(len(label), len(str(begin))) + 2
        if len(bottom) + width + 1 > columns:
            lines += [top, bottom + "|"]
            top = bottom = ""
        top += f"{begin:<{width + 1}}"
        bottom += f"| {label:<{width - 1}}"
    return [line.rstrip() for line in [*lines, f"{top}{page}", bottom + "|"]]


def overview(formats: dict[str, CacheFormat] | None = None) -> list[dict[str, Any]]:
    """One line per format: name, shape, bytes, page stride, and what it is."""
    lines = []
    for fmt in (FORMATS if formats is None else formats).values():
        d = fmt.head_dim or EXAMPLE_DIM
        beside = fmt.outside_bytes(d)
        outside = f" + {beside}" if beside else ""
        row = fmt.row_bytes(d) if fmt.head_dim else f"{fmt.row_bytes(1)} d"
        lines.append(
            {
                "format": fmt.name,
                "head_dim": "any" if fmt.head_dim is None else fmt.head_dim,
                "row bytes": f"{row}{outside}" if outside else row,
                "page stride": stride(fmt, d) if fmt.head_dim else f"{fmt.row_bytes(1)} d P",
                "what it is": fmt.summary,
                "used by": fmt.source,
            }
        )
    return lines


def markdown() -> str:
    """The generated part of docs/formats.md: the overview, then the byte map of every format with several fields."""
    out = [*_table(overview())]
    for fmt in FORMATS.values():
        d = fmt.head_dim or EXAMPLE_DIM
        if len(fmt.fields(d)) == 1 and not fmt.scaled:
            continue
        example = "" if fmt.head_dim else f" (here d = {d})"
        title = f"{fmt.summary[0].upper()}{fmt.summary[1:]}{example}. Page stride {stride(fmt, d)}."
        out += ["", f"### {fmt.name}", "", title]
        out += ["", *_table(byte_map(fmt, d)), "", "```", *picture(fmt, d), "```"]
    return "\n".join(out) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    return [
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(map(str, row.values())) + " |" for row in rows),
    ]


def _holds(fmt: CacheFormat, field: Field) -> str:
    if field.name == PAD:
        return "0"
    if field.name == SCALES:
        return _rule(fmt)
    part = next(c for c in fmt.channels if c.name == field.name)
    stop = "d - 1" if part.stop is None and fmt.head_dim is None else (part.stop or fmt.head_dim or 0) - 1
    order = ", even channel in the low nibble" if part.element.bits == 4 else ""
    ties = "" if getattr(part.element, "ties_to_even", True) else ", ties down"
    return f"{part.element.name} of channels {part.start}..{stop}{order}{ties}"


def _rule(fmt: CacheFormat) -> str:
    """The scale rule in a sentence."""
    part = fmt.scaled
    assert part is not None
    assert part.scale is not None
    rule = part.scale
    if rule.block is None:
        return rule.kind.value
    floor = f"{'s' if rule.floor_on_scale else 'amax'} >= {rule.floor:.4g}"
    return f"one for {rule.block} channels: {rule.kind.value}; L = {part.element.largest:g}, {floor}"
