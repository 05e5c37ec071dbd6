"""What a forked child needs: it has the thread that forked, and neither the others nor the locks that they held.

GNU's OpenMP, which torch computes with, keeps threads for each thread that has used several. A child goes on believing
in those of the thread that forked, and waits for them for ever. So a child of a process that has worked with this
library computes with one thread, as the workers of torch's DataLoader do, unless it calls ``torch.set_num_threads``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

_here = threading.local()
_used = False


def note() -> None:
    """This process has what steps need: weights or a table. Operators of torch have made them, with its threads."""
    global _used
    _used = True


def came_through() -> bool:
    """Whether this very thread has come through a fork: what OpenMP remembers of its threads may be a parent's."""
    return getattr(_here, "forked", False)


def in_child(restore: Callable[[], object]) -> None:
    """Run ``restore`` in every child that this process forks, where there are forks; subprocesses are none."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=restore)


def _child() -> None:
    _here.forked = True
    if _used and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


in_child(_child)
