"""The numbers that histories are made of: ten lines of 32-bit integers, the same in any language.

Value i of stream s with seed k, all modulo 2^32::

    x = i * 0x9E3779B1 + k * 0x85EBCA77 + s * 0xC2B2AE3D + 0x165667B1
    x ^= x >> 15;  x *= 0x2C1B3C6D
    x ^= x >> 12;  x *= 0x297A2D39
    x ^= x >> 15
    value = (int(x >> 8) - 2^23) / 2^22                  -2 <= value < 2, exact in fp32

Stream 0 is the norm's weight, 1 the ape, 2 and up the tokens of requests, in the order in which they were admitted.
"""

from __future__ import annotations

import numpy as np
import torch

NORM, APE, TOKENS = 0, 1, 2
_MASK = 0xFFFFFFFF


def values(seed: int, stream: int, first: int, count: int) -> torch.Tensor:
    """Values first .. first + count - 1: [count] fp32."""
    key = (seed * 0x85EBCA77 + stream * 0xC2B2AE3D + 0x165667B1) & _MASK
    x = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(key)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x2C1B3C6D)
    x ^= x >> np.uint32(12)
    x *= np.uint32(0x297A2D39)
    x ^= x >> np.uint32(15)
    signed = (x >> np.uint32(8)).astype(np.int32) - (1 << 23)
    return torch.from_numpy(signed.astype(np.float32) / np.float32(1 << 22))
