"""A process that answers messages on its pipes, each within a time; whatever else it does is told as what it is."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
import weakref
from collections import deque

from kvcondense.conformance import wire
from kvcondense.conformance.watch import Watcher, watcher
from kvcondense.errors import CheckpointError, KvCondenseError, UnsupportedError
from kvcondense.files.reading import clipped

_PIECE = 1 << 16
_GRACE = 2.0
"""Seconds that a process has to end by itself, once its stdin has ended."""
_PIECES = 64
_LINES, _LINE_BYTES = 5, 400
"""Of what it wrote to stderr, as much as an error shows."""


class RemoteError(KvCondenseError):
    """An adapter in another process went wrong. ``place``: what it did, in which request; the cause of an error."""

    kind = ""

    def __init__(self, request: str, expected: str, got: object, hint: str = "") -> None:
        self.place = f"{self.kind} in {request}"
        super().__init__(request, expected, got, hint)


class HangError(RemoteError):
    """No whole answer came in time."""

    kind = "hang"


class CrashError(RemoteError):
    """The process ended."""

    kind = "crash"


class GarbageError(RemoteError):
    """What came is no answer to what was asked."""

    kind = "garbage"


class RefusedError(RemoteError):
    """The adapter says that it does not do this; it goes on. Every reason is a cause of its own."""

    kind = "refusal"

    def __init__(self, request: str, expected: str, got: object, hint: str = "") -> None:
        super().__init__(request, expected, got, hint)
        self.place = f"{self.place}: {self.got}"


class Process:
    """A running driver. Once it has gone wrong it is killed, and ``ask`` raises the same error again."""

    def __init__(self, words: list[str]) -> None:
        pipe, self._watcher = subprocess.PIPE, watcher()  # it is there before the driver, and after it
        # A session of its own: Ctrl-C ends the kit, which then ends the driver and whatever that has started.
        self._popen = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, start_new_session=True)
        self._watcher.add(self._popen.pid)
        self._in, self._out, self._err = self._popen.stdin, self._popen.stdout, self._popen.stderr
        for file in (self._in, self._out, self._err):
            assert file is not None
            os.set_blocking(file.fileno(), False)
        self._said: deque[bytes] = deque(maxlen=2 * _LINES)
        self.failure: RemoteError | None = None
        self.slowest = 0.0
        """Seconds of the longest answer so far."""
        self.end = weakref.finalize(self, _end, self._popen, self._watcher, os.getpid())

    def ask(self, request: str, message: bytes, seconds: float) -> wire.Message:
        """Send a message and return the answer, a "done"; raises a RemoteError for anything else."""
        if self.failure is not None:
            raise type(self.failure)(self.failure.argument, self.failure.expected, self.failure.got, self.failure.hint)
        try:
            begin = time.monotonic()
            answer = self._checked(request, self._exchanged(request, message, begin + seconds, seconds))
            self.slowest = max(self.slowest, time.monotonic() - begin)
        except RemoteError as error:
            self.failure = error
            self.kill()
            raise
        except BaseException:  # Ctrl-C: half an answer may be on its way
            self.failure = CrashError(request, "an answer", "an interruption")
            self.kill()
            raise
        if answer.kind == "error":
            raise RefusedError(request, "it to be done", clipped(answer.metadata["error"]))
        return answer

    def reject(self, request: str, error: KvCondenseError) -> GarbageError:
        """The error of an answer that is not one to ``request``: the process is not asked again."""
        self.failure = GarbageError(request, f"{error.argument} to be {error.expected}", error.got, error.hint)
        self.kill()
        return self.failure

    def kill(self) -> None:
        """At once; the next ``end`` has nothing left to do."""
        if self.end.detach():
            _kill(self._popen, self._watcher)

    def _checked(self, request: str, body: bytes) -> wire.Message:
        try:
            answer = wire.unpack(body, "the answer")
            if answer.kind not in ("done", "error"):
                raise CheckpointError("the answer's kind", "done or error", answer.kind)
            if answer.kind == "error":
                answer.text("error")
                answer.only()
        except KvCondenseError as error:
            raise self.reject(request, error) from error
        return answer

    def _exchanged(self, request: str, message: bytes, deadline: float, seconds: float) -> bytes:
        """Write the message and read the answer at once: either pipe may be full. Returns the answer's bytes."""
        assert self._in is not None
        assert self._out is not None
        assert self._err is not None
        rest, got, size = memoryview(message), bytearray(), -1
        if stray := self._read(self._out.fileno()):
            raise GarbageError(request, "nothing on stdout before it was asked", f"bytes {bytes(stray[:40])!r}")
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._in, selectors.EVENT_WRITE)
            waiting.register(self._out, selectors.EVENT_READ)
            waiting.register(self._err, selectors.EVENT_READ)
            while rest or size < 0 or len(got) < size:
                ready = waiting.select(max(0.0, deadline - time.monotonic()))
                if not ready or time.monotonic() > deadline:
                    came = self._so_far(rest, got, size) + self._last_words()
                    raise HangError(request, f"an answer within {seconds:.3g} s", came)
                for key, _ in ready:
                    if key.fileobj is self._in:
                        rest = self._written(rest)
                        if not rest:
                            waiting.unregister(self._in)
                    elif key.fileobj is self._err:
                        if self._heard() is None:
                            waiting.unregister(self._err)
                    else:
                        piece = self._read(key.fd, _PIECE if size < 0 else max(1, size - len(got)))
                        if piece is None:
                            raise CrashError(request, "an answer", self._ended(deadline))
                        got += piece
                        if size < 0 and len(got) >= wire.LENGTH_BYTES:
                            size = wire.LENGTH_BYTES + self._length(request, bytes(got[: wire.LENGTH_BYTES]))
                        if 0 <= size < len(got):
                            more = bytes(got[size : size + 40])
                            raise GarbageError(request, "nothing after the answer", f"bytes {more!r}")
        return bytes(got[wire.LENGTH_BYTES :])

    @staticmethod
    def _length(request: str, head: bytes) -> int:
        try:
            return wire.length(head, "the answer")
        except KvCondenseError as error:
            raise GarbageError(request, f"the answer with {error.expected}", error.got, error.hint) from error

    @staticmethod
    def _so_far(rest: memoryview, got: bytearray, size: int) -> str:
        if rest:
            return f"nothing, with {len(rest)} bytes of the request still unread"
        if size < 0:
            return f"{len(got)} bytes" if got else "nothing"
        return f"{len(got)} of {size} bytes"

    def _written(self, rest: memoryview) -> memoryview:
        """What is left to write; nothing to a process that does not read any more, whose end is told by stdout."""
        assert self._in is not None
        try:
            return rest[self._in.write(rest[: _PIECE * 16]) or 0 :]
        except BrokenPipeError:
            return rest[:0]

    @staticmethod
    def _read(fd: int, most: int = _PIECE) -> bytes | None:
        """What there is now; None at the end."""
        try:
            return os.read(fd, min(most, 1 << 20)) or None
        except BlockingIOError:
            return b""

    def _heard(self) -> bytes | None:
        """Keep the last of stderr."""
        assert self._err is not None
        piece = self._read(self._err.fileno())
        if piece:
            self._said.append(piece[-_LINES * _LINE_BYTES :])
        return piece

    def _ended(self, deadline: float) -> str:
        """How."""
        try:
            status = self._popen.wait(max(0.1, min(_GRACE, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            how = "the end of stdout, and a process that goes on"
        else:
            how = f"exit status {status}" if status >= 0 else _signal(-status)
        return how + self._last_words()

    def _last_words(self) -> str:
        """Of stderr."""
        for _ in range(_PIECES):  # what is left in the pipe; somebody may go on to write
            if not self._heard():
                break
        lines = b"".join(self._said).decode(errors="replace").split("\n")
        said = [line.strip()[:_LINE_BYTES] for line in lines if line.strip()][-_LINES:]
        return f"; stderr: {' / '.join(said)}" if said else ""


def start(words: list[str], command: str) -> Process:
    """A process; raises KvCondenseError if there is no such program."""
    if os.name != "posix":
        raise UnsupportedError("--exec", "a system with POSIX pipes and signals", os.name)
    try:
        return Process(words)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        raise KvCondenseError("--exec", "a program that starts", f"{command} ({error})") from error


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(number).name}"
    return f"signal {number}"


def _end(popen: subprocess.Popen[bytes], watching: Watcher, owner: int) -> None:
    """Let it end, since nobody needs it any more; in a process that was forked, it is the parent's."""
    if os.getpid() != owner:
        return
    with contextlib.suppress(OSError):
        assert popen.stdin is not None
        popen.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        popen.wait(_GRACE)
    _kill(popen, watching)


def _kill(popen: subprocess.Popen[bytes], watching: Watcher) -> None:
    """It and whatever it has started, which may outlive it by now; then wait for it, so that no zombie is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    watching.drop(popen.pid)  # before it is waited for: until then nobody else has its number
    popen.wait()
    for file in (popen.stdin, popen.stdout, popen.stderr):
        with contextlib.suppress(OSError):
            assert file is not None
            file.close()
