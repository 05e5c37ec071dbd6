"""Memory that kernels work in: a caller's thread keeps its own from launch to launch."""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import Any

import numpy as np

from kvcondense.backends.cpu.blocks import LINE
from kvcondense.layout import pages

_WORTH = 1 << 18
"""Bytes of memory that is worth a large page: panels in small ones fall on the same sets of a cache."""
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows
)
"""Else a fork would work in its parent's memory."""


class _Scratch(threading.local):
    """Memory that a thread of the caller's uses again: nothing runs beside a call of its own."""

    def __init__(self) -> None:
        self.memory: mmap.mmap | np.ndarray[Any, Any] = np.empty(0, np.uint8)
        self.address, self.size = 0, 0


_mine = _Scratch()


def of(size: int) -> int:
    """Where ``size`` bytes are, from a line on, that the next launch of this thread may use.

    No tensor: what a mode of torch makes of one would stay.
    """
    if _mine.size < size:
        if size < _WORTH:
            _mine.memory = np.empty(size + LINE, np.uint8)
            start, step = _mine.memory.ctypes.data, LINE
        else:
            _mine.memory = mmap.mmap(-1, size + 2 * pages.LARGE, **_PRIVATE)
            start, step = ctypes.addressof(ctypes.c_char.from_buffer(_mine.memory)), pages.LARGE
            pages.ask(start, len(_mine.memory))
        _mine.address, _mine.size = -(-start // step) * step, size
    return _mine.address
