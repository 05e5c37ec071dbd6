"""The bytes of a bundle: blobs, commits that name them, and two marks at the front that say which commit is the last.

    0     512   mark of an even commit      text of 512 bytes: digest, then JSON {number, at, bytes, digest, end}
    512   512   mark of an odd commit       zeros until there is one
    1024  ...   blobs and commits, each at a multiple of 64

Commit n is a JSON object; it names its blobs and commit n - 1 by place, length and digest (XXH3, 128 bits), its mark
names it. So a mark vouches for every byte that counts. An append writes blobs and a commit behind everything there is,
waits for the disk, and only then writes the mark of the other parity: killed at any moment, the file is what it was.
What lies behind the last commit's end is left of such an append, and is cut off by the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kvcondense.errors import CheckpointError, IntegrityWarning
from kvcondense.files import require_file
from kvcondense.files.reading import opened
from kvcondense.files.schema import decoded
from kvcondense.files.whole import flush, lock

MARK_BYTES = 512
FIRST = 2 * MARK_BYTES
ALIGN = 64
_HEX = 32
_WHAT = "a kvcondense bundle"


@dataclass(frozen=True)
class Extent:
    """A piece of the file, and what its bytes must be."""

    at: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Mark:
    """Where the last commit is, its number, and where its file ends."""

    number: int
    at: int
    bytes: int
    digest: str
    end: int

    @property
    def commit(self) -> Extent:
        """The commit's JSON."""
        return Extent(self.at, self.bytes, self.digest)

    def render(self) -> bytes:
        """The mark's bytes: there are no others of the same meaning."""
        text = json.dumps({"bundle": 1, **asdict(self)}, sort_keys=True).encode()
        return f"{_digest([text])} ".encode() + text.ljust(MARK_BYTES - _HEX - 1)


class Container:
    """A bundle's file, open for reading. Raises CheckpointError for any other file, and for damage.

    recover: of two marks, one of which is damaged, the whole one counts, with an IntegrityWarning: if the damaged one
    was the newer, the last append is lost.
    """

    def __init__(self, path: Path, *, recover: bool = False) -> None:
        self.path, self._file = path, opened(path, _WHAT)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.mark = _newest(path, self._file.read(FIRST), recover)
            if not FIRST <= self.mark.end <= self.size:
                raise CheckpointError(str(path), f"a file of {self.mark.end} bytes", f"one cut short, of {self.size}")
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def unfinished(self) -> int:
        """Bytes behind the last commit: of an append that was broken off."""
        return self.size - self.mark.end

    def read(self, extent: Extent, what: str, *, verify: bool = True) -> torch.Tensor:
        """The bytes of a piece, uint8 [bytes]; raises CheckpointError that calls it ``what`` if they are others."""
        label = f"{self.path} {what}"
        if not FIRST <= extent.at <= extent.at + extent.bytes <= self.mark.end:
            raise CheckpointError(label, f"bytes {FIRST} to {self.mark.end}", f"{extent.bytes} at {extent.at}")
        data = torch.empty(extent.bytes, dtype=torch.uint8, device="cpu")
        view, done = data.numpy().data, 0
        self._file.seek(extent.at)
        while done < extent.bytes:
            got = self._file.readinto(view[done:])
            if not got:
                raise CheckpointError(label, f"{extent.bytes} bytes", f"{done}: the file was cut short")
            done += got
        if verify and _digest([view]) != extent.digest:
            raise CheckpointError(label, "the bytes that its digest was made of", "others: the file is damaged")
        return data


class Appender:
    """Adds to a file: ``blob`` after blob, then one ``commit``, before which nothing counts."""

    def __init__(self, file: BinaryIO, last: Mark | None) -> None:
        self._file, self._last = file, last
        self._end = FIRST if last is None else last.end
        if last is None:
            file.write(bytes(FIRST))

    def blob(self, parts: Iterable[torch.Tensor | bytes]) -> Extent:
        """Write tensors and bytes as one piece."""
        at = -(-self._end // ALIGN) * ALIGN
        self._file.seek(at)
        views = [_view(part) for part in parts]
        for view in views:
            self._file.write(view)
        extent = Extent(at, sum(len(view) for view in views), _digest(views))
        self._end = at + extent.bytes
        return extent

    def commit(self, content: dict[str, Any]) -> None:
        """Write the commit and, when all is on disk, its mark."""
        text = self.blob([json.dumps(content, sort_keys=True).encode()])
        number = 0 if self._last is None else self._last.number + 1
        mark = Mark(number, text.at, text.bytes, text.digest, self._end)
        flush(self._file)
        self._file.seek(number % 2 * MARK_BYTES)
        self._file.write(mark.render())
        flush(self._file)
        self._last = mark


@contextlib.contextmanager
def appending(path: Path) -> Iterator[tuple[Container, Appender]]:
    """An existing file to add to; what is broken off leaves no trace. Raises CheckpointError if another one writes."""
    require_file(path, _WHAT)
    with path.open("r+b") as file:
        if not lock(file.fileno()):
            raise CheckpointError(str(path), "a file that nobody else writes", "one that is being written")
        there = Container(path)
        try:
            _require_same(file, path)
            file.truncate(there.mark.end)
            yield there, Appender(file, there.mark)
            _require_same(file, path)
        except BaseException as error:
            # What cannot be cut off now does not count, and goes with the next append.
            with contextlib.suppress(OSError):
                file.flush()
            with contextlib.suppress(OSError, CheckpointError), contextlib.closing(Container(path)) as now:
                os.ftruncate(file.fileno(), now.mark.end)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)
            raise
        finally:
            there.close()


def _require_same(file: BinaryIO, path: Path) -> None:
    """Raise if another file has taken the place of the open one: what is written there would be lost."""
    try:
        same = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        same = False
    if not same:
        raise CheckpointError(str(path), "a file that nobody else writes", "one that was replaced meanwhile")


def _newest(path: Path, front: bytes, recover: bool) -> Mark:
    halves = [front[i : i + MARK_BYTES] for i in (0, MARK_BYTES)]
    marks = [_parsed(half, parity) for parity, half in enumerate(halves)]
    found = sorted((m for m in marks if m is not None), key=lambda m: m.number)
    if not found:
        raise CheckpointError(str(path), _WHAT, "a file without its marks")
    newest, others = found[-1], len(found) - 1
    alone = newest.number == 0 and halves[1] == bytes(MARK_BYTES)
    if alone or (others and found[0].number == newest.number - 1):
        return newest
    if not recover:
        hint = "recover takes the other one; if the damaged one was the newer, the last append is lost"
        raise CheckpointError(str(path), "two whole marks", "a damaged one", hint)
    warnings.warn(f"{path}: a mark is damaged; the last append may be lost", IntegrityWarning, stacklevel=4)
    return newest


def _parsed(half: bytes, parity: int) -> Mark | None:
    """The mark, if these are the very bytes that it was written with, where it belongs."""
    try:
        mark = decoded(half[_HEX:], Mark, "mark")
    except CheckpointError:
        return None
    whole = mark.number % 2 == parity and mark.number >= 0 and mark.render() == half
    return mark if whole else None


def _view(part: torch.Tensor | bytes) -> memoryview:
    if isinstance(part, bytes):
        return memoryview(part)
    return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    import xxhash

    found = xxhash.xxh3_128()
    for part in parts:
        found.update(part)
    return found.hexdigest()
