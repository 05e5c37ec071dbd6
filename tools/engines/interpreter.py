"""Triton's interpreter with the casts of a GPU: fp32 to bf16 and e4m3 to nearest even, and FP4 without PTX.

The interpreter cuts bits off where hardware rounds, so no foreign kernel can be judged by it as it is.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton
from triton import language as tl
from triton.runtime import interpreter

_NARROW = {tl.bfloat16: (ml_dtypes.bfloat16, np.uint16), tl.float8e4nv: (ml_dtypes.float8_e4m3fn, np.uint8)}


def correct() -> None:
    """Exchange the interpreter's conversion of floats, once."""
    before = interpreter._convert_float
    if getattr(before, "nearest_even", False):
        return

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target in _NARROW:
            narrow, bits = _NARROW[target]
            return np.asarray(values, dtype=np.float32).astype(narrow).view(bits)
        if source in _NARROW and target == tl.float32:
            narrow, bits = _NARROW[source]
            return np.ascontiguousarray(values).view(bits).view(narrow).astype(np.float32).view(np.uint32)
        return before(values, source, target, mode)

    convert.nearest_even = True  # pyright: ignore[reportFunctionMemberAccess]
    interpreter._convert_float = convert


@triton.jit
def e2m1(x):  # noqa: ANN001, ANN201, D103
    # What cvt.rn.satfinite.e2m1x2.f32 does to one value: nearest even, saturating.
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
    return code | (sign << 3)


@triton.jit
def e2m1_pair(x_lo, x_hi):  # noqa: ANN001, ANN201
    """In the place of vLLM's ``_fp32x2_to_fp4x2``, which is inline PTX."""
    return (e2m1(x_lo) | (e2m1(x_hi) << 4)).to(tl.uint8)
