"""Vectors that somebody else may have written: ops are complete, and sizes are such that a machine can hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcondense.conformance import stored
from kvcondense.errors import CheckpointError, KvCondenseError
from kvcondense.formats import FORMATS
from kvcondense.spec import CompressorSpec

if TYPE_CHECKING:
    from kvcondense.conformance.vectors.schema import Op, Vector

_STEP = ("pieces", "query_start_loc", "start_positions", "draft_rows", "state_slots", "slot_mapping")
_FIELDS = {
    "step": _STEP,
    "refuse": (*_STEP, "why"),
    "begin": ("slot", "position"),
    "copy": ("slot", "to", "position"),
    "reset": ("slot",),
}
_MOST = {"page_rows": 4096, "num_slots": 1 << 16, "max_draft": 1 << 12, "max_positions": 1 << 21, "repeat": 16}
_MAX_BYTES = 1 << 28
"""Of tokens, states, angles and rows that are returned."""
_MAX_CACHE = 1 << 36
"""Of an address space: a cache of 2^31 elements is never touched."""


def check(vector: Vector, name: str) -> None:
    """Raise CheckpointError, which says what of ``name`` is wrong."""

    def refuse(entry: str, expected: str, got: object) -> None:
        raise CheckpointError(f"{name} {entry}", expected, str(got)[:200])

    for entry, most in _MOST.items():
        if not 0 <= getattr(vector, entry) <= most or (entry in ("page_rows", "repeat") and not getattr(vector, entry)):
            refuse(entry, f"a number up to {most}", getattr(vector, entry))
    if vector.format not in FORMATS:
        refuse("format", "one of the formats", vector.format)
    spec, form = CompressorSpec.from_dict(vector.compressor, f"{name} compressor"), FORMATS[vector.format]
    try:
        form.check(spec.head_dim, spec.rope_dim)
        form.check_page_rows(vector.page_rows)
    except KvCondenseError as error:
        raise CheckpointError(f"{name} format", error.expected, error.got) from error
    if not spec.has_gate:
        refuse("compressor has_gate", "true", False)
    page = form.page_bytes(spec.head_dim, vector.page_rows)
    if not 0 < vector.num_pages * page <= _MAX_CACHE:
        refuse("num_pages", f"a cache of at most {_MAX_CACHE} bytes", vector.num_pages)
    for i, op in enumerate(vector.ops):
        missing = [field for field in _FIELDS.get(op.op, ("a known kind",)) if getattr(op, field, None) is None]
        if missing:
            refuse(f"ops[{i}] {missing[0]}", "it to be there", op.op)
        _pieces(op, f"{name} ops[{i}]")
        if len({len(pages) for pages in op.block_table or ()}) > 1:
            refuse(f"ops[{i}] block_table", "as many pages for each request", op.block_table)
    rows = vector.num_pages * vector.page_rows
    for entry, slots in (("read", vector.read), ("untouched", vector.untouched)):
        if any(not 0 <= slot < rows for slot in slots):
            refuse(entry, f"slots below {rows}", [slot for slot in slots if not 0 <= slot < rows][:3])
    if any(len(pair) != 2 or any(not 0 <= i < len(vector.read) for i in pair) for pair in vector.equal):
        refuse("equal", f"pairs of numbers below {len(vector.read)}", vector.equal[:3])
    if (most := _bytes(vector, spec)) > _MAX_BYTES:
        refuse("sizes", f"tokens, slots, positions and rows of at most {_MAX_BYTES} bytes", most)


def _pieces(op: Op, name: str) -> None:
    for piece in op.pieces or ():
        if len(piece) != 4 or not (piece[1] >= 0 and piece[2] >= 0 and 0 <= piece[3] <= 3):
            raise CheckpointError(f"{name} pieces", "[stream, first, count, junk]", str(piece)[:200])
        if not piece[3] and not 0 <= piece[0] < 1 << 31:
            raise CheckpointError(f"{name} pieces", "a stream of the generator", piece[0])


def _bytes(vector: Vector, spec: CompressorSpec) -> int:
    """Of the largest thing that is made."""
    token = 4 * spec.projected
    tokens = max((sum(piece[2] for piece in op.pieces or ()) for op in vector.ops), default=0)
    state = vector.num_slots * (spec.window + vector.max_draft)
    angles = (vector.max_positions + 2) * max(spec.rope_dim, 2) * 4
    sizes = (n * dtype.itemsize for _, dtype, n in stored.parts(FORMATS[vector.format], spec.head_dim))
    rows = (len(vector.read) * vector.repeat + len(vector.untouched)) * sum(sizes)
    tables = max((len(op.block_table or ()) * ((op.first_page or 0) + 1) * 8 for op in vector.ops), default=0)
    return max(tokens * token, state * token, angles, rows, tables, spec.ratio * spec.width * 4)
