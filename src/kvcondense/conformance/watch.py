"""Who kills drivers if the kit is killed itself: a process beside it, which is this file, run as a program.

A driver reads the end of its stdin when the kit is gone, and ends; one that hangs does not read. After SIGKILL the kit
cannot do anything about it, but the watcher sees its own stdin end, and kills the groups that it was told of. Linux
could send a signal to the driver itself (PR_SET_PDEATHSIG): not to what a driver has started, and already when the
thread ends that started the driver.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import weakref

_GRACE = 2.0
"""Seconds that the watcher has to end, once its stdin has ended."""


class Watcher:
    """A running one, or none where no process can be started: then drivers go unwatched, as all else works."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):
            words = [sys.executable, "-I", "-S", __file__]
            pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
            # A session of its own, so that what ends the kit's group does not end the watcher.
            self._popen = subprocess.Popen(
                words, stdin=pipe, stdout=nothing, stderr=nothing, bufsize=0, start_new_session=True
            )
            weakref.finalize(self, _end, self._popen, os.getpid())

    def add(self, group: int) -> None:
        """Kill this process group if the kit is gone."""
        self._tell(f"+{group}\n")

    def drop(self, group: int) -> None:
        """It has ended; another may have its number soon."""
        self._tell(f"-{group}\n")

    def leave(self) -> None:
        """Of a process that was forked: the kit's end must be seen although this one goes on."""
        if self._popen is not None and self._popen.stdin is not None:
            self._popen.stdin.close()

    def _tell(self, line: str) -> None:
        if self._popen is not None and self._popen.stdin is not None:
            # It was killed, or belongs to the process that forked this one.
            with contextlib.suppress(OSError, ValueError):
                self._popen.stdin.write(line.encode())


_running: list[Watcher] = []
"""At most one for each process: a fork leaves its parent's."""


def watcher() -> Watcher:
    """The one of this process, started when it is first asked for."""
    if not _running:
        _running.append(Watcher())
    return _running[0]


def _forked() -> None:
    while _running:
        _running.pop().leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _end(popen: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        assert popen.stdin is not None
        popen.stdin.close()
    try:
        popen.wait(_GRACE)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()


def main() -> None:
    """The program: lines ``+GROUP`` and ``-GROUP`` until the kit is gone."""
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        group = int(line[1:])
        if line.startswith(b"+"):
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
