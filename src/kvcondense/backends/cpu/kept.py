"""Machine code on disk: where it is kept, and that nobody else can have put it there.

Code is loaded only from regular files of this user (or root) in a folder that nobody else can write to, and whose own
folders nobody else can exchange. Where that is not to be had, code is kept in memory, and the reason is said once. The
digest in a file is over the kernel's name, the stamp of its sources and the code: it notices damage, a file of another
name and one of other sources. It does not protect from this user's own programs, which could write both.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import sys
import tempfile
from pathlib import Path

_DIGEST = 32
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def directory() -> Path | None:
    """Where compiled kernels are kept: below NUMBA_CACHE_DIR, XDG_CACHE_HOME or ~/.cache; None without a home."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        return Path(os.environ["NUMBA_CACHE_DIR"]) / "kvcondense"
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except (RuntimeError, KeyError):  # no HOME, and no entry for this user
        return None
    return Path(base) / "kvcondense"


def why_not(folder: Path | None) -> str | None:
    """None if code may be loaded from ``folder``, else the reason; asks for it and for every folder above it."""
    if folder is None:
        return "there is no home folder (NUMBA_CACHE_DIR names another place)"
    if not hasattr(os, "getuid"):  # such systems have no such modes
        return None
    try:
        whole = folder.resolve()
        for place in (whole, *whole.parents):
            found = place.stat()
            if _foreign(found):
                return f"{place} belongs to another user"
            # In a folder like /tmp, what is this user's can only be replaced by this user.
            if found.st_mode & _OTHERS and (place == whole or not found.st_mode & stat.S_ISVTX):
                return f"others may write to {place}"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return None


@functools.cache
def place() -> Path | None:
    """The folder, made for this user alone if there is none; None, and why on standard error, if it is unfit."""
    folder = directory()
    reason = None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            reason = f"{folder}: {error.strerror}"
    reason = reason or why_not(folder)
    if reason is None:
        return folder
    sys.stderr.write(f"kvcondense: compiled kernels are neither loaded nor kept: {reason}\n")
    return None


def read(name: str) -> bytes | None:
    """The code under this name, or None if there is none, it is damaged, or somebody else may have written it."""
    folder = place()
    if folder is None:
        return None
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with os.fdopen(os.open(folder / name, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or _foreign(found) or (os.name == "posix" and found.st_mode & _OTHERS):
                return None
            data = file.read()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if _digest(name, code) == digest else None


def write(name: str, code: bytes) -> Path | None:
    """Keep code under this name; where that fails, the next process compiles anew, and nothing stays behind."""
    folder = place()
    if folder is None:
        return None
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(_digest(name, code) + code)
        os.replace(temporary, folder / name)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        sys.stderr.write(f"kvcondense: compiled kernels are not kept: {error}\n")
        return None
    return folder


def _foreign(found: os.stat_result) -> bool:
    """Whether it is neither this user's nor root's."""
    return hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0)


def _digest(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + code).digest()
