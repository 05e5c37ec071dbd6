"""A cache format as kernels see it: integers and names, one record per part of a row. Compiled codecs read these.

``Part`` and ``RowMap`` have a property ``value`` that is the object itself: Triton wraps compile-time arguments in
objects with that attribute, its interpreter does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvcondense.errors import UnsupportedError
from kvcondense.formats.descriptor import PAD, SCALES, CacheFormat, Channels
from kvcondense.formats.elements import INT8, Plain, SmallFloat, ceil_log2_ratio, fp32_bits

SMALL_FLOAT, WHOLE, PLAIN16, PLAIN32 = "small_float", "whole", "plain16", "plain32"


@dataclass(frozen=True)
class Part:
    """Channels first .. last - 1 of a row, in scale blocks of ``block`` channels.

    element: one of this module's names, in ``bits`` bits; mantissa .. ties_to_even describe a small float (nan_code -1:
    none); largest: fp32 bits of the element's largest value. scale: name of a ``Scale``, "" for none; floor: fp32
    bits of the least amax; floor_exponent: least exponent, for floors on the scale. scale_bytes, scale_copies, divides,
    scale_nan: as ``ScaleRule`` has them. clean: nothing stored is NaN. Row i of a page has its codes at
    byte code_base + code_stride * i (or in tiles, as ``descriptor.Field`` has it), its scales at scale_base +
    scale_stride * i; second: its codes lie in the buffer beside the pages.
    """

    first: int
    last: int
    element: str
    block: int
    bits: int = 0
    mantissa: int = 0
    bias: int = 0
    max_code: int = 0
    nan_code: int = -1
    ties_to_even: int = 0
    largest: int = 0
    scale: str = ""
    scale_bytes: int = 0
    scale_copies: int = 0
    divides: int = 0
    scale_nan: int = 0
    clean: int = 0
    floor: int = 0
    floor_exponent: int = -127
    second: int = 0
    code_base: int = 0
    code_stride: int = 0
    tile: int = 1
    scale_base: int = 0
    scale_stride: int = 0

    @property
    def value(self) -> Part:
        return self

    @property
    def pow2(self) -> bool:
        """Whether scales are powers of two."""
        return self.scale.startswith("POW2")

    @property
    def inverse(self) -> int:
        """fp32 bits of 1 / largest, rounded to nearest."""
        largest = torch.tensor(self.largest, dtype=torch.int32, device="cpu").view(torch.float32)
        return int(fp32_bits(torch.ones((), device="cpu") / largest))

    @property
    def e4m3_scale(self) -> bool:
        """Whether scales are e4m3 bytes."""
        return self.scale.startswith("E4M3")


@dataclass(frozen=True)
class RowMap:
    """How rows lie in pages of ``page_rows`` rows and what is done to them first.

    round_row: rows are rounded to bf16; inner: then each part becomes bf16(q * s) of these; scales_outside: the scales
    are a tensor of their own.
    """

    page_rows: int
    round_row: bool
    inner: tuple[Part, ...]
    scales_outside: bool
    pad_base: int
    pad_stride: int
    pad_bytes: int
    parts: tuple[Part, ...]

    @property
    def value(self) -> RowMap:
        return self


def row_map(form: CacheFormat, head_dim: int, page_rows: int, exact: bool = False) -> RowMap:
    """The format's rows in pages of this size; ``exact`` as in ``CacheFormat.encode``.

    Raises UnsupportedError for an element that kernels do not know.
    """
    fields = {f.name: f for f in form.fields(head_dim)}
    pad = fields.get(PAD)
    parts = []
    for part in form.channels:
        beside = form.second(head_dim)
        code = fields.get(part.name, beside)
        assert code is not None
        entries: dict[str, Any] = _part(part, head_dim) | {
            "code_base": code.base * page_rows + code.offset,
            "code_stride": code.stride,
            "tile": code.tile,
            "second": int(code is beside),
            "clean": int(form.clean),
        }
        if SCALES in fields and part.scale is not None:
            scales = fields[SCALES]
            entries |= {"scale_base": scales.base * page_rows + scales.offset, "scale_stride": scales.stride}
        parts.append(Part(**entries))
    return RowMap(
        page_rows=page_rows,
        round_row=not form.keeps_row(exact),
        inner=() if form.through is None else tuple(Part(**_part(c, head_dim)) for c in form.through.channels),
        scales_outside=form.scales_outside and not form.tensor_scale,
        pad_base=pad.base * page_rows + pad.offset if pad else 0,
        pad_stride=pad.stride if pad else 0,
        pad_bytes=pad.count if pad else 0,
        parts=tuple(parts),
    )


def float_bits(x: float) -> int:
    """The bits of ``x`` as fp32."""
    return int(fp32_bits(torch.tensor(x, device="cpu")))


def _part(part: Channels, head_dim: int) -> dict[str, Any]:
    last = head_dim if part.stop is None else part.stop
    entries: dict[str, Any] = {"first": part.start, "last": last, "block": last - part.start, **_element(part)}
    rule = part.scale
    if rule is not None:
        entries["scale"] = rule.kind.name
        entries |= {"scale_bytes": rule.nbytes, "scale_copies": rule.copies}
        entries |= {"divides": int(rule.divides), "scale_nan": rule.nan}
        entries["floor"] = 0 if rule.floor_on_scale else float_bits(rule.floor)
        if rule.block is not None:
            entries["block"] = rule.block
        if rule.floor_on_scale:
            entries["floor_exponent"] = int(ceil_log2_ratio(torch.tensor(rule.floor, device="cpu"), 1.0))
    return entries


def _element(part: Channels) -> dict[str, Any]:
    element = part.element
    if isinstance(element, SmallFloat):
        return {
            "element": SMALL_FLOAT,
            "bits": element.bits,
            "mantissa": element.mantissa,
            "bias": element.bias,
            "max_code": element.max_code,
            "nan_code": -1 if element.nan_code is None else element.nan_code,
            "ties_to_even": int(element.ties_to_even),
            "largest": float_bits(element.largest),
        }
    if element == INT8:
        return {"element": WHOLE, "bits": 8, "largest": float_bits(element.largest)}
    if isinstance(element, Plain) and element.dtype in (torch.bfloat16, torch.float32):
        return {"element": PLAIN16 if element.bits == 16 else PLAIN32, "bits": element.bits, "nan_code": 0}
    raise UnsupportedError("format", "elements that the kernels know", element.name)
