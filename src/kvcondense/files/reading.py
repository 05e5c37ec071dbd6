"""Bytes and JSON of files that anybody may have written: regular ones, up to a size and a depth, and errors say where.

The size is compared before memory is taken. JSON may become some twenty times as many bytes in Python where it is all
empty lists: what is large is decoded into its types at once instead (``schema.decoded``).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

from kvcondense.errors import CheckpointError

MAX_DEPTH = 64
_MAX_SHOWN = 400


def require_file(path: str | Path, what: str, argument: str = "") -> Path:
    """``path``, if there is a file; raises CheckpointError, which names it whole, otherwise."""
    path = Path(path)
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        got = absent(path) if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)
    else:
        if stat.S_ISREG(found.st_mode):
            return path
        got = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
    raise CheckpointError(argument or str(path), what, f"{path} ({got})" if argument else got)


def absent(path: Path, what: str = "file") -> str:
    """What is at ``path``, where nothing can be opened: nothing at all, or a link whose target is not there."""
    return f"a link to nothing: {os.readlink(path)}" if path.is_symlink() else f"no such {what}"


def opened(path: str | Path, what: str, argument: str = "") -> io.FileIO:
    """A regular file, open for reading without a buffer; raises CheckpointError for anything else.

    argument: what errors call it, if not by its path. What is a file when it is asked for may be a pipe when it is
    opened: it is asked again then, and nothing is waited for.
    """
    path = require_file(path, what, argument)
    try:
        held = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        got = f"{path} ({error.strerror})" if argument else error.strerror
        raise CheckpointError(argument or str(path), what, got) from error
    if not stat.S_ISREG(os.fstat(held).st_mode):
        os.close(held)
        raise CheckpointError(argument or str(path), what, "no regular file")
    return io.FileIO(held, "rb")


def read_bytes(path: str | Path, what: str, most: int, argument: str = "") -> bytes:
    """The bytes of a regular file of at most ``most`` bytes; raises CheckpointError for anything else (``opened``)."""
    with opened(path, what, argument) as raw, io.BufferedReader(raw) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = b"" if size > most else file.read(most + 1)
        except OSError as error:
            raise CheckpointError(argument or str(path), what, f"{path} ({error.strerror})") from error
    size = max(size, len(data))
    if size > most:
        got = f"{path}, of {size}" if argument else size
        raise CheckpointError(argument or str(path), f"{what} of at most {most} bytes", got)
    return data


def read_text(path: str | Path, what: str, most: int, argument: str = "") -> str:
    """The same as text in UTF-8, without the mark that some editors begin a file with."""
    data = read_bytes(path, what, most, argument)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"{path} ({clipped(error)})" if argument else clipped(error)
        raise CheckpointError(argument or str(path), f"{what}, in UTF-8", got) from error


def parsed(text: str, name: str, what: str = "a JSON object") -> dict[str, Any]:
    """The object that ``text`` holds.

    Raises CheckpointError for other values, two values of a key, deep nesting, and strings with half a surrogate pair,
    which JSON can spell and nothing can write.
    """
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _no_two_values(name, pairs))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(name, what, clipped(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(name, what, type(value).__name__)
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = (one for holder in level for one in (holder.values() if isinstance(holder, dict) else holder))
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return _encodable(value, name, what)
    raise CheckpointError(name, f"{what} of at most {MAX_DEPTH} levels", "one nested more deeply")


def _encodable(value: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(name, f"{what} in Unicode", clipped(error)) from error
    return value


def same(one: Path, other: Path) -> bool:
    """True if both names are of one file, however they are spelt; neither need exist."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        return one.resolve() == other.resolve() or one.samefile(other)
    return False


def clipped(value: object) -> str:
    """As an error shows it: texts of a file may have any length."""
    return str(value) if len(str(value)) <= _MAX_SHOWN else f"{str(value)[:_MAX_SHOWN]}..."


def short(value: object) -> str:
    """A value as an error shows it: a file may hold anything, of any length."""
    return reprlib.repr(value)


def _no_two_values(name: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands there twice, others take the last value or the first."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise CheckpointError(f"{name} key {short(key)}", "one value", f"{short(found[key])} and {short(value)}")
        found[key] = value
    return found
