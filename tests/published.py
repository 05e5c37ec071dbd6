"""Cache pages and state blocks byte by byte, in plain Python, from the layouts that engines publish."""

import math
import struct

E4M3 = sorted(
    ((1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6, 8 * e + m)
    for e in range(16)
    for m in range(8)
    if (e, m) != (15, 7)
)
"""Every finite e4m3fn magnitude with its byte."""


def e4m3(x):
    """The byte of the nearest e4m3fn, ties to the even one."""
    magnitude = min(abs(x), 448.0)
    value, code = min(E4M3, key=lambda entry: (abs(entry[0] - magnitude), entry[1] % 2))
    del value
    return code | (0x80 if math.copysign(1, x) < 0 else 0)


def bf16(x):
    """The two bytes of the nearest bf16."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)


def exponent(amax):
    """ceil(log2(max(amax, 1e-4) / 448)) without logarithms that round."""
    mantissa, e = math.frexp(struct.unpack("<f", struct.pack("<f", max(amax, 1e-4)))[0] / 448)
    return e - 1 if mantissa == 0.5 else e


def model1_page(rows, page_rows):
    """FlashMLA's MODEL1 page (vLLM's fp8_ds_mla): 576 bytes a row, then 8 a row, padded to a multiple of 576.

    rows: {row of the page: 512 floats}; others are zero bytes.
    """
    page = bytearray(math.ceil(584 * page_rows / 576) * 576)
    for i, row in rows.items():
        for block in range(7):
            values = row[64 * block : 64 * block + 64]
            e = exponent(max(map(abs, values)))
            for j, x in enumerate(values):
                page[576 * i + 64 * block + j] = e4m3(x / 2.0**e)
            page[576 * page_rows + 8 * i + block] = e + 127
        for j, x in enumerate(row[448:]):
            page[576 * i + 448 + 2 * j : 576 * i + 450 + 2 * j] = bf16(x)
    return bytes(page)


def indexer_page(rows, page_rows, power_of_two):
    """An indexer page: 128 e4m3 bytes a row, then one fp32 scale a row."""
    page = bytearray(132 * page_rows)
    for i, row in rows.items():
        amax = max(max(map(abs, row)), 1e-4)
        scale = 2.0 ** exponent(amax) if power_of_two else struct.unpack("<f", struct.pack("<f", amax / 448))[0]
        for j, x in enumerate(row):
            page[128 * i + j] = e4m3(struct.unpack("<f", struct.pack("<f", x / scale))[0])
        page[128 * page_rows + 4 * i : 128 * page_rows + 4 * i + 4] = struct.pack("<f", scale)
    return bytes(page)


def fp32_row(memory, offset, count):
    """``count`` floats at a byte offset."""
    return list(struct.unpack_from(f"<{count}f", memory, offset))
