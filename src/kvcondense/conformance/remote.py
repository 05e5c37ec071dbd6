"""An adapter that is another process, in any language: ``exec_factory("./driver")``. The protocol: docs/protocol.md."""

from __future__ import annotations

import math
import shlex
import weakref
from collections.abc import Mapping

import torch

from kvcondense.conformance import wire
from kvcondense.conformance.adapter import Capabilities, Engine, Factory, Setup
from kvcondense.conformance.process import Process, RemoteError, start
from kvcondense.conformance.stored import parts
from kvcondense.errors import CheckpointError, KvCondenseError, RangeError
from kvcondense.files.reading import clipped, parsed
from kvcondense.files.schema import known, typed
from kvcondense.layout.batch import RaggedBatch

_WHAT = "capabilities"
_PATIENCE, _LEAST, _RATE = 10, 1.0, 1 << 24
"""After a hang: so many times the longest answer that came, at least so many seconds, and one for so many bytes."""
_Types = tuple[torch.dtype, ...]
_Wanted = tuple[tuple[int | None, ...], _Types]
_PLAIN: _Types = (torch.bfloat16, torch.float32)
_BYTES: _Types = (torch.uint8,)


class Drivers:
    """Processes of one command. Who is healthy is used again: adapters are many, alive at once are a few."""

    def __init__(self, command: str, timeout: float) -> None:
        self.command, self.timeout = command, timeout
        self._slowest, self._hung = 0.0, False
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise KvCondenseError("--exec", "a command", f"{clipped(command)} ({error})") from error
        if not self._words:
            raise KvCondenseError("--exec", "a command", "nothing")
        self._idle: list[Process] = []

    def take(self) -> Process:
        """An idle process, or a new one."""
        try:
            return self._idle.pop()
        except IndexError:
            return start(self._words, self.command)

    def give_back(self, process: Process) -> None:
        """Of an adapter that is gone."""
        if process.failure is None:
            self._idle.append(process)

    def ask(
        self, process: Process, request: str, message: bytes, shapes: Mapping[str, _Wanted] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of the answer: these and no others. Raises a RemoteError.

        One hang is enough to wait for: what made it is played often then, to make it smaller.
        """
        seconds = self.timeout
        if self._hung:
            seconds = min(seconds, max(_LEAST, _PATIENCE * self._slowest) + len(message) / _RATE)
        try:
            answer = process.ask(request, message, seconds)
        except RemoteError as error:
            self._hung |= error.kind == "hang"
            raise
        self._slowest = max(self._slowest, process.slowest)
        try:
            answer.only(*(shapes or ()))
            return {name: answer.tensor(name, *wanted) for name, wanted in (shapes or {}).items()}
        except KvCondenseError as error:
            raise process.reject(request, error) from error


class RemoteAdapter(Engine):
    """Speaks the protocol with a process that it has for itself, from ``init`` on until it is gone."""

    def __init__(self, drivers: Drivers, name: str, capabilities: Capabilities) -> None:
        self._drivers, self.name, self.capabilities = drivers, name, capabilities
        self._process: Process | None = None

    def init(self, setup: Setup) -> None:
        """Start over, in a process of its own."""
        self.setup = setup
        if self._process is None or self._process.failure is not None:
            self._process = self._drivers.take()
            weakref.finalize(self, self._drivers.give_back, self._process).atexit = False
        self._ask("init", wire.of_setup(setup))

    def step(self, kv_score: torch.Tensor, batch: RaggedBatch) -> None:
        """Hand the step over."""
        self._ask("step", wire.of_step(kv_score, batch))

    def rows(self, slots: torch.Tensor) -> torch.Tensor:
        """What the process has there."""
        form, d = self.setup.format, self.setup.spec.head_dim
        row, types = d, _PLAIN
        if form.plain is None:
            row, types = sum(n * dtype.itemsize for _, dtype, n in parts(form, d)), _BYTES
        wanted = {"rows": ((slots.shape[0], row), types)}
        return self._ask("rows", wire.pack("rows", {"slots": slots}), wanted)["rows"]

    def state(self, batch: RaggedBatch) -> torch.Tensor:
        """Live rows."""
        spec = self.setup.spec
        rows = spec.seed_rows(int(batch.start_positions[0]))
        wanted = {"state": ((rows, spec.state_dim), wire.FLOATS)}
        return self._ask("state", wire.of_place("state", batch), wanted)["state"]

    def put_state(self, batch: RaggedBatch, rows: torch.Tensor) -> None:
        """The other way around."""
        self._ask("load", wire.of_place("load", batch, state=rows))

    def reset(self, slots: list[int]) -> None:
        """Say which slots get new owners."""
        self._ask("reset", wire.pack("reset", {"slots": torch.tensor(slots, dtype=torch.int64)}))

    def _ask(
        self, request: str, message: bytes, shapes: Mapping[str, _Wanted] | None = None
    ) -> dict[str, torch.Tensor]:
        if self._process is None:
            raise KvCondenseError(request, "init first", "nothing")
        return self._drivers.ask(self._process, request, message, shapes)


def exec_factory(command: str, timeout: float = 60.0) -> Factory:
    """Adapters that are processes of ``command``: words as a shell splits them, but no shell.

    timeout: seconds that an answer may take; after a hang, less. Raises KvCondenseError for a program that does not
    start or does not say hello as it should.
    """
    if not (isinstance(timeout, int | float) and math.isfinite(timeout) and timeout > 0):
        raise RangeError("timeout", "a positive number of seconds", repr(timeout))
    drivers = Drivers(command, float(timeout))
    process = drivers.take()
    try:
        answer = process.ask("hello", wire.pack("hello"), drivers.timeout)
        try:
            answer.only()
            name, able = clipped(answer.text("name")), _capabilities(answer.text("capabilities"))
        except KvCondenseError:
            process.kill()
            raise
    except RemoteError as error:
        expected = f"{clipped(command)} to say hello ({error.expected})"
        raise KvCondenseError("--exec", expected, f"{error.kind}: {error.got}", error.hint) from error
    except KvCondenseError as error:
        raise KvCondenseError("--exec", f"{error.argument} to be {error.expected}", error.got, error.hint) from error
    drivers.give_back(process)
    return lambda: RemoteAdapter(drivers, name, able)


def _capabilities(text: str) -> Capabilities:
    """What a driver declares: a JSON object of fields of ``Capabilities``. What it leaves out has its default."""
    found = parsed(text, _WHAT)
    known(found, Capabilities, _WHAT)
    able = typed(found, Capabilities, _WHAT)
    if able.formats:
        raise CheckpointError(f"{_WHAT} formats", "false (kvcondense's own caches are not asked for)", "true")
    return able
