"""Timings that decide something, what was expected of them before any GPU was asked, and how both stand side by side.

Expected microseconds were counted, not measured: bytes and instructions of the compiled kernels over an H100's and an
H200's rates, with launches and barriers at what others report. They are here to be proven wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BARE = "triton, bare"
_FUSED, _UNFUSED = "fused", "GEMM + step"

# Case -> implementation -> (on an H100, on an H200).
EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "decode 64 on a boundary, ratio 128": {_BARE: ("19", "15")},
    "decode 128 on a boundary, ratio 128": {_BARE: ("32", "25")},
    "decode 256 on a boundary, ratio 128": {_BARE: ("60", "46")},
    "prefill 1 x 8192, ratio 128": {_BARE: ("17", "14")},
    "prefill 1 x 65536, ratio 128": {_BARE: ("110", "80")},
    "prefill 8 x 65536, ratio 128": {_BARE: ("800", "570")},
    "decode 1 on a boundary, ratio 4": {_BARE: ("6-7", "6-7")},
    "decode 512 on a boundary, ratio 4": {_BARE: ("14", "13")},
    "decode 4096 on a boundary, ratio 4": {_BARE: ("85", "75")},
    "prefill 1 x 8192, ratio 4": {_BARE: ("33", "31")},
    "prefill 1 x 65536, ratio 4": {_BARE: ("240", "235")},
    "HCA, prefill 8192": {_FUSED: ("180-220", "180-220"), _UNFUSED: ("125", "125")},
    "CSA, prefill 8192": {_FUSED: ("550-650", "550-650"), _UNFUSED: ("240", "240")},
    "HCA, decode 1 within a window": {_FUSED: ("12", "12")},
    "HCA, decode 1 on a boundary": {_FUSED: ("20", "20")},
    "HCA, decode 64 on a boundary": {_FUSED: ("80-90", "80-90"), _UNFUSED: ("28", "28")},
    "CSA + indexer, decode 1 within a window": {_FUSED: ("16-23", "16-23")},
}
CASES = [name for name, of in EXPECTED.items() if _BARE in of]
FEW_CASES = ["decode 64 on a boundary, ratio 128", "decode 1 on a boundary, ratio 4", "prefill 1 x 8192, ratio 4"]
LAYERS = [name for name, of in EXPECTED.items() if _FUSED in of]
FEW_LAYERS = ["CSA + indexer, decode 1 within a window"]
"""A stand-in's, which are tiny and slow; the others would show nothing more."""


def options(names: Sequence[str]) -> list[str]:
    """Of ``kvcondense bench``, for exactly these cases: no name is part of another."""
    return [word for name in names for word in ("--case", name)]


def table(records: Sequence[dict[str, Any]], device: str) -> list[str]:
    """Lines for cases that were timed: floor and medians, warm and cold, beside what was expected on this device."""
    which = 1 if "H200" in device else 0 if "H100" in device else None
    lines = [f"{'microseconds':<44}{'way':<22}{'floor':>9}{'expected':>10} {'warm':>9} {'cold':>9}"]
    timed = {(r["case"], r["runner"].partition(",")[0] if "fused" in r["runner"] else r["runner"], r["cache"]): r
             for r in records if "us" in r and "cache" in r}  # fmt: skip
    for case, of in EXPECTED.items():
        for way in (*of, *(["GEMM alone"] if _FUSED in of else [])):
            warm, cold = (timed.get((case, way, cache)) for cache in ("warm", "cold"))
            if warm and cold:
                expected = of[way][which] if which is not None and way in of else "-"
                numbers = f"{cold['floor_us']:>9.1f}{expected:>10} {warm['us']:>9.1f} {cold['us']:>9.1f}"
                lines.append(f"{case:<44}{way:<22}{numbers}")
    return lines


def worst(records: Sequence[dict[str, Any]]) -> str:
    """Cases, failures, and the largest distance from a floor of what is this library's."""
    ours = [r for r in records if r.get("cache") == "cold" and r["runner"].startswith((_BARE, _FUSED))]
    cases = {r["complete"] for r in records if "complete" in r}
    bad = sum("failed" in r or "wrong" in r for r in records)
    far = max((r["us"] / r["floor_us"], r["case"]) for r in ours)
    return f"{len(cases)} cases, {bad} failed or wrong; at most {far[0]:.1f} x floor, cold ({far[1]})"
