"""Threads for compiled kernels: torch's own OpenMP pool where it has one, so that nothing is ever oversubscribed.

A kernel is entered by every thread with the same block of integers; the threads share its work through counters, so it
does not matter how many of them come. Where torch has no OpenMP runtime that can be called, Python threads stand in.
Whoever calls may be one of several threads, or come out of a fork (``forks``).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from kvcondense import forks

Entry = Callable[[int], None]
SERIAL = 1 << 16
"""Elements below which work stays in the calling thread: waking others takes longer."""


@functools.cache
def entry(address: int) -> Entry:
    """A compiled function void(int64) as something that Python can call; the GIL is released meanwhile."""
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)


def launch(address: int, block: int, threads: int) -> None:
    """Enter the kernel at ``address`` with ``block`` from up to ``threads`` threads; returns when all are back."""
    if threads == 1:
        entry(address)(block)
        return
    parallel = _openmp()
    if parallel is None:
        run = entry(address)
        _beside([_pool(threads - 1).submit(run, block) for _ in range(threads - 1)], lambda: run(block))
    elif forks.came_through():  # a thread without a past finds threads of its own
        _beside([_pool(1).submit(parallel, address, block, threads, 0)])
    else:
        parallel(address, block, threads, 0)


def _beside(others: list[Future[None]], run: Callable[[], object] | None = None) -> None:
    """``run`` beside ``others``, all of which have ended when this returns or raises: they use the caller's memory."""
    interrupt: BaseException | None = None
    try:
        if run is not None:
            run()
    except BaseException as error:  # Ctrl-C, which comes as soon as the kernel has returned
        interrupt = error
    while not all(other.done() for other in others):
        try:
            wait(others)
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, data, threads, flags) of the runtime that torch is linked with, if it has one.

    GNU's and LLVM's OpenMP both export it. Threads that torch has started are used again.
    """
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if not path.is_file():
            continue
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kvcondense")


forks.in_child(_pool.cache_clear)  # its threads are the parent's
