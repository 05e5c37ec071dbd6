"""Large pages for memory that a step reads all over: rows lie pages apart, and a processor remembers few of them."""

from __future__ import annotations

import ctypes
import mmap

import torch

LARGE = 1 << 21
"""Bytes of a large page."""


def advise(t: torch.Tensor) -> torch.Tensor:
    """Ask for large pages for what a new tensor has on the CPU; nothing is touched, and ``t`` is returned.

    Pages come when they are first written, near the core that does it. Where there are none, or not on Linux, nothing
    happens. One request's state takes 127 rows of ratio 128 together, each in another small page.
    """
    if type(t) is torch.Tensor and t.device.type == "cpu":
        ask(t.data_ptr(), t.nbytes)
    return t


def ask(address: int, size: int) -> None:
    """Ask for large pages for those that lie in ``size`` bytes as a whole."""
    first = -(-address // LARGE) * LARGE
    inside = (address + size) // LARGE * LARGE - first
    if inside > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(inside), mmap.MADV_HUGEPAGE)
