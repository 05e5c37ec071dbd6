"""Triton's interpreter with the casts of a GPU: fp32 to bf16 and e4m3 to nearest even, and FP4 without PTX.

The interpreter cuts bits off where hardware rounds, so no foreign kernel can be judged by it as it is. It also takes a
comparison of two numbers for a number, once it is spread over a block, and then refuses it as a mask.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
from triton import language as tl
from triton.runtime import interpreter

from kvcondense.formats.elements import E2M1

_NARROW = {tl.bfloat16: (ml_dtypes.bfloat16, np.uint16), tl.float8e4nv: (ml_dtypes.float8_e4m3fn, np.uint8)}


_BEFORE = interpreter._convert_float
_SPLAT_BEFORE = interpreter.InterpreterBuilder.create_splat


def correct(on: bool = True) -> None:
    """Exchange the interpreter's conversion of floats and its spreading of comparisons, or put its own back."""
    interpreter._convert_float = _convert if on else _BEFORE
    setattr(interpreter.InterpreterBuilder, "create_splat", _splat if on else _SPLAT_BEFORE)  # noqa: B010


def _splat(builder: Any, target: Any, value: Any) -> Any:
    if value.data.dtype == np.bool_ and not isinstance(value.dtype, tl.block_type):
        value = interpreter.TensorHandle(value.data, tl.int1)
    return _SPLAT_BEFORE(builder, target, value)


def _convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
    if source == tl.float32 and target in _NARROW:
        narrow, bits = _NARROW[target]
        return np.asarray(values, dtype=np.float32).astype(narrow).view(bits)
    if source in _NARROW and target == tl.float32:
        narrow, bits = _NARROW[source]
        return np.ascontiguousarray(values).view(bits).view(narrow).astype(np.float32).view(np.uint32)
    return _BEFORE(values, source, target, mode)


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


@triton.jit
def _cast(x_ptr, narrow_ptr, eight_ptr, four_ptr, n: tl.constexpr):  # noqa: ANN001, ANN202
    at = tl.arange(0, n)
    x = tl.load(x_ptr + at)
    tl.store(narrow_ptr + at, x.to(tl.bfloat16))
    tl.store(eight_ptr + at, tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True))
    tl.store(four_ptr + at, e2m1(x).to(tl.uint8))


def wrong_casts() -> dict[str, tuple[int, int]]:
    """By type: how many casts the interpreter gets wrong, of how many; random values, ties and small ones."""
    n = 1 << 14
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=gen) * torch.exp2(torch.randint(-12, 10, (n,), generator=gen))
    x[: n // 2] = (x[: n // 2].view(torch.int32) & -0x80000).view(torch.float32)  # 4 bits of mantissa: ties of e4m3
    x[: n // 4] = (x[: n // 4].view(torch.int32) | 0x8000).view(torch.float32)  # ties of bf16
    narrow = torch.zeros(n, dtype=torch.bfloat16)
    eight, four = torch.zeros(2, n, dtype=torch.uint8)
    _cast[(1,)](x, narrow, eight, four, n=n)  # pyright: ignore[reportArgumentType]
    fits = x.clamp(-448, 448)
    pairs = {
        "bf16": (narrow.view(torch.int16), x.bfloat16().view(torch.int16)),
        "e4m3": (eight, fits.to(torch.float8_e4m3fn).view(torch.uint8)),
        "e2m1": (four, E2M1.encode(x.clamp(-6, 6))),
    }
    return {name: (int((one != other).sum()), n) for name, (one, other) in pairs.items()}
