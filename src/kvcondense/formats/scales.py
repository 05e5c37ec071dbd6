"""Scale rules: which scale a block of channels gets, how it is stored, and how values are divided by it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from kvcondense.formats.elements import (
    E4M3,
    UE8M0_NAN,
    Element,
    ceil_log2_ratio,
    decode_ue8m0,
    encode_ue8m0,
)


class Scale(enum.Enum):
    """How the scale s of a block follows from amax, the largest magnitude in it; L is the element's largest value."""

    POW2_BYTE = "2^ceil(log2(amax / L)) as a ue8m0 byte"
    POW2_FP32 = "2^ceil(log2(amax / L)) as fp32"
    POW2_PAIR = "2^ceil(log2(amax / L)) as two equal ue8m0 bytes"
    POW2_WORD = "2^ceil(log2(amax / L)) as four equal ue8m0 bytes"
    PLAIN_FP32 = "amax / L as fp32; codes of x * (1 / s)"
    E4M3_BYTE = "e4m3(amax / L); codes of x / s"
    E4M3_TIMES = "e4m3(amax * fp32(1 / L)); codes of x / s"
    E4M3_INVERSE = "e4m3(amax / L), which may be 0; codes of x * (1 / s), or 0"
    INVERSE_FP32 = "1 / (L / amax) as fp32; codes of x * (L / amax)"
    TENSOR = "one fp32 for the whole cache, given; codes of x / s"


POW2 = (Scale.POW2_BYTE, Scale.POW2_FP32, Scale.POW2_PAIR, Scale.POW2_WORD)
E4M3_SCALES = (Scale.E4M3_BYTE, Scale.E4M3_TIMES, Scale.E4M3_INVERSE)
_COPIES = {
    Scale.POW2_BYTE: (torch.uint8, 1),
    Scale.POW2_PAIR: (torch.int16, 0x0101),
    Scale.POW2_WORD: (torch.int32, 0x01010101),
}
"""How the byte of a power of two is stored: times that, in this type."""


@dataclass(frozen=True)
class ScaleRule:
    """One scale per ``block`` channels (None: per cache). ``floor`` is the least amax, or the least s (floor_on_scale).

    amax is taken over the finite values. A block with a NaN or an infinity, of elements that have no NaN code, gets
    the NaN scale and codes 0 (which readers that take ue8m0 255 for 2^128 turn into 0 * inf = NaN as well).
    """

    kind: Scale
    block: int | None
    floor: float = 0.0
    floor_on_scale: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of one scale."""
        if self.kind in _COPIES:
            return _COPIES[self.kind][0]
        return torch.uint8 if self.kind in E4M3_SCALES else torch.float32

    def quantise(
        self, x: torch.Tensor, element: Element, tensor_scale: torch.Tensor | None, clean: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [E, n] fp32 -> codes [E, n] and stored scales [E, n / block] (None for a scale of the whole cache).

        ``clean``: no NaN is stored, neither as a code nor as a scale; an infinity is the block's largest code.
        """
        if self.kind is Scale.TENSOR:
            assert tensor_scale is not None
            scaled = x / tensor_scale
            return element.encode(scaled.nan_to_num(0.0) if clean else scaled), None
        assert self.block is not None
        blocks = x.unflatten(-1, (-1, self.block))  # [E, blocks, block]
        finite = torch.isfinite(blocks)
        amax = torch.where(finite, blocks.abs(), 0.0).amax(-1)  # [E, blocks]
        if not self.floor_on_scale:
            amax = amax.clamp(min=self.floor)
        stored, scaled = self._apply(blocks, amax, element)
        if clean:
            scaled = scaled.nan_to_num(0.0)
        codes = element.encode(scaled)
        if not element.has_nan and not clean:
            poisoned = ~finite.all(-1)
            codes = torch.where(poisoned[..., None], 0, codes)
            nan = torch.full_like(stored, float("nan") if stored.dtype == torch.float32 else self.nan * self.copies)
            stored = torch.where(poisoned, nan, stored)
        return codes.flatten(-2), stored

    def values(self, stored: torch.Tensor) -> torch.Tensor:
        """Stored scales -> fp32."""
        if self.kind in _COPIES:
            return decode_ue8m0(stored & 0xFF)
        return E4M3.decode(stored) if self.kind in E4M3_SCALES else stored

    @property
    def nbytes(self) -> int:
        """Bytes of a stored scale."""
        return self.dtype.itemsize

    @property
    def copies(self) -> int:
        """What the byte of a scale is multiplied by, to stand in all bytes of it; 0: it is stored as fp32."""
        return 1 if self.kind in E4M3_SCALES else _COPIES.get(self.kind, (None, 0))[1]

    @property
    def divides(self) -> bool:
        """Whether values are divided, by what is stored; else they are multiplied."""
        return self.kind in (Scale.TENSOR, Scale.E4M3_BYTE, Scale.E4M3_TIMES)

    @property
    def nan(self) -> int:
        """The byte of a scale that is none."""
        return (E4M3.nan_code or 0) if self.kind in E4M3_SCALES else UE8M0_NAN

    def rounding(self, scales: torch.Tensor) -> torch.Tensor:
        """How much less than the exact scale ``scales`` may be; power-of-two scales are rounded up, never down."""
        if self.kind in E4M3_SCALES:
            return scales * E4M3.relative + E4M3.absolute
        return torch.zeros_like(scales)

    def exponent(self, amax: torch.Tensor, element: Element) -> torch.Tensor:
        """Power-of-two rules: log2 of the scale, [E, blocks] int32."""
        exponent = ceil_log2_ratio(amax, element.largest)
        if self.floor_on_scale:
            exponent = exponent.clamp(min=int(ceil_log2_ratio(torch.tensor(self.floor, device="cpu"), 1.0)))
        return exponent

    def _apply(self, blocks: torch.Tensor, amax: torch.Tensor, element: Element) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored scales [E, blocks], and the blocks divided by them."""
        if self.kind in POW2:
            exponent = self.exponent(amax, element)
            # Dividing by a power of two is exact; -exponent is a legal exponent, as 2^-126 <= s <= 2^126.
            scaled = blocks * decode_ue8m0(encode_ue8m0(-exponent))[..., None]
            stored = encode_ue8m0(exponent)
            if self.kind in _COPIES:
                dtype, copies = _COPIES[self.kind]
                return (stored.to(torch.int64) * copies).to(dtype), scaled
            return decode_ue8m0(stored), scaled
        if self.kind is Scale.PLAIN_FP32:
            scale = _divide(amax, element.largest)
            return scale, blocks * _divide(1.0, scale)[..., None]
        if self.kind in E4M3_SCALES:
            times = self.kind is Scale.E4M3_TIMES
            stored = E4M3.encode(
                amax * _divide(1.0, torch.full_like(amax, element.largest)) if times else _divide(amax, element.largest)
            )
            scale = E4M3.decode(stored)[..., None]
            if self.kind is Scale.E4M3_INVERSE:
                return stored, blocks * torch.where(scale == 0, 0.0, _divide(1.0, scale))
            return stored, blocks / scale
        multiplier = _divide(element.largest, amax)
        return _divide(1.0, multiplier), blocks * multiplier[..., None]


def _divide(a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """a / b as one fp32 division. With a Python number on either side torch may multiply by a rounded reciprocal."""
    like = a if isinstance(a, torch.Tensor) else b
    assert isinstance(like, torch.Tensor)
    a, b = (t if isinstance(t, torch.Tensor) else torch.full_like(like, t) for t in (a, b))
    return a / b
