"""Machine code on disk: object files with a digest, in the folder that is this user's alone (``backends.private``).

Only regular files of this user (or root) that others cannot write are read. The digest in a file is over the kernel's
name, which holds the stamp of its sources, and the code: it notices damage, a file of another name and one of other
sources. It does not protect from this user's own programs, which could write both.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import stat
import sys
from pathlib import Path

from kvcondense.backends.private import foreign, open_to_others, place
from kvcondense.files.whole import abandoned, locked

_DIGEST = 32
_number = itertools.count()


def read(name: str) -> bytes | None:
    """The code under this name, or None if there is none, it is damaged, or somebody else may have written it."""
    folder = place()
    if folder is None:
        return None
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with os.fdopen(os.open(folder / name, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or foreign(found) or open_to_others(found):
                return None
            data = file.read()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if _digest(name, code) == digest else None


def write(name: str, code: bytes) -> Path | None:
    """Keep code under this name; where that fails, the next process compiles anew, and nothing stays behind.

    Several processes may write one name at once: they write the same. What those that are gone have left is removed.
    """
    folder = place()
    if folder is None:
        return None
    made = folder / f".{os.getpid()}-{next(_number)}.part"
    try:
        held = locked(made, os.O_CREAT | os.O_EXCL, 0o600)
        if held is None:  # another process took it for one of the dead, in the moment before the lock
            return None
        with os.fdopen(held, "wb") as file:
            file.write(_digest(name, code) + code)
            file.flush()
            os.replace(made, folder / name)
        for other in folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                abandoned(other)
    except OSError as error:
        made.unlink(missing_ok=True)
        sys.stderr.write(f"kvcondense: compiled kernels are not kept: {error}\n")
        return None
    return folder


def _digest(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + code).digest()
