"""What an implementation wrote, against what must come out of a vector: every difference that counts, in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch

from kvcondense.conformance import stored
from kvcondense.conformance.judge import FLIPS
from kvcondense.conformance.play import raw
from kvcondense.conformance.vectors.played import Tensors, values
from kvcondense.conformance.vectors.schema import Vector
from kvcondense.errors import KvCondenseError
from kvcondense.formats import get_format


def wrong(vector: Vector, expected: Tensors, got: Tensors, without: Collection[str] = ()) -> list[str]:
    """What is wrong with ``got``; nothing if it is right. ``without``: needs that were not promised.

    Without ``exact``, pairs of rows need not be equal to the bit.
    """
    try:
        return [text for text in _wrong(vector, expected, got, without) if text]
    except KvCondenseError as error:
        return [str(error)]


def _wrong(vector: Vector, expected: Tensors, got: Tensors, without: Collection[str]) -> Iterator[str]:
    count = len(vector.read)
    yield _shape("rows", got, vector.repeat * count)
    misshapen = _shape("untouched", got, len(vector.untouched)) or _whole_rows(vector, got)
    yield misshapen
    rows = got.get("rows")
    if rows is None or rows.dim() != 2 or rows.shape[0] != vector.repeat * count:
        return
    first, *others = rows.split(count) if count else (rows,)
    if any(not torch.equal(raw(first), raw(other)) for other in others):
        yield f"another run of the {vector.repeat} gave other bytes"
    if vector.exact:
        stored.check(get_format(vector.format), int(vector.compressor["head_dim"]), first, count, exact=True)
        yield _bytes("rows", raw(first), expected["rows"], _of_row(vector))
        if "pages" in got:
            yield _bytes("pages", got["pages"], expected["pages"], _of_page(vector))
    else:
        yield _bounds(vector, first, expected)
        yield _equal_share(vector, first, expected)
        if "exact" not in without:
            yield _pairs(vector, raw(first))
    if vector.untouched and not misshapen:
        spoilt = (got["untouched"] != stored.CANARY).any(1).nonzero()[:, 0]
        for i in spoilt[:1]:
            yield f"cache slot {vector.untouched[int(i)]} was written, which belongs to no finished window"
    yield from _refusals(vector, got)


def _refusals(vector: Vector, got: Tensors) -> Iterator[str]:
    wanted = [op.why for op in vector.ops if op.op == "refuse"]
    told = got.get("refused")
    if told is None:
        yield f"refused is missing: uint8 [{len(wanted)}]" if wanted else ""
    elif told.dtype != torch.uint8 or tuple(told.shape) != (len(wanted),):
        yield f"refused: uint8 [{len(wanted)}] expected, got {told.dtype} {list(told.shape)}"
    else:
        yield from (f"{why} was accepted" for why, byte in zip(wanted, told.tolist(), strict=True) if byte != 1)


def _shape(name: str, got: Tensors, rows: int) -> str:
    t = got.get(name)
    if t is None:
        return f"{name} is missing" if rows else ""
    if t.dim() != 2 or t.shape[0] != rows or (rows and not t.shape[1]):
        return f"{name}: [{rows}, ...] expected, got {list(t.shape)}"
    return ""


def _whole_rows(vector: Vector, got: Tensors) -> str:
    """Untouched rows are all of their bytes."""
    t, form, d = got.get("untouched"), get_format(vector.format), int(vector.compressor["head_dim"])
    if t is None or not t.shape[0]:
        return ""
    sizes = {2 * d, 4 * d} if form.plain is not None else {form.row_bytes(d) + form.outside_bytes(d)}
    if t.dtype != torch.uint8 or t.shape[1] not in sizes:
        return f"untouched: uint8 [n, {' or '.join(map(str, sorted(sizes)))}] expected, got {t.dtype} {list(t.shape)}"
    return ""


def _bounds(vector: Vector, rows: torch.Tensor, expected: Tensors) -> str:
    found, wanted = values(vector, rows), expected["expected"]
    good = ((found.double() - wanted.double()).abs() <= expected["bound"].double()) & torch.isfinite(found)
    bad = (~good).nonzero()
    if not bad.shape[0]:
        return ""
    row, channel = bad[0].tolist()
    return (
        f"row {row} (cache slot {vector.read[row]}), channel {channel}: {found[row, channel]:.6g} instead of "
        f"{wanted[row, channel]:.6g} +- {expected['bound'][row, channel]:.2g}; {bad.shape[0]} of {good.numel()} values"
    )


def _equal_share(vector: Vector, rows: torch.Tensor, expected: Tensors) -> str:
    if not vector.min_equal or not rows.numel():
        return ""
    differ = int((rows.bfloat16() != expected["expected"].bfloat16()).sum())
    if differ <= max(FLIPS, (1 - vector.min_equal) * rows.numel()):
        return ""
    return f"{differ} of {rows.numel()} elements differ from bf16's, at least {vector.min_equal:.0%} must be equal"


def _pairs(vector: Vector, rows: torch.Tensor) -> str:
    for i, j in vector.equal:
        if not torch.equal(rows[i], rows[j]):
            slots = vector.read[i], vector.read[j]
            byte = int((rows[i] != rows[j]).nonzero()[0])
            return f"rows at cache slots {slots[0]} and {slots[1]} have the same tokens, but differ from byte {byte} on"
    return ""


def _bytes(what: str, got: torch.Tensor, expected: torch.Tensor, told: Callable[[int, int], str]) -> str:
    """``told``: what lies at a row and a byte of it."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{what}: uint8 {list(expected.shape)} expected, got {got.dtype} {list(got.shape)}"
    differ = (got != expected).nonzero()
    if not differ.shape[0]:
        return ""
    row, byte = differ[0].tolist()
    pair = f"{int(got[row, byte])} instead of {int(expected[row, byte])}"
    return f"{told(row, byte)}: {pair}; {differ.shape[0]} bytes in all"


def _of_row(vector: Vector) -> Callable[[int, int], str]:
    form, d = get_format(vector.format), int(vector.compressor["head_dim"])
    return lambda row, byte: f"cache slot {vector.read[row]}, byte {byte} ({stored.name_byte(form, d, byte)})"


def _of_page(vector: Vector) -> Callable[[int, int], str]:
    form, d, rows = get_format(vector.format), int(vector.compressor["head_dim"]), vector.page_rows
    return lambda page, byte: f"page {page}, byte {byte} ({form.name_byte(d, rows, byte)})"
