"""Device functions on bits and orders: rounding, halving sums, partners. No reduction decides a bit, and no cast that
has not been shown to give every bit (HARDWARE: the chip's own is used).

Sums are halving trees of two-element sums, so that neither layouts nor warps decide their order. Compile-time records
(``c``, ``part``) are read through ``.value``: Triton wraps them, its interpreter does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def to_bits(x):
    """The bits of fp32 values."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(b):
    """fp32 values from their bits."""
    return b.to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """e^x as 2^(x log2 e): what chips do. Results below 2^-126 are 0 on most, for which ``tl.exp`` takes three more."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def bf16_bits(x, HARDWARE: tl.constexpr):
    """fp32 bits of the nearest bf16, ties to even; every NaN is 0x7FC00000."""
    if HARDWARE:
        bits = tl.inline_asm_elementwise(  # two at a time: one alone goes to a unit that is a quarter as fast
            "cvt.rn.bf16x2.f32 $1, $3, $2; shl.b32 $0, $1, 16; and.b32 $1, $1, 0xFFFF0000;",
            "=&r,=&r,f,f", [x], dtype=tl.int32, is_pure=True, pack=2,
        )  # fmt: skip
        bits = tl.where(x == x, bits, 0x7FC00000)
    else:
        b = to_bits(x)
        rounded = (b + 0x7FFF + ((b >> 16) & 1)) & -65536
        bits = tl.where((b & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, rounded)
    return bits


@triton.jit
def round_bf16(x, c: tl.constexpr):
    """To the nearest bf16, as fp32."""
    HARDWARE: tl.constexpr = c.value.casts_bf16
    return from_bits(bf16_bits(x, HARDWARE))


@triton.jit
def rows_sum(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr, G: tl.constexpr = 1):
    """x [ROWS, COLUMNS] -> [COLUMNS]: the second half of the rows is added to the first until one is left. Of G such,
    [G, ROWS, COLUMNS] -> [G, COLUMNS].
    """
    for i in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (G, 2, ROWS >> (i + 1), COLUMNS)), axis=1)
    return tl.reshape(x, (COLUMNS,) if G == 1 else (G, COLUMNS))


@triton.jit
def row_of(x, g):
    """Row g of x [G, N], whose bits a sum with zeros of integers moves unchanged."""
    mine = tl.arange(0, x.shape[0]) == g
    return from_bits(tl.sum(tl.where(mine[:, None], to_bits(x), 0), axis=0))


@triton.jit
def tree_sum(x, N: tl.constexpr, LEVELS: tl.constexpr):
    """x [N] -> [1], its sum as ``numerics.tree_sum`` orders it."""
    for i in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, (2, N >> (i + 1))), axis=0)
    return x


@triton.jit
def partner(x, N: tl.constexpr, DISTANCE: tl.constexpr):
    """x [N] -> channel i gets channel i ^ DISTANCE. Sums of two integers, minus one's own, move bits unchanged."""
    b = tl.reshape(to_bits(x), (N // (2 * DISTANCE), 2, DISTANCE))
    both = tl.sum(b, axis=1)
    return from_bits(tl.reshape(both[:, None, :] - b, (N,)))


@triton.jit
def store_bytes(pointer, values, mask, N: tl.constexpr, WIDTH: tl.constexpr):
    """The low WIDTH bytes of values [N] int32, one after the other from ``pointer`` (uint8); mask [N]."""
    if WIDTH == 1:
        tl.store(pointer + tl.arange(0, N), values.to(tl.uint8), mask=mask)
    else:
        shift = 8 * tl.arange(0, WIDTH)
        # & 255: what a cast of larger integers does is nobody's contract.
        split = tl.reshape((values[:, None] >> shift[None, :]) & 255, (N * WIDTH,))
        wide = tl.reshape(tl.broadcast_to(mask[:, None], (N, WIDTH)), (N * WIDTH,))
        tl.store(pointer + tl.arange(0, N * WIDTH), split.to(tl.uint8), mask=wide)
