"""Element codecs: fp32 values to codes and back by integer arithmetic on bits, the same on every device.

No logarithm and no hardware cast decides a code, so that other backends can reproduce every byte (Triton's interpreter,
for one, truncates where hardware rounds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000
_MANTISSA = 0x7FFFFF


class Element(Protocol):
    """How one channel is stored. ``relative`` and ``absolute`` bound the rounding of a value in range: half a step."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def bits(self) -> int: ...
    @property
    def largest(self) -> float: ...
    @property
    def has_nan(self) -> bool: ...
    @property
    def relative(self) -> float: ...
    @property
    def absolute(self) -> float: ...

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [...] -> codes of ``dtype`` [...], one per value."""
        ...

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [...] -> fp32 [...], exact."""
        ...


@dataclass(frozen=True)
class SmallFloat:
    """A float of ``bits`` bits: sign, exponent (``bias``), ``mantissa`` bits, subnormals; no infinity.

    encode rounds to nearest (ties to even, or down: towards zero), saturates finite values at ``max_code`` and keeps
    the sign of zero. NaN and infinity become the NaN code if there is one and code 0 if not (a scale says so then),
    without a sign: what sign a NaN has depends on the processor. ``typed``: torch's own type of these codes.
    """

    name: str
    bits: int
    mantissa: int
    bias: int
    max_code: int
    nan_code: int | None
    ties_to_even: bool = True
    typed: torch.dtype | None = None
    dtype: torch.dtype = torch.uint8

    @property
    def signless_zero(self) -> bool:
        """True if the NaN code is where -0 would be: zeros have no sign then."""
        return self.nan_code == 1 << (self.bits - 1)

    @property
    def largest(self) -> float:
        """The value of ``max_code``."""
        exponent, fraction = divmod(self.max_code, 1 << self.mantissa)
        return (1 + fraction / (1 << self.mantissa)) * 2.0 ** (exponent - self.bias)

    @property
    def has_nan(self) -> bool:
        return self.nan_code is not None

    @property
    def relative(self) -> float:
        return 2.0 ** -(self.mantissa + 1)

    @property
    def absolute(self) -> float:
        return 2.0 ** -(self.bias + self.mantissa)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        bits = fp32_bits(x)
        magnitude = (bits & _MAGNITUDE).clamp(max=_INFINITY)
        drop = 23 - self.mantissa
        # Rebiased, the exponent runs on from the mantissa: a carry out of the rounding lands in the next binade.
        rebiased = magnitude - ((127 - self.bias) << 23)
        normal = _shift_right(rebiased, torch.full_like(bits, drop), self.ties_to_even)
        subnormal = _scaled_integer(magnitude, self.bias + self.mantissa - 1, self.ties_to_even)
        code = torch.where(magnitude >= (128 - self.bias) << 23, normal, subnormal).clamp(max=self.max_code)
        code = torch.where(magnitude == _INFINITY, self.nan_code or 0, code)
        sign = (bits >> (32 - self.bits)) & (1 << (self.bits - 1))
        if self.signless_zero:
            sign = torch.where(code == 0, 0, sign)
        return torch.where(magnitude == _INFINITY, code, code | sign).to(torch.uint8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        code = codes.to(torch.int32)
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        normal = ((magnitude << (23 - self.mantissa)) + ((127 - self.bias) << 23)).view(torch.float32)
        subnormal = magnitude.to(torch.float32) * 2.0 ** (1 - self.bias - self.mantissa)
        value = torch.where(magnitude >> self.mantissa > 0, normal, subnormal)
        if self.nan_code is not None:
            nan = (code if self.signless_zero else magnitude) == self.nan_code
            value = torch.where(nan, float("nan"), value)
        return torch.where(code >> (self.bits - 1) > 0, -value, value)


@dataclass(frozen=True)
class Int8:
    """Whole numbers -127..127, ties to even; saturates. NaN and infinity become 0: the row's scale says so."""

    name: str = "int8"
    dtype: torch.dtype = torch.int8
    bits: int = 8
    largest: float = 127.0
    has_nan: bool = False
    relative: float = 0.0
    absolute: float = 0.5

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        bits = fp32_bits(x)
        magnitude = (bits & _MAGNITUDE).clamp(max=_INFINITY)
        number = _scaled_integer(magnitude, 0, True).clamp(max=127)
        number = torch.where(magnitude == _INFINITY, 0, number)
        return torch.where(bits < 0, -number, number).to(torch.int8)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.float32)


@dataclass(frozen=True)
class Plain:
    """A type that torch knows. Infinity stays what it is; every NaN becomes the one with bits ``nan_bits``."""

    name: str
    dtype: torch.dtype
    nan_bits: int
    has_nan: bool = True

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max

    @property
    def relative(self) -> float:
        return torch.finfo(self.dtype).eps / 2

    @property
    def absolute(self) -> float:
        info = torch.finfo(self.dtype)
        return info.smallest_normal * info.eps / 2

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        # What bits a cast gives a NaN depends on the processor and on the length of the tensor.
        integer = torch.int16 if self.bits == 16 else torch.int32
        nan = torch.tensor(self.nan_bits, dtype=integer, device=x.device).view(self.dtype)
        return torch.where(torch.isnan(x), nan, x.to(self.dtype))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.to(torch.float32)


BF16 = Plain("bf16", torch.bfloat16, nan_bits=0x7FC0)
FP32 = Plain("fp32", torch.float32, nan_bits=0x7FC00000)
INT8 = Int8()
E4M3 = SmallFloat("e4m3", bits=8, mantissa=3, bias=7, max_code=0x7E, nan_code=0x7F, typed=torch.float8_e4m3fn)
"""OCP e4m3fn: largest 448, S.1111.111 is NaN."""
E4M3FNUZ = SmallFloat("e4m3fnuz", bits=8, mantissa=3, bias=8, max_code=0x7F, nan_code=0x80, typed=torch.float8_e4m3fnuz)
"""e4m3 of AMD's gfx942: the same byte is half the value; largest 240, no -0, 0x80 is NaN."""
E2M1 = SmallFloat("e2m1", bits=4, mantissa=1, bias=1, max_code=7, nan_code=None)
"""OCP FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
E2M1_TIES_DOWN = SmallFloat("e2m1", bits=4, mantissa=1, bias=1, max_code=7, nan_code=None, ties_to_even=False)
"""FP4 where 0.75, 1.75 and 3.5 become 0.5, 1.5 and 3 (the other ties go down in both)."""

UE8M0_NAN = 255


def encode_ue8m0(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent as a byte: exponent + 127, in -127..127."""
    return (exponent + 127).to(torch.uint8)


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """Byte b -> 2^(b - 127) as fp32; 255 is NaN. Byte 0 is the subnormal 2^-127."""
    bits = codes.to(torch.int32)
    value = torch.where(bits == 0, 1 << 22, bits << 23)
    return torch.where(bits == UE8M0_NAN, 0x7FC00000, value).view(torch.float32)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes [..., n] -> bytes [..., n / 2], the even channel in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n / 2] -> 4-bit codes [..., n]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def ceil_log2_ratio(amax: torch.Tensor, largest: float) -> torch.Tensor:
    """ceil(log2(amax / largest)) of positive fp32 ``amax``, exactly, as int32; at most -127 for subnormals.

    With largest = (1 + f) 2^e the quotient passes a power of two where the mantissa of amax passes f: compare bits.
    """
    bits, reference = fp32_bits(amax), int(fp32_bits(torch.tensor(largest, device="cpu")))
    above = ((bits & _MANTISSA) > (reference & _MANTISSA)).to(torch.int32)
    return ((bits >> 23) - (reference >> 23) + above).clamp(min=-127)


def fp32_bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of fp32 values as int32."""
    return x.to(torch.float32).contiguous().view(torch.int32)


def _scaled_integer(magnitude: torch.Tensor, exponent: int, ties_to_even: bool) -> torch.Tensor:
    """round(|x| * 2^exponent) from the bits of |x|; from 2^22 on something larger than that."""
    biased = magnitude >> 23
    full = (magnitude & _MANTISSA) | torch.where(biased > 0, 1 << 23, 0)
    # |x| = full * 2^(max(biased, 1) - 150); from a shift of 25 on, the 24 bits round to 0. Large values need a shift to
    # the left, but they saturate whatever it is.
    shift = (150 - exponent - biased.clamp(min=1)).clamp(1, 25)
    return _shift_right(full, shift.to(torch.int32), ties_to_even)


def _shift_right(n: torch.Tensor, shift: torch.Tensor, ties_to_even: bool) -> torch.Tensor:
    """n / 2^shift to the nearest integer; ties to the even one, or down."""
    odd = (n >> shift) & 1 if ties_to_even else 0
    return (n + (torch.ones_like(n) << (shift - 1)) - 1 + odd) >> shift
