"""``python -m kvcondense.conformance.driver ADAPTER``: a Python adapter as a process that speaks docs/protocol.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import BinaryIO

from kvcondense.conformance import wire
from kvcondense.conformance.adapter import Adapter, Capabilities, Engine
from kvcondense.conformance.own import BackendAdapter, load_factory
from kvcondense.errors import KvCondenseError, ShapeError
from kvcondense.files.reading import clipped
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.layout.state import StatePool
from kvcondense.snapshot import load_live, save_live


class Server:
    """Answers messages with what an adapter does."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        self.adapter, self.name = adapter, name
        self.able = remote_capabilities(adapter)
        self._started = False

    def answer(self, body: bytes) -> bytes:
        """The answer to the message of these bytes, whatever happens on the way."""
        try:
            message = wire.unpack(body, "the request")
            do: Callable[[wire.Message], bytes] | None = getattr(self, f"_{message.kind}", None)
            if do is None:
                raise KvCondenseError("kind", "a request", message.kind)
            if not self._started and message.kind not in ("hello", "init"):
                raise KvCondenseError("kind", "init first", message.kind)
            return do(message)
        except KvCondenseError as error:
            return wire.pack("error", error=clipped(error))
        except Exception as error:  # whatever an adapter runs into
            return wire.pack("error", error=clipped(f"{type(error).__name__}: {error}"))

    def _hello(self, message: wire.Message) -> bytes:
        message.only()
        found = {key: value for key, value in asdict(self.able).items() if value != getattr(Capabilities(), key)}
        return wire.pack("done", name=self.name, capabilities=json.dumps(found))

    def _init(self, message: wire.Message) -> bytes:
        self.setup = wire.to_setup(message)
        self.adapter.init(self.setup)
        self._started = True
        return wire.pack("done")

    def _step(self, message: wire.Message) -> bytes:
        self.adapter.step(*wire.to_step(message))
        return wire.pack("done")

    def _rows(self, message: wire.Message) -> bytes:
        message.only("slots")
        return wire.pack("done", {"rows": self.adapter.rows(message.tensor("slots", (None,), wire.INTEGERS))})

    def _state(self, message: wire.Message) -> bytes:
        message.only("position", "slot")
        batch, spec = wire.to_place(message), self.setup.spec
        position = int(batch.start_positions)
        if self.able.exports:
            held, alone = StatePool.ring(spec, 1), RaggedBatch.at(position, state_slot=0)
            load_live(spec, held, alone, self.adapter.export(batch))
            return wire.pack("done", {"state": export_live(spec, held, alone)})
        rows, wanted = self.adapter.state(batch), [spec.seed_rows(position), spec.state_dim]
        if rows is None or list(rows.shape) != wanted:
            raise ShapeError("state", f"live rows {wanted}", "nothing" if rows is None else list(rows.shape))
        return wire.pack("done", {"state": rows.float()})

    def _load(self, message: wire.Message) -> bytes:
        message.only("position", "slot", "state")
        batch, spec = wire.to_place(message), self.setup.spec
        position = int(batch.start_positions)
        rows = message.tensor("state", (spec.seed_rows(position), spec.state_dim), wire.FLOATS)
        held, alone = StatePool.ring(spec, 1), RaggedBatch.at(position, state_slot=0)
        import_live(spec, held, alone, rows)
        self.adapter.load(batch, save_live(spec, held, alone))
        return wire.pack("done")

    def _reset(self, message: wire.Message) -> bytes:
        message.only("slots")
        self.adapter.reset(message.tensor("slots", (None,), wire.INTEGERS).tolist())
        return wire.pack("done")


def remote_capabilities(adapter: Adapter) -> Capabilities:
    """What an adapter can still do through messages: states travel as rows, caches of kvcondense's own not at all."""
    able = adapter.capabilities
    online = isinstance(adapter, BackendAdapter) and adapter.kind == "online"  # running values are no rows
    exports = able.exports and not online
    states = able.returns_state and (exports or isinstance(adapter, Engine))
    return Capabilities(**{**asdict(able), "formats": False, "exports": exports, "returns_state": states})


def serve(server: Server, source: BinaryIO, target: BinaryIO) -> None:
    """Answer until the end of ``source``; raises KvCondenseError for what is no message."""
    while head := source.read(wire.LENGTH_BYTES):
        size = wire.length(head, "the request")
        body = source.read(size)
        if len(body) < size:
            raise KvCondenseError("the request", f"{size} bytes", len(body))
        target.write(server.answer(body))
        target.flush()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m kvcondense.conformance.driver",
        description="Serve an adapter over stdin and stdout, for kvcondense conformance --exec.",
        epilog='Example: kvcondense conformance --exec "python -m kvcondense.conformance.driver reference:ring"',
    )
    parser.add_argument(
        "adapter", help="module:factory, a module with a BACKEND, backend[:ring|paged|online], mutant:NAME"
    )
    name = parser.parse_args().adapter
    # Whatever the adapter prints or reads is none of the kit's: the pipes move away from where it would look for them.
    source, target = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    try:
        with source, target:
            serve(Server(load_factory(name)(), name), source, target)
    except BrokenPipeError:  # the kit has ended
        return 1
    except KvCondenseError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
