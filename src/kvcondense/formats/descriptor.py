"""CacheFormat: how a row is encoded and where each of its bytes lies in a page. Data, with one code path for all."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from kvcondense.errors import RangeError, UnsupportedError, require_int
from kvcondense.formats.elements import Element, pack_nibbles, unpack_nibbles
from kvcondense.formats.scales import Scale, ScaleRule

SCALES = "scales"
PAD = "pad"


@dataclass(frozen=True)
class Channels:
    """Channels start .. stop - 1 of a row (``stop`` None: to the end), stored as one field of that ``name``."""

    name: str
    element: Element
    start: int = 0
    stop: int | None = None
    scale: ScaleRule | None = None


@dataclass(frozen=True)
class Field:
    """Bytes of a row: ``count`` values of ``dtype``.

    Row i of a page of P rows has them at byte ``base * P + stride * i + offset`` of the page, one behind the other.
    With a ``tile`` t (of single bytes), t rows share t x t tiles: byte c of row i is at ``base * P + stride * t *
    (i // t) + t * t * (c // t) + t * (i mod t) + c mod t``.
    """

    name: str
    dtype: torch.dtype
    count: int
    base: int
    stride: int
    offset: int
    tile: int = 1

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def byte(self, page_rows: int, row: int, index: int = 0) -> int:
        """Where byte ``index`` of the field of a row lies in its page."""
        begin, t = self.base * page_rows + self.offset, self.tile
        if t == 1:
            return begin + self.stride * row + index
        return begin + self.stride * t * (row // t) + t * t * (index // t) + t * (row % t) + index % t


@dataclass(frozen=True)
class CacheFormat:
    """A cache format: channels and their codes, the sections of a page, page stride, and who uses it.

    A row is rounded to bf16 first, unless it is to be exact (``keeps_row``). ``sections``: a page
    holds the first section of all rows, then the second of all rows, and so on; a name is a field of ``channels``,
    ``scales`` or ``pad`` (``pad_bytes`` zeros). Scales that no section names lie outside the pages. The page stride is
    the payload rounded up to ``align``. ``head_dim`` and ``rope_dim`` None: any. ``through``: what is
    stored is bf16(q * s), what that format would give back. ``tile``: fields of a section of their own lie in tiles.
    ``clean``: a NaN is stored as 0 and an infinity, of channels with scales, as the largest code of its block, so that
    no code and no scale is NaN. Channels that no section names lie in a second buffer, row by row.
    """

    name: str
    summary: str
    source: str
    channels: tuple[Channels, ...]
    sections: tuple[tuple[str, ...], ...]
    head_dim: int | None = None
    rope_dim: int | None = None
    pad_bytes: int = 0
    align: int = 1
    through: CacheFormat | None = None
    tile: int = 1
    clean: bool = False

    @functools.cached_property
    def plain(self) -> Element | None:
        """The element, if rows are plain values of one type and nothing else; else None."""
        first, *others = self.channels
        return None if others or first.scale else first.element

    @functools.cached_property
    def typed(self) -> tuple[torch.dtype, ...]:
        """Types of tensors that hold such pages, beside uint8: of the plain values, or what torch calls the codes."""
        element = (self.scaled or self.channels[0]).element
        typed = getattr(element, "typed", None) or element.dtype
        return () if typed == torch.uint8 else (typed,)

    @functools.cached_property
    def scaled(self) -> Channels | None:
        """The channels that have scales, if any."""
        return next((c for c in self.channels if c.scale), None)

    @functools.cached_property
    def scales_outside(self) -> bool:
        """True if the scales are a tensor of their own beside the pages."""
        return self.scaled is not None and not any(SCALES in section for section in self.sections)

    @functools.cached_property
    def tensor_scale(self) -> bool:
        """True if one given scale serves the whole cache."""
        return bool(self.scaled and self.scaled.scale and self.scaled.scale.kind is Scale.TENSOR)

    def check(self, head_dim: int, rope_dim: int | None = None) -> None:
        """Raise UnsupportedError with the reason unless rows of this shape fit the format."""
        require_int("head_dim", head_dim, 1)
        if self.head_dim is not None and head_dim != self.head_dim:
            raise UnsupportedError(
                "format", f"head_dim {self.head_dim} for {self.name} ({self.summary})", f"head_dim {head_dim}"
            )
        if self.rope_dim is not None and rope_dim is not None and rope_dim != self.rope_dim:
            raise UnsupportedError(
                "format",
                f"rope_dim {self.rope_dim} for {self.name} (its last {self.rope_dim} channels stay bf16)",
                f"rope_dim {rope_dim}",
            )

    @functools.cache  # noqa: B019 - formats are few, frozen and live as long as the program
    def fields(self, head_dim: int) -> tuple[Field, ...]:
        """The byte map: every field of the pages, in order of its address."""
        self.check(head_dim)
        sizes = self._sizes(head_dim)
        found, base = [], 0
        for section in self.sections:
            stride = sum(count * dtype.itemsize for dtype, count in (sizes[name] for name in section))
            offset = 0
            for name in section:
                tile = self.tile if section == self.sections[0] else 1
                field = Field(name, *sizes[name], base=base, stride=stride, offset=offset, tile=tile)
                found.append(field)
                offset += field.nbytes
            base += stride
        return tuple(found)

    @functools.cache  # noqa: B019
    def second(self, head_dim: int) -> Field | None:
        """Channels in a second buffer beside the pages, if there are such: row after row, nothing else."""
        named = {name for section in self.sections for name in section}
        part = next((c for c in self.channels if c.name not in named), None)
        if part is None:
            return None
        dtype, count = self._sizes(head_dim)[part.name]
        return Field(part.name, dtype, count, base=0, stride=count * dtype.itemsize, offset=0)

    def outside_bytes(self, head_dim: int) -> int:
        """Bytes of a row that lie beside the pages: its scale, or its channels in a second buffer."""
        second = self.second(head_dim)
        own_scale = self.scales_outside and not self.tensor_scale
        return (4 if own_scale else 0) + (0 if second is None else second.nbytes)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of account of one row: its fields in the page."""
        return sum(f.nbytes for f in self.fields(head_dim))

    def check_page_rows(self, page_rows: int) -> None:
        """Raise UnsupportedError unless pages may have so many rows."""
        if page_rows % self.tile:
            raise UnsupportedError("page_rows", f"a multiple of {self.tile} for {self.name}", page_rows)

    def page_bytes(self, head_dim: int, page_rows: int) -> int:
        """Bytes from one page to the next."""
        return -(-page_rows * self.row_bytes(head_dim) // self.align) * self.align

    def name_byte(self, head_dim: int, page_rows: int, byte: int) -> str:
        """What lies at ``byte`` of a page: "scales[3] of row 7", or the tail that rounds up the page stride."""
        for f in self.fields(head_dim):
            row, inside = divmod(byte - f.base * page_rows, f.stride)
            if f.tile > 1 and 0 <= row < page_rows:
                tiles, (column, cell) = row // f.tile, divmod(byte - f.base * page_rows, f.tile * f.tile)
                row = tiles * f.tile + cell // f.tile
                inside = (column - tiles * (f.stride // f.tile)) * f.tile + cell % f.tile
            if 0 <= row < page_rows and f.offset <= inside < f.offset + f.nbytes:
                return f"{f.name}[{(inside - f.offset) // f.dtype.itemsize}] of row {row}"
        return "the page's tail"

    def scale_shape(self, num_pages: int, page_rows: int) -> tuple[int, ...] | None:
        """Shape of the fp32 scales outside the pages; None if there are none."""
        if not self.scales_outside:
            return None
        return () if self.tensor_scale else (num_pages, page_rows)

    def encode(
        self, rows: torch.Tensor, tensor_scale: torch.Tensor | None = None, exact: bool = False
    ) -> dict[str, torch.Tensor]:
        """Rows [E, head_dim] (fp32, fp64 or bf16) -> the stored values of each field [E, count], pad bytes included.

        ``tensor_scale``: fp32 [], of formats with one scale for the whole cache. Scales outside the pages are in
        ``scales`` too. ``exact``: rows are quantised as they are, not their bf16.
        """
        x = self._input(rows, exact)
        if self.clean:
            x = torch.where(torch.isnan(x), 0.0, x)
        if self.through is not None:
            x = self.through.decode(self.through.encode(x, exact=True)).to(torch.bfloat16).to(torch.float32)
        out = {}
        for part in self.channels:
            values = x[:, part.start : part.stop]
            if part.scale is None:
                codes = part.element.encode(values)
            else:
                codes, stored = part.scale.quantise(values, part.element, tensor_scale, self.clean)
                if stored is not None:
                    out[SCALES] = stored
            out[part.name] = pack_nibbles(codes) if part.element.bits == 4 else codes
        if self.pad_bytes:
            out[PAD] = torch.zeros(x.shape[0], self.pad_bytes, dtype=torch.uint8, device=x.device)
        return out

    def decode(self, stored: dict[str, torch.Tensor], tensor_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Fields of ``encode`` -> rows [E, head_dim] fp32: q * s in fp32. Pad bytes are not looked at."""
        pieces = []
        for part in self.channels:
            codes = stored[part.name]
            values = part.element.decode(unpack_nibbles(codes) if part.element.bits == 4 else codes)
            scales = self._scales(part, stored, tensor_scale)
            pieces.append(values if scales is None else _blockwise(values, scales))
        return torch.cat(pieces, dim=-1)

    def error_bound(
        self,
        rows: torch.Tensor,
        stored: dict[str, torch.Tensor],
        tensor_scale: torch.Tensor | None = None,
        exact: bool = False,
    ) -> torch.Tensor:
        """How far ``decode`` may lie from rows [E, head_dim], elementwise, if nothing saturated: half a step.

        The step of a small float grows with the value: relative * |x| + absolute * s. A scale that was itself rounded
        down (e4m3) may also clip the largest values of its block, by as much as it was rounded.
        """
        x = self._input(rows, exact)
        if self.through is not None:
            inner = self.through
            bound = inner.error_bound(x, inner.encode(x, exact=True), exact=True)
            if self.scaled is None:
                return bound
            back = inner.decode(inner.encode(x, exact=True)).to(torch.bfloat16)
            return bound + replace(self, through=None).error_bound(back, stored, tensor_scale)
        pieces = []
        for part in self.channels:
            values = x[:, part.start : part.stop].abs()
            scales = self._scales(part, stored, tensor_scale)
            absolute = torch.full_like(values, part.element.absolute)
            if part.scale is not None and scales is not None:
                absolute = _blockwise(absolute, scales)
                clipped = values - _blockwise(torch.full_like(values, part.element.largest), scales)
                slack = part.element.largest * part.scale.rounding(scales)
                absolute += clipped.clamp(min=0).minimum(_blockwise(torch.ones_like(values), slack))
            # 2^-20: x / s, 1 / s and q * s are rounded to fp32.
            pieces.append(values * (part.element.relative + 2.0**-20) + absolute)
        return torch.cat(pieces, dim=-1)

    def lost(
        self,
        rows: torch.Tensor,
        stored: dict[str, torch.Tensor],
        tensor_scale: torch.Tensor | None = None,
        exact: bool = False,
    ) -> torch.Tensor:
        """True for elements [E, head_dim] that did not survive: saturated values, and infinities stored as NaN."""
        x = self._input(rows, exact)
        back = self.decode(stored, tensor_scale)
        # The other values of a block that a NaN poisoned are gone too, but the NaN tells.
        told = torch.isnan(back) & ~torch.isinf(x)
        near = (x - back).abs() <= self.error_bound(rows, stored, tensor_scale, exact)
        return ~(told | near | (x == back))

    def keeps_row(self, exact: bool) -> bool:
        """Whether rows are encoded as they are. A scale for the whole cache always meets their bf16: so vLLM has it."""
        return (exact and not self.tensor_scale) or (self.plain is not None and self.plain.dtype == torch.float32)

    def _input(self, rows: torch.Tensor, exact: bool) -> torch.Tensor:
        return rows.to(torch.float32) if self.keeps_row(exact) else rows.to(torch.bfloat16).to(torch.float32)

    def _scales(
        self, part: Channels, stored: dict[str, torch.Tensor], tensor_scale: torch.Tensor | None
    ) -> torch.Tensor | None:
        if part.scale is None:
            return None
        if part.scale.kind is not Scale.TENSOR:
            return part.scale.values(stored[SCALES])
        assert tensor_scale is not None
        return tensor_scale.expand(stored[part.name].shape[0], 1)

    def _sizes(self, head_dim: int) -> dict[str, tuple[torch.dtype, int]]:
        """(dtype, count) of every field."""
        sizes = {PAD: (torch.uint8, self.pad_bytes)}
        for part in self.channels:
            channels = (head_dim if part.stop is None else part.stop) - part.start
            packed = part.element.bits == 4
            sizes[part.name] = (part.element.dtype, channels // 2 if packed else channels)
            if part.scale is not None and part.scale.block is not None:
                sizes[SCALES] = (part.scale.dtype, channels // part.scale.block)
        return sizes


_FP32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)
"""The least and the largest normal fp32."""


def check_tensor_scale(value: float) -> float:
    """``value`` if it can be the scale of a whole cache, an fp32; raises RangeError otherwise."""
    if not _FP32[0] <= value <= _FP32[1]:
        raise RangeError("tensor_scale", "a positive finite number of fp32", value)
    return value


def _blockwise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values [E, n] times scales [E, blocks], each for n / blocks neighbours."""
    blocks = values.unflatten(-1, (scales.shape[-1], -1))
    return (blocks * scales[..., None]).flatten(-2)
