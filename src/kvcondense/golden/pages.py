"""Golden pages: a second implementation of every cache format, in numpy, that shares nothing with ``formats``.

Codes are found by searching the table of all values for the nearest one, scales by comparing with powers of two in
fp64, and bytes are laid down row by row. Layouts as published: FlashMLA, vLLM, SGLang and pypto-lib.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvcondense.errors import UnsupportedError

_HALVES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_BYTES = np.arange(127)
_FP8 = np.where(_BYTES < 8, _BYTES / 512, (1 + _BYTES % 8 / 8) * 2.0 ** (_BYTES // 8 - 7.0))  # 0 .. 448
_NAN_FP8 = 0x7F
_FNUZ = np.append(np.where(_BYTES < 8, _BYTES / 1024, (1 + _BYTES % 8 / 8) * 2.0 ** (_BYTES // 8 - 8.0)), 240.0)


@dataclass(frozen=True)
class _Layout:
    """Bytes of data and of scales of a row, what the page stride is a multiple of, scales behind each row, 16 x 16.

    second: how many of the last bytes of data lie in a buffer of their own.
    """

    data: int
    scales: int
    align: int
    inline: bool = False
    tiles: bool = False
    second: int = 0


_LAYOUTS = {
    "fp8_model1": _Layout(576, 8, 576),
    "fp8_model1_two_buffers": _Layout(576, 64, 1, inline=True, second=128),
    "fp4_model1": _Layout(352, 32, 1),
    "fp8_indexer": _Layout(128, 4, 1),
    "fp8_indexer_pow2_16x16": _Layout(128, 4, 1, tiles=True),
    "fp8_indexer_fnuz_16x16": _Layout(128, 4, 1, tiles=True),
    "mxfp4_indexer": _Layout(64, 4, 1),
    "int8_indexer": _Layout(128, 0, 1),
    "fp4_v41": _Layout(256, 32, 256),
    "fp4_v41_interleaved": _Layout(256, 32, 288, inline=True),
    "fp4_v41_times_interleaved": _Layout(256, 32, 288, inline=True),
    "mxfp8_v41_window_interleaved": _Layout(512, 16, 528, inline=True),
    "mxfp8_v41_window": _Layout(512, 16, 512),
}


def encode_row(name: str, row: torch.Tensor, tensor_scale: float = 1.0, exact: bool = False) -> tuple[bytes, bytes]:
    """One row [d] -> its bytes of data and of scales (for int8: outside the page); ``exact``: not rounded to bf16."""
    if name == "fp32":
        return np.where(np.isnan(x32 := row.float().numpy()), np.float32("nan"), x32).tobytes(), b""
    exact = exact and not name.startswith("fp8_tensor")
    x = (row.float() if exact else row.bfloat16().float()).numpy().astype(np.float64)
    if name == "bf16":
        return _bf16(row.bfloat16().double().numpy()), b""
    if "_via_" in name:
        outer, inner = name.split("_via_")
        back = torch.from_numpy(_fp32(decode_row(inner, *encode_row(inner, row, exact=exact))))
        return encode_row(outer, back.float())
    floor_on_scale, clean = name.endswith("_scale_floor") or "_two_buffers" in name, name.endswith("_clean")
    if clean:
        x = np.where(np.isnan(x), 0.0, x)
    if name.startswith("fp8_model1"):
        fnuz = name.endswith("_fnuz")
        codes, exponents = _fp8_blocks(x[:448], 64, floor_on_scale, clean, fnuz)
        scales = bytes(e + 127 for e in exponents)
        scales = bytes(np.repeat(bytearray(scales), 2)) + bytes(50) if "_two_buffers" in name else scales + b"\0"
        return codes + _bf16(x[448:]), scales
    if name == "fp4_model1":
        codes, scales = _fp4_v41(x[:448], _INVERSE)
        return codes + _bf16(x[448:]), scales + bytes(4)
    if name.startswith("mxfp8_v41_window"):
        codes, exponents = _fp8_blocks(x, 32, floor_on_scale, clean)
        return codes, bytes(e + 127 for e in exponents)
    if name == "fp8_tensor":
        return _nearest_fp8(_fp32(x / np.float64(np.float32(tensor_scale)))), b""
    if name == "fp8_tensor_fnuz":
        return _nearest_fnuz(_fp32(x / np.float64(np.float32(tensor_scale)))), b""
    if name.startswith("fp8_indexer_fnuz"):
        k = _power_above(max(_amax(x), float(np.float32(1e-4))), 240.0)
        return _nearest_fnuz(x / 2.0**k), np.float32(2.0**k).tobytes()
    if name.startswith("fp8_indexer_pow2") or name == "fp8_indexer_ue8m0":
        codes, exponents = _fp8_blocks(x, 128, False)
        four = bytes([exponents[0] + 127] * 4)
        return codes, four if name == "fp8_indexer_ue8m0" else np.float32(2.0 ** exponents[0]).tobytes()
    if name == "fp8_indexer_plain":
        scale = np.float32(max(_amax(x), np.float32(1e-4))) / np.float32(448)
        return _nearest_fp8((x.astype(np.float32) * (np.float32(1) / scale)).astype(np.float64)), scale.tobytes()
    if name.startswith("mxfp4_indexer"):
        return _mxfp4(x, ties_down=name.endswith("_ties_down"))
    if name.startswith("fp4_v41"):
        return _fp4_v41(x, _TIMES if "_times" in name else _BY, clean)
    if name == "int8_indexer":
        if not np.isfinite(x).all():
            return bytes(128), np.float32("nan").tobytes()
        up = np.float32(127) / np.float32(max(_amax(x), np.float32(1e-4)))
        codes = np.rint((x.astype(np.float32) * up).astype(np.float64)).clip(-127, 127)
        return codes.astype(np.int8).tobytes(), (np.float32(1) / up).tobytes()
    raise UnsupportedError("format", "a format with a golden encoder", name)


def decode_row(name: str, data: bytes, scales: bytes, tensor_scale: float = 1.0) -> np.ndarray:
    """Bytes of ``encode_row`` -> the row in fp64, q * s rounded to fp32."""
    if name == "fp32":
        return np.frombuffer(data, np.float32).astype(np.float64)
    if name.startswith("bf16"):
        return _from_bf16(data)
    name = name.split("_via_")[0]
    if name.startswith("fp8_model1"):
        values = _from_fnuz(data[:448]) if name.endswith("_fnuz") else _from_fp8(data[:448])
        powers = _powers(scales[0:14:2] if "_two_buffers" in name else scales[:7])
        return np.concatenate([values * np.repeat(powers, 64), _from_bf16(data[448:])])
    if name == "fp4_model1":
        nope = _from_fp4(data[:224]) * np.repeat(_from_fp8(scales[:28]), 16)
        return np.concatenate([nope, _from_bf16(data[224:])])
    if name.startswith("mxfp8_v41_window"):
        return _from_fp8(data) * np.repeat(_powers(scales), 32)
    if name == "fp8_tensor":
        return _fp32(_from_fp8(data) * np.float64(np.float32(tensor_scale)))
    if name == "fp8_tensor_fnuz":
        return _fp32(_from_fnuz(data) * np.float64(np.float32(tensor_scale)))
    if name.startswith("fp8_indexer_fnuz"):
        return _fp32(_from_fnuz(data) * np.float64(np.frombuffer(scales, np.float32)[0]))
    if name == "fp8_indexer_ue8m0":
        return _from_fp8(data) * _powers(scales[:1])
    if name.startswith("fp8_indexer"):
        return _fp32(_from_fp8(data) * np.float64(np.frombuffer(scales, np.float32)[0]))
    if name.startswith("mxfp4_indexer"):
        return _from_fp4(data) * np.repeat(_powers(scales), 32)
    if name.startswith("fp4_v41"):
        return _from_fp4(data) * np.repeat(_from_fp8(scales), 16)
    if name == "int8_indexer":
        return _fp32(np.frombuffer(data, np.int8) * np.float64(np.frombuffer(scales, np.float32)[0]))
    raise UnsupportedError("format", "a format with a golden decoder", name)


def page_bytes(name: str, head_dim: int, page_rows: int) -> int:
    """Bytes of a page, its tail included."""
    layout = _geometry(name, head_dim)
    payload = page_rows * (layout.data - layout.second + layout.scales)
    return -(-payload // layout.align) * layout.align


def second_bytes(name: str, head_dim: int) -> int:
    """How many of the last bytes of a row's data lie in a buffer beside the pages."""
    return _geometry(name, head_dim).second


def place(name: str, head_dim: int, page_rows: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each byte of the two parts of row ``row`` lies in a page of ``page_rows`` rows; not those beside it."""
    layout = _geometry(name, head_dim)
    n, m = layout.data - layout.second, layout.scales
    data, scales = np.arange(n), np.arange(m)
    if layout.inline:
        return (n + m) * row + data, (n + m) * row + n + scales
    if layout.tiles:
        page = np.arange(n * page_rows).reshape(page_rows // 16, n // 16, 16, 16).transpose(0, 2, 1, 3)
        return page.reshape(page_rows, n)[row], n * page_rows + m * row + scales
    return n * row + data, n * page_rows + m * row + scales


def _geometry(name: str, head_dim: int) -> _Layout:
    name = name if name.startswith("bf16") else name.split("_via_")[0]
    size = {"fp32": 4, "fp8_tensor": 1, "fp8_tensor_fnuz": 1}.get(name, 2 if name.startswith("bf16") else 0)
    if size:
        return _Layout(size * head_dim, 0, 1)
    return _LAYOUTS[max((known for known in _LAYOUTS if name.startswith(known)), key=len)]


def _amax(x: np.ndarray) -> float:
    finite = x[np.isfinite(x)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def _power_above(amax: float, largest: float) -> int:
    """Least k with amax <= largest * 2^k."""
    k = -160
    while amax > largest * 2.0**k:
        k += 1
    return k


def _fp8_blocks(
    x: np.ndarray, block: int, floor_on_scale: bool, clean: bool = False, fnuz: bool = False
) -> tuple[bytes, list[int]]:
    floor, largest = float(np.float32(1e-4)), 240.0 if fnuz else 448.0
    codes, exponents = b"", []
    for part in x.reshape(-1, block):
        amax = _amax(part)
        k = max(_power_above(amax, largest), _power_above(floor, 1.0)) if floor_on_scale else None
        k = _power_above(max(amax, floor), largest) if k is None else k
        part = _saturated(part) if clean else part
        codes += (_nearest_fnuz if fnuz else _nearest_fp8)(part / 2.0**k)
        exponents.append(k)
    return codes, exponents


def _mxfp4(x: np.ndarray, ties_down: bool) -> tuple[bytes, bytes]:
    codes, scales = [], []
    for part in x.reshape(-1, 32):
        if np.isfinite(part).all():
            k = _power_above(max(_amax(part), 6 * 2.0**-126), 6.0)
            codes.append(_nearest_fp4(part / 2.0**k, ties_down))
            scales.append(k + 127)
        else:
            codes.append(np.zeros(32, np.uint8))
            scales.append(255)
    return _nibbles(np.concatenate(codes)), bytes(scales)


_BY, _TIMES, _INVERSE = range(3)
"""Scales amax / 6 and x / s; amax * (1 / 6) and x / s; amax / 6 without a floor and x * (1 / s)."""


def _saturated(x: np.ndarray) -> np.ndarray:
    """Infinities as numbers beyond any code."""
    return np.where(np.isinf(x), np.copysign(1e300, x), x)


def _fp4_v41(x: np.ndarray, way: int, clean: bool = False) -> tuple[bytes, bytes]:
    codes, scales = [], b""
    for part in x.reshape(-1, 16):
        if np.isfinite(part).all() or clean:
            amax = np.array([_amax(part) if way == _INVERSE else max(_amax(part), 6 * 2.0**-9)])
            scale = _nearest_fp8(_fp32(amax * np.float64(np.float32(1) / np.float32(6)) if way == _TIMES else amax / 6))
            value = float(_from_fp8(scale)[0])
            if way == _INVERSE:
                inverse = np.float64(np.float32(1) / np.float32(value)) if value else 0.0
                scaled = _fp32(part * inverse)
            else:
                scaled = np.minimum(np.abs(_saturated(part) / value), 1e30) * np.copysign(1.0, part)
                scaled = _fp32(scaled)
            codes.append(_nearest_fp4(scaled, False))
            scales += scale
        else:
            codes.append(np.zeros(16, np.uint8))
            scales += bytes([_NAN_FP8])
    return _nibbles(np.concatenate(codes)), scales


def _nearest(x: np.ndarray, table: np.ndarray, ties_down: bool) -> np.ndarray:
    """Index of the entry nearest to |x|, the last one beyond the end; a tie goes to the even index, or down."""
    a = np.minimum(np.abs(x), table[-1])
    high = np.searchsorted(table, a).clip(1, len(table) - 1)  # table[high - 1] < a <= table[high]
    below, above = a - table[high - 1], table[high] - a
    down = (below < above) | ((below == above) & (ties_down | ((high - 1) % 2 == 0)))
    return np.where(a == 0, 0, np.where(down, high - 1, high))


def _nearest_fp8(x: np.ndarray) -> bytes:
    finite = np.isfinite(x)
    codes = np.where(finite, _nearest(np.where(finite, x, 0.0), _FP8, False), _NAN_FP8)
    return (codes + 128 * (finite & np.signbit(x))).astype(np.uint8).tobytes()


def _nearest_fnuz(x: np.ndarray) -> bytes:
    """Zero has no sign, and 0x80 is what is not a number."""
    finite = np.isfinite(x)
    index = _nearest(np.where(finite, x, 0.0), _FNUZ, False)
    return np.where(finite, index + 128 * ((index > 0) & np.signbit(x)), 0x80).astype(np.uint8).tobytes()


def _nearest_fp4(x: np.ndarray, ties_down: bool) -> np.ndarray:
    return (_nearest(x, _HALVES, ties_down) + 8 * np.signbit(x)).astype(np.uint8)


def _nibbles(codes: np.ndarray) -> bytes:
    return (codes[0::2] + 16 * codes[1::2]).astype(np.uint8).tobytes()


def _from_fp8(data: bytes) -> np.ndarray:
    codes = np.frombuffer(data, np.uint8)
    table = np.append(_FP8, np.nan)
    return table[codes % 128] * np.where(codes < 128, 1.0, -1.0)


def _from_fnuz(data: bytes) -> np.ndarray:
    codes = np.frombuffer(data, np.uint8)
    return np.where(codes == 0x80, np.nan, _FNUZ[codes % 128] * np.where(codes < 128, 1.0, -1.0))


def _from_fp4(data: bytes) -> np.ndarray:
    packed = np.frombuffer(data, np.uint8)
    codes = np.stack([packed % 16, packed // 16], axis=-1).reshape(-1)
    return _HALVES[codes % 8] * np.where(codes < 8, 1.0, -1.0)


def _powers(data: bytes) -> np.ndarray:
    exponents = np.frombuffer(data, np.uint8).astype(np.float64)
    return np.where(exponents == 255, np.nan, 2.0 ** (exponents - 127))


def _fp32(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(np.float64)


def _bf16(x: np.ndarray) -> bytes:
    """fp64 values that bf16 can hold -> bytes; every NaN is 0x7fc0, and what overflows fp32 is infinity."""
    bits = _fp32(x).astype(np.float32).view(np.uint32) >> 16
    return np.where(np.isnan(x), 0x7FC0, bits).astype(np.uint16).tobytes()


def _from_bf16(data: bytes) -> np.ndarray:
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
