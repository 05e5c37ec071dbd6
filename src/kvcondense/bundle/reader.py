"""Reading a bundle: what it has, where it can go back to, and one compressor at a time into an engine's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcondense.api import store
from kvcondense.bundle.commits import Member, chain
from kvcondense.bundle.container import Container
from kvcondense.bundle.held import Held, row_bytes, split
from kvcondense.errors import KvCondenseError, RangeError, require, require_int
from kvcondense.formats import CacheFormat
from kvcondense.formats.catalog import converted
from kvcondense.layout.cache import PagedCache
from kvcondense.snapshot import earlier, load_live, reaches_back

_ROWS_AT_A_TIME = 4096
"""When rows are decoded."""


@dataclass(frozen=True)
class Restored:
    """What ``restore`` wrote. converted_from: formats in which the rows have lost bits before that of the cache."""

    rows: int
    bytes: int
    converted_from: tuple[str, ...]


class Bundle:
    """A bundle, open for reading, for ``with``. Raises CheckpointError for a file that is none.

    position: of the last commit. about: what its writer said. members: its compressors, by (layer, part). verify:
    compare what is read with its digests; those of marks and commits are looked at in any case. recover: see
    ``Container``.
    """

    def __init__(self, path: str | Path, *, verify: bool = True, recover: bool = False) -> None:
        self.file, self.verify = Container(Path(path), recover=recover), verify
        try:
            self.commits, members = chain(self.file)
        except BaseException:
            self.file.close()
            raise
        self.members = {(m.layer, m.part): m for m in members}
        self._order = list(self.members)
        self.position, self.about = self.commits[-1].position, self.commits[-1].about

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def restorable(self, position: int) -> bool:
        """Whether every compressor can go on at ``position``: 0, or where a commit or its open windows are."""
        return all(self._commit_for(member, position) is not None for member in self.members.values())

    def nearest(self, position: int) -> int:
        """The last restorable position up to ``position``; the tokens from there on are to be computed again."""
        boundary = math.lcm(*(m.spec.ratio for m in self.members.values()))
        ends = [min(commit.position, position) for commit in self.commits]
        boundaries = [p // boundary * boundary for p in ends]  # without overlap, nothing is needed there
        return next(p for p in sorted({*ends, *boundaries, 0}, reverse=True) if self.restorable(p))

    def restore(self, layer: int, part: str, held: Held, *, convert: bool = False) -> Restored:
        """Put one compressor where ``held`` says, at the position of its batch: rows 0 .. visible_rows(position) - 1.

        Slot, page size, kind and (with ``convert``) dtype of the state, page size and (with ``convert``) format of the
        cache may be others than those that were written: rows are then decoded and encoded again. Reads this
        compressor alone; everything is compared with its digests before anything is written. Raises KvCondenseError if
        the spec is another, or a conversion was not asked for, RangeError for a position that is not restorable.
        """
        require("held", held, Held)
        member, position = self.member(layer, part), held.position
        if member.spec != held.spec:
            raise KvCondenseError(f"{member.name} spec", str(member.spec), held.spec)
        scale = None if held.cache.tensor_scale is None else float(held.cache.tensor_scale)
        same = (member.format, member.tensor_scale) == (held.cache.format, scale)
        if not same and not convert:
            raise KvCondenseError(
                "cache", f"format {member.format.name}, scale {member.tensor_scale} (or convert=True)",
                f"{held.cache.format.name}, {scale}",
            )  # fmt: skip
        n = member.spec.visible_rows(position)
        held.slots(0, n)  # raises unless there are pages for all
        state, fields, lost = self.state(layer, part, position), self.rows(layer, part, n), member.converted_from
        if not same:
            fields = self.encoded(member, fields, held.cache.format, scale, strict=held.cache.strict)
            lost = converted(lost, member.format.name, held.cache.format.name)
        load_live(held.spec, held.state, held.batch, state, ape=held.ape, convert=convert, impl=held.impl)
        held.put(fields)
        return Restored(n, n * row_bytes(member.format, member.spec.head_dim), lost)

    def member(self, layer: int, part: str) -> Member:
        """One compressor; raises RangeError if the bundle has none of that name."""
        found = self.members.get((layer, part))
        if found is None:
            raise RangeError("layer", ", ".join(m.name for m in self.members.values()), f"layer {layer} {part}")
        return found

    def rows(self, layer: int, part: str, count: int) -> dict[str, torch.Tensor]:
        """The first ``count`` rows as their format has them, on the CPU: field -> [count, elements]."""
        member = self.member(layer, part)
        found, have = [], 0
        for number, commit in enumerate(self.commits):
            behind = member.spec.visible_rows(commit.position)
            if have < min(behind, count):
                extent = commit.entries[self._order.index((layer, part))].rows
                data = self.file.read(extent, f"commit {number} {member.name} rows", verify=self.verify)
                found.append(split(data, member.format, member.spec.head_dim))
            have = behind
        if count > have:
            raise RangeError("count", f"at most {have} rows", count)
        if not found:
            return split(torch.empty(0, dtype=torch.uint8, device="cpu"), member.format, member.spec.head_dim)
        if len(found) == 1:
            return {name: t[:count] for name, t in found[0].items()}
        return {name: torch.cat([one[name] for one in found])[:count] for name in found[0]}

    @staticmethod
    def encoded(
        member: Member,
        fields: dict[str, torch.Tensor],
        fmt: CacheFormat,
        tensor_scale: float | None = None,
        *,
        strict: bool = False,
    ) -> dict[str, torch.Tensor]:
        """``rows`` in another format: decoded as a reader of the cache sees them, and encoded again.

        strict: RangeError for a row that the format cannot hold.
        """
        count, each = next(iter(fields.values())).shape[0], max(1, fmt.tile)
        cache = PagedCache.allocate(
            member.spec.head_dim, -(-count // each), each, format=fmt, tensor_scale=tensor_scale, strict=strict
        )
        scale = None if member.tensor_scale is None else torch.tensor(member.tensor_scale, device="cpu")
        slots = torch.arange(count, device="cpu")
        for first in range(0, count, _ROWS_AT_A_TIME):
            at = slice(first, first + _ROWS_AT_A_TIME)
            store(member.format.decode({name: t[at] for name, t in fields.items()}, scale), slots[at], cache)
        return cache.get(slots)

    def state(self, layer: int, part: str, position: int) -> bytes:
        """The live state at ``position`` as a payload of ``snapshot.load_live``; raises RangeError if none tells it."""
        member = self.member(layer, part)
        number = self._commit_for(member, position)
        if number is None:
            raise RangeError("position", "one that the bundle can go on at", position, f"{self.nearest(position)} is")
        extent = self.commits[number].entries[self._order.index((layer, part))].state
        data = self.file.read(extent, f"commit {number} {member.name} state", verify=self.verify)
        return earlier(data.numpy().tobytes(), position)

    def check(self) -> int:
        """Read everything and compare it with its digests, states with their headers; returns the bytes.

        Raises CheckpointError at the first difference.
        """
        total = 0
        for number, commit in enumerate(self.commits):
            for member, entry in zip(self.members.values(), commit.entries, strict=True):
                label = f"commit {number} {member.name}"
                total += self.file.read(entry.rows, f"{label} rows").shape[0]
                state = self.file.read(entry.state, f"{label} state").numpy().tobytes()
                total += len(state)
                earlier(state, commit.position)
        return total

    def _commit_for(self, member: Member, position: int) -> int | None:
        """The first commit whose state can be taken back to ``position``."""
        require_int("position", position, 0)
        for number, commit in enumerate(self.commits):
            if reaches_back(member.spec, commit.position, position):
                return number
        return None
