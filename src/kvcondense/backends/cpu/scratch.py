"""Memory that kernels work in: a caller's thread keeps its own from launch to launch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
from typing import Any

import numpy as np

_HUGE = 1 << 21
"""Bytes of a large page."""
_WORTH = 1 << 18
"""Bytes of memory that is worth one."""


class _Scratch(threading.local):
    """Memory that a thread of the caller's uses again: nothing runs beside a call of its own."""

    def __init__(self) -> None:
        self.memory: mmap.mmap | np.ndarray[Any, Any] = np.empty(0, np.uint8)
        self.address, self.size = 0, 0

    def of(self, size: int) -> int:
        """Where this many bytes are. No tensor: what a mode of torch makes of one would stay."""
        if self.size < size:
            self.memory, self.address = _pages(size) if size >= _WORTH else _few(size)
            self.size = size
        return self.address


def _few(size: int) -> tuple[np.ndarray[Any, Any], int]:
    memory = np.empty(size, np.uint8)
    return memory, memory.ctypes.data


def _pages(size: int) -> tuple[mmap.mmap, int]:
    """Memory in pages of 2 MiB where the system has them: panels in small ones fall on the same sets of a cache."""
    memory = mmap.mmap(-1, -(-size // _HUGE) * _HUGE + _HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return memory, -(-start // _HUGE) * _HUGE


_mine = _Scratch()


def of(size: int) -> int:
    """Where ``size`` bytes are that the next launch of this thread may use."""
    return _mine.of(size)
