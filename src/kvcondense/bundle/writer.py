"""Writing a bundle: one compressor after the other, then a commit; a later one adds what has come since."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from kvcondense.bundle.commits import Commit, Entry, Member, chain
from kvcondense.bundle.container import Appender, Container, appending
from kvcondense.bundle.held import Held, fields_of
from kvcondense.errors import KvCondenseError, RangeError, require, require_int
from kvcondense.files import replacing
from kvcondense.files.schema import typed
from kvcondense.snapshot import save_live

_MOST_ABOUT = 1 << 16


class Writer:
    """Takes each compressor once, all at one position. What it has taken counts when its ``with`` block ends well."""

    def __init__(self, file: Appender, about: Mapping[str, str], there: Container | None = None) -> None:
        self._file = file
        self._about = typed(dict(about), dict[str, str], "about")
        if sum(len(k) + len(v) for k, v in self._about.items()) > _MOST_ABOUT:
            raise RangeError("about", f"at most {_MOST_ABOUT} characters", "more")
        self._before, self._previous = 0, None
        self._members: dict[tuple[int, str], Member] | None = None
        if there is not None:
            commits, members = chain(there)
            self._before, self._previous = commits[-1].position, there.mark.commit
            self._members = {(m.layer, m.part): m for m in members}
        self._position: int | None = None
        self._new: dict[tuple[int, str], Member] = {}
        self._entries: dict[tuple[int, str], Entry] = {}

    def add(self, layer: int, part: str, held: Held) -> None:
        """Write the rows that are not in the file yet, and the live state.

        Raises KvCondenseError, and writes nothing that counts, if another compressor was added at another position, an
        appended one is not that of the file (spec, format), or was added already; StateMismatchError if the state does
        not hold the request at its position.
        """
        require("held", held, Held)
        key, cache = (require_int("layer", layer, 0), part), held.cache
        member = Member(layer, part, held.spec, cache.format, _scale(held))
        self._fits(key, member, held.position)
        n = [held.spec.visible_rows(p) for p in (self._before, held.position)]
        state = save_live(held.spec, held.state, held.batch, ape=held.ape, impl=held.impl)
        self._put(key, member, held.position, held.take(*n), state)

    def add_raw(self, member: Member, position: int, rows: dict[str, torch.Tensor], state: bytes) -> None:
        """The same of encoded rows [n, elements] by field, and a payload of ``snapshot``: from another bundle."""
        key = (member.layer, member.part)
        self._fits(key, member, position)
        self._put(key, member, position, rows, state)

    def _put(
        self, key: tuple[int, str], member: Member, position: int, rows: dict[str, torch.Tensor], state: bytes
    ) -> None:
        written = self._file.blob(rows[name] for name in fields_of(member.format, member.spec.head_dim))
        self._position, self._new[key] = position, member
        self._entries[key] = Entry(written, self._file.blob([state]))

    def _fits(self, key: tuple[int, str], member: Member, position: int) -> None:
        if position <= self._before and self._previous is not None:
            raise RangeError("position", f"one after {self._before}, where the bundle stands", position)
        if self._position not in (None, position):
            raise RangeError("position", f"{self._position}, as the compressors before", position)
        if key in self._entries:
            raise KvCondenseError(member.name, "to be added once", "it again")
        if self._members is None:
            return
        there = self._members.get(key)
        if there is None:
            raise KvCondenseError(member.name, f"one of {', '.join(m.name for m in self._members.values())}", "another")
        for what in ("spec", "format", "tensor_scale"):
            wanted, got = getattr(there, what), getattr(member, what)
            if wanted != got:
                raise KvCondenseError(f"{member.name} {what}", _named(wanted), _named(got))

    def finish(self) -> None:
        """Commit; raises KvCondenseError if a compressor of the bundle is missing, or there is none."""
        members = self._new if self._members is None else self._members
        missing = [m.name for key, m in members.items() if key not in self._entries]
        if missing or not members or self._position is None:
            raise KvCondenseError("bundle", "every compressor to be added", f"none of {', '.join(missing) or 'all'}")
        first = self._members is None
        self._file.commit(
            Commit(
                position=self._position,
                about=self._about,
                previous=self._previous,
                members=[m.as_dict() for m in members.values()] if first else [],
                entries=[self._entries[key] for key in members],
            ).as_dict()
        )


@contextlib.contextmanager
def create(path: str | Path, about: Mapping[str, str] | None = None) -> Iterator[Writer]:
    """A new bundle, which takes ``path``'s place when the block ends well. about: what its writer wants to say of it.

    ::

        with bundle.create(path) as file:
            for layer in layers:
                file.add(layer.number, "main", Held(spec, state, batch, cache, pages))
    """
    with replacing(path) as made, made.open("wb") as file:
        writer = Writer(Appender(file, None), about or {})
        yield writer
        writer.finish()


@contextlib.contextmanager
def append(path: str | Path, about: Mapping[str, str] | None = None) -> Iterator[Writer]:
    """Add to a bundle in place: rows since its last commit, and the state of now. Nothing there is written again.

    An end that is not well (an exception, a full disk, kill -9) leaves what was there. Raises CheckpointError for a
    file that is no bundle, is damaged in its marks or commits, or that somebody else is writing.
    """
    with appending(Path(path)) as (there, file):
        writer = Writer(file, about or {}, there)
        yield writer
        writer.finish()


def _scale(held: Held) -> float | None:
    return None if held.cache.tensor_scale is None else float(held.cache.tensor_scale)


def _named(value: object) -> str:
    return str(getattr(value, "name", value))
