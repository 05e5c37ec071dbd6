"""Programs, compiled once for each form, and their calls: on a simulator in processes of their own, on a chip in this.

A simulator leaks thread keys with every call and hangs after some two hundred, so its process is replaced in time.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import multiprocessing
import os
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvcondense import files, forks
from kvcondense.backends import private
from kvcondense.backends.pypto import kernel
from kvcondense.backends.pypto.kernel import Form
from kvcondense.backends.pypto.probe import PLATFORMS, platform, simulated
from kvcondense.errors import KvCondenseError

MOST_CALLS = 150
"""Of one simulator process."""
_SECONDS = 600.0
"""A call, the compiling of its first one included, takes no longer than that."""
_STATE, _CACHE, _OUT = 9, 10, 11
"""Operands that a program writes."""


class _Simulator:
    """A process that runs programs; a new one after ``MOST_CALLS``."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin without a process: in a forked child it is the parent's, and so is what its pipe brings."""
        self.lock = threading.Lock()
        self.process: Any = None
        self.pipe: Any = None
        self.calls = 0

    def run(self, form: Form, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the program leaves in state, cache and out. Threads take turns."""
        with self.lock:
            try:
                answer = self._answer(form, operands)
            except BaseException:  # an interrupt, say, before the answer came: the next call would take it for its own
                self.close()
                raise
        if isinstance(answer, str):
            raise KvCondenseError("pypto", "a step on the simulator", answer)
        return [_unpacked(t) for t in answer]

    def _answer(self, form: Form, operands: list[torch.Tensor]) -> Any:
        if self.process is None or self.calls >= MOST_CALLS or not self.process.is_alive():
            self.close()
            self._start()
        self.calls += 1
        self.pipe.send((asdict(form), platform(), [_packed(t) for t in operands]))
        if not self.pipe.poll(_SECONDS):
            raise KvCondenseError("pypto", f"an answer of the simulator within {_SECONDS:.0f} s", "none")
        try:
            return self.pipe.recv()
        except EOFError:
            raise KvCondenseError("pypto", "a step on the simulator", "its process died") from None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.calls = 0

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = self.pipe = None


_simulator = _Simulator()
atexit.register(_simulator.close)
forks.in_child(_simulator.forget)


def run(form: Form, operands: list[torch.Tensor]) -> None:
    """One call of the program of ``form``; ``operands`` as ``kernel.program`` names them, written in place."""
    if not simulated():
        _execute(form, platform(), operands)
        return
    for at, value in zip((_STATE, _CACHE, _OUT), _simulator.run(form, operands), strict=True):
        operands[at].copy_(value)


def _serve(pipe: Any) -> None:
    """The simulator's process: a form, a platform and operands come in, what was written goes out, or an error."""
    torch.set_num_threads(1)
    while True:
        try:
            form, name, packed = pipe.recv()
        except EOFError:
            return
        operands = [_unpacked(t) for t in packed]
        try:
            _execute(Form(**form), name, operands)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")
            continue
        pipe.send([_packed(operands[at]) for at in (_STATE, _CACHE, _OUT)])


_compiled: dict[tuple[Form, str], str] = {}


def _execute(form: Form, name: str, operands: list[torch.Tensor]) -> None:
    from pypto.runtime import execute_compiled  # pyright: ignore[reportMissingImports]

    folder = _compiled.get((form, name))
    if folder is None:
        folder = _compiled[form, name] = _compile(form, name)
    execute_compiled(folder, operands, platform=name, device_id=0, block_dim=1 if name.endswith("sim") else None)


def _compile(form: Form, name: str) -> str:
    """The folder of the compiled program, which later processes find again."""
    from pypto import ir  # pyright: ignore[reportMissingImports]
    from pypto.backend import BackendType  # pyright: ignore[reportMissingImports]

    source = Path(kernel.__file__).read_text()
    key = hashlib.sha256(repr((form, name, source)).encode()).hexdigest()[:16]
    base = _base()
    done = base / f"{key}.done"
    if not done.is_file():
        target, backend = str(base / f"{key}-{os.getpid()}"), getattr(BackendType, PLATFORMS[name])
        compiled = ir.compile(kernel.program(form), output_dir=target, backend_type=backend, dump_passes=False)
        files.write(done, str(compiled.output_dir))
    found = done.read_text(encoding="utf-8")
    if base.resolve() not in Path(found).resolve().parents:
        raise KvCondenseError(str(done), f"a folder within {base}", found)
    return found


@functools.cache
def _base() -> Path:
    """The folder that is this user's alone, or one for this process where there is none."""
    kept = private.place()
    if kept is None or private.make(kept / "pypto") is not None:
        made = tempfile.TemporaryDirectory(prefix="kvcondense-pypto-")  # 0700
        atexit.register(made.cleanup)
        return Path(made.name)
    return kept / "pypto"


def _packed(t: torch.Tensor) -> tuple[str, list[int], bytes]:
    """A tensor as bytes: sharing memory with a process that may be killed would leak it."""
    return str(t.dtype).removeprefix("torch."), list(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes()


def _unpacked(packed: tuple[str, list[int], bytes]) -> torch.Tensor:
    dtype, shape, data = packed
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).view(shape)
