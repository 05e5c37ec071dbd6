"""Files that take the place of others whole or not at all: one writer at a time, on disk before it counts."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kvcondense.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_number = itertools.count()
_PIPE_TRIES, _PIPE_WAIT = 100, 0.05


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to fill, which takes ``path``'s place when the block ends well; whatever else happens, the old one stays.

    It is on disk before it takes the place, and the folder is told. Links stay links. What processes that are gone have
    left is removed; raises CheckpointError if one that is not, or another thread, is writing the same file. What is no
    file (a terminal, a pipe, /dev/null) gets the bytes at the end. Raises OSError that names ``path`` for a folder, a
    pipe that nobody reads, a disk that is full or cannot be written.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            with tempfile.TemporaryDirectory() as folder, _stream(path) as target:
                made = Path(folder) / f"result{path.suffix}"
                yield made
                with made.open("rb") as source:
                    shutil.copyfileobj(source, target)
            return
        made, target = _beside(path), path.resolve()
        with _claimed(path, made):
            yield made
            if target.exists():
                shutil.copymode(target, made)
            _flush(made)
            os.replace(made, target)
            _flush(target.parent)
    except OSError as error:  # a full disk names no file, and nobody knows the one beside
        if error.errno is not None:
            error.filename = str(path)
        raise


def write(path: str | Path, content: str | bytes) -> None:
    """``content``, text in UTF-8, in the place of what ``path`` held."""
    with replacing(path) as made:
        made.write_bytes(content.encode() if isinstance(content, str) else content)


def why_not_written(path: str | Path) -> str | None:
    """None if ``replacing`` can put a file here, else the reason; nothing stays behind."""
    path = Path(path)
    try:
        if path.is_dir():
            return "a folder"
        if path.exists() and not path.is_file():
            return None if os.access(path, os.W_OK) else "it cannot be written"
        folder = path.resolve().parent
        if not folder.is_dir():
            return f"there is no folder {path.parent}"
        made = _beside(path)
        made.touch()
        made.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # a name with a zero byte; a loop of links, before 3.13
        return getattr(error, "strerror", None) or str(error)
    return None


def _stream(path: Path) -> BinaryIO:
    """A device or a pipe, open; one that has no reader within some seconds is not waited for any longer."""
    for _ in range(_PIPE_TRIES):
        try:
            held = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(_PIPE_WAIT)
        else:
            os.set_blocking(held, True)
            return os.fdopen(held, "wb")
    raise OSError(errno.ENXIO, "nobody reads this pipe")


def _beside(path: Path) -> Path:
    """In the same folder, so that it can be renamed; with the same suffix, which may say what is written."""
    target = path.resolve()
    return target.with_name(f".{target.stem[:80]}.{os.getpid()}-{next(_number)}.part{target.suffix}")


@contextlib.contextmanager
def _claimed(path: Path, made: Path) -> Iterator[None]:
    """Hold ``made`` for as long as the block takes, and leave none of it; raises if somebody else has such a file."""
    mine, wanted = locked(made, os.O_CREAT | os.O_EXCL), "a file that nobody else writes"
    try:
        if mine is None:  # taken between its making and the lock
            raise CheckpointError(str(path), wanted, "one that is being written")
        target = path.resolve()
        ours = re.compile(rf"\.{re.escape(target.stem[:80])}\.\d+(-\d+)?\.part{re.escape(target.suffix)}")
        for other in made.parent.iterdir():
            if other != made and ours.fullmatch(other.name) and not abandoned(other):
                raise CheckpointError(str(path), wanted, "one that is being written")
        yield
    finally:
        made.unlink(missing_ok=True)
        if mine is not None:
            os.close(mine)


def lock(held: int) -> bool:
    """Lock an open file until it is closed; False if another one has locked it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def flush(file: BinaryIO) -> None:
    """Wait until what was written to an open file is on disk."""
    file.flush()
    _sync(file.fileno())


def locked(path: Path, flags: int = 0, mode: int = 0o666) -> int | None:
    """The file, opened and locked until it is closed; None if another one has locked it."""
    held = os.open(path, os.O_RDWR | flags, mode)
    if lock(held):
        return held
    os.close(held)
    return None


def abandoned(part: Path) -> bool:
    """Whether the process that wrote ``part`` is gone, which then goes, too."""
    held = locked(part)
    if held is None:
        return False
    part.unlink(missing_ok=True)
    os.close(held)
    return True


def _flush(path: Path) -> None:
    """The same of a file or folder by name."""
    held = os.open(path, os.O_RDONLY)
    try:
        _sync(held)
    finally:
        os.close(held)


def _sync(held: int) -> None:
    try:
        os.fsync(held)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such thing, for folders say
            raise
