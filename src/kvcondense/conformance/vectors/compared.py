"""What an implementation wrote, against what must come out of a vector: every difference that counts, in a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from kvcondense.conformance import stored
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
    yield _shape("rows", got, (vector.repeat * count, None))
    misshapen = _shape("untouched", got, (len(vector.untouched), None))
    yield misshapen
    rows = got.get("rows")
    if rows is None or rows.dim() != 2 or rows.shape[0] != vector.repeat * count:
        return
    first, *others = rows.split(count) if count else (rows,)
    if any(not torch.equal(raw(first), raw(other)) for other in others):
        yield f"another run of the {vector.repeat} gave other bytes"
    if vector.exact:
        yield _bytes("rows", vector, raw(first), expected["rows"])
        if "pages" in got:
            yield _pages(vector, got["pages"], expected["pages"])
    else:
        yield _bounds(vector, first, expected)
        yield _equal_share(vector, first, expected)
        if "exact" not in without:
            yield _pairs(vector, raw(first))
    if vector.untouched and not misshapen:
        spoilt = (got["untouched"] != stored.CANARY).any(1).nonzero()[:, 0]
        for i in spoilt[:1]:
            yield f"cache slot {vector.untouched[int(i)]} was written, which belongs to no finished window"
    refusals = [op.why for op in vector.ops if op.op == "refuse"]
    if refusals:
        told = got.get("refused", torch.zeros(0)).flatten().tolist()
        if len(told) != len(refusals):
            yield f"refused: {len(refusals)} bytes, got {len(told)}"
        yield from (f"{why} was accepted" for why, byte in zip(refusals, told, strict=False) if byte != 1)


def _shape(name: str, got: Tensors, shape: tuple[int, int | None]) -> str:
    t = got.get(name)
    if t is None:
        return f"{name} is missing" if shape[0] else ""
    if t.dim() != 2 or t.shape[0] != shape[0] or (shape[0] and not t.shape[1]):
        return f"{name}: [{shape[0]}, ...] expected, got {list(t.shape)}"
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
    share = float((rows.bfloat16() == expected["expected"].bfloat16()).double().mean())
    if share >= vector.min_equal:
        return ""
    return f"{share:.2%} of the elements are those of bf16 to the bit, at least {vector.min_equal:.0%} must be"


def _pairs(vector: Vector, rows: torch.Tensor) -> str:
    for i, j in vector.equal:
        if not torch.equal(rows[i], rows[j]):
            slots = vector.read[i], vector.read[j]
            byte = int((rows[i] != rows[j]).nonzero()[0])
            return f"rows at cache slots {slots[0]} and {slots[1]} have the same tokens, but differ from byte {byte} on"
    return ""


def _bytes(what: str, vector: Vector, rows: torch.Tensor, expected: torch.Tensor) -> str:
    if rows.shape != expected.shape:
        return f"{what}: {list(expected.shape)} bytes expected, got {list(rows.shape)}"
    differ = (rows != expected).nonzero()
    if not differ.shape[0]:
        return ""
    row, byte = differ[0].tolist()
    name = stored.name_byte(get_format(vector.format), int(vector.compressor["head_dim"]), byte)
    pair = f"{int(rows[row, byte])} instead of {int(expected[row, byte])}"
    return f"cache slot {vector.read[row]}, byte {byte} ({name}): {pair}; {differ.shape[0]} bytes in all"


def _pages(vector: Vector, pages: torch.Tensor, expected: torch.Tensor) -> str:
    if pages.shape != expected.shape:
        return f"pages: {list(expected.shape)} expected, got {list(pages.shape)}"
    differ = (pages != expected).nonzero()
    if not differ.shape[0]:
        return ""
    page, byte = differ[0].tolist()
    form, d = get_format(vector.format), int(vector.compressor["head_dim"])
    name = form.name_byte(d, vector.page_rows, byte)
    pair = f"{int(pages[page, byte])} instead of {int(expected[page, byte])}"
    return f"page {page}, byte {byte} ({name}): {pair}; {differ.shape[0]} bytes in all"
