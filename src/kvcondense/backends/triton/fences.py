"""A fence that some releases of Triton leave out, put into the machine code of the kernels that multiply.

On sm_90 and later the matrix units read shared memory by another way than the copies that fill it (PTX: the async and
the generic proxy), and ``fence.proxy.async`` stands between them. Triton 3.6 and 3.7 omit it after asynchronous copies.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Iterator
from typing import Any

_FIXED = (3, 8)
_FENCE = "fence.proxy.async.shared::cta;"
_READERS = re.compile(r"wgmma\.mma_async|tcgen05\.mma")
_WAIT = re.compile(r"cp\.async\.wait_(?:group\s+\d+|all);")

_lock = threading.Lock()
_before: list[Any] = []
"""What the knob was for those within: for all but the first, ours."""


@functools.cache
def older_than(major: int, minor: int) -> bool:
    """True if the installed Triton is."""
    import triton  # not its metadata: builds for other devices have other names

    return tuple(map(int, triton.__version__.split(".")[:2])) < (major, minor)


def omitted() -> bool:
    """True if the installed Triton leaves the fence out."""
    return older_than(*_FIXED)


@contextlib.contextmanager
def proxy_fence() -> Iterator[None]:
    """What Triton compiles within has the fence."""
    if not omitted():
        yield
        return
    from triton import knobs

    runtime: Any = knobs.runtime
    with _lock:  # the knob is every thread's: the first one in turns it, the last one out turns it back
        _before.append(runtime.add_stages_inspection_hook)
        runtime.add_stages_inspection_hook = _hook
    try:
        yield
    finally:
        with _lock:
            before = _before.pop()
            if not _before:
                runtime.add_stages_inspection_hook = before


def fenced(ptx: str) -> str:
    """PTX whose threads, once their copies are done, fence them for the matrix units, if there are any that read."""
    if not _READERS.search(ptx):
        return ptx
    return _WAIT.sub(lambda wait: f"{wait[0]}\n\t{_FENCE}", ptx)


def _hook(
    compiler: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> tuple[str, str] | None:
    """Triton's hook: without arguments it says what to add to the names of kernels, with them it changes the stages."""
    del compiler, options, language, capability
    if stages is None:
        return _FENCE, _FENCE
    if "ptx" in stages:
        make = stages["ptx"]
        stages["ptx"] = lambda *given: fenced(make(*given))
    return None
