"""Folders of compiled code: of this user alone, so that nobody else can have put there what is loaded as code.

A folder is made with mode 0700. It and every folder above it must be this user's or root's, and closed to others'
writing (in one like /tmp, others cannot exchange what is this user's). Where that is not to be had there is no folder,
and the reason is said once.
"""

from __future__ import annotations

import functools
import os
import stat
import sys
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ANYBODY = stat.S_IRWXG | stat.S_IRWXO


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
            if foreign(found):
                return f"{place} belongs to another user"
            if open_to_others(found) and (place == whole or not found.st_mode & stat.S_ISVTX):
                return f"others may write to {place}"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return None


def make(folder: Path) -> str | None:
    """Make ``folder``, 0700, if there is none; None if code may be loaded from it, else the reason.

    One of this user's that others may read, as older versions made it, is closed to them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = why_not(folder)
        if reason is None and hasattr(os, "getuid"):
            found = folder.stat()
            if found.st_uid == os.getuid() and found.st_mode & _ANYBODY:
                folder.chmod(0o700)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return reason


@functools.cache
def place() -> Path | None:
    """``directory``, made; None, and why on standard error, if it is unfit."""
    folder = directory()
    reason = why_not(None) if folder is None else make(folder)
    if reason is None:
        return folder
    sys.stderr.write(f"kvcondense: compiled kernels are neither loaded nor kept: {reason}\n")
    return None


def foreign(found: os.stat_result) -> bool:
    """Whether it is neither this user's nor root's."""
    return hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0)


def open_to_others(found: os.stat_result) -> bool:
    """Whether others may write to it."""
    return os.name == "posix" and bool(found.st_mode & _OTHERS)
