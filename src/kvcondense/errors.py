"""Every error the library raises on purpose: argument, what was expected, what was got."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvCondenseError(Exception):
    """Base of all errors raised on purpose.

    ``argument`` names the offending argument (or file entry), ``expected`` and ``got`` say what was wanted and what
    was there; ``hint``, if there is one, what to do next. Errors are raised before anything is written.
    """

    def __init__(self, argument: str, expected: str, got: object, hint: str = "") -> None:
        self.argument = argument
        self.expected = expected
        self.got = str(got)
        self.hint = hint
        super().__init__(f"{argument}: expected {expected}, got {self.got}" + (f" ({hint})" if hint else ""))


class ShapeError(KvCondenseError):
    """A tensor has the wrong number of dimensions or a wrong size."""


class DtypeError(KvCondenseError):
    """A tensor or value has the wrong type."""


class DeviceError(KvCondenseError):
    """A tensor lives on another device than the rest of the call."""


class RangeError(KvCondenseError):
    """An integer or number is outside the range that has a meaning."""


class UnsupportedError(KvCondenseError):
    """The combination is well formed but nothing here can compute it."""


class RankError(KvCondenseError):
    """Another rank did not answer, or holds something else than it should; ``argument`` names it."""


class StateMismatchError(KvCondenseError):
    """The stored state is not the state that the step continues from."""


class CheckpointError(KvCondenseError):
    """A file lacks a tensor, has one too many, or has one of the wrong shape."""


def require(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    """Raise DtypeError unless ``value`` is a ``kind``."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise DtypeError(name, f"a {' or '.join(k.__name__ for k in kinds)}", type(value).__name__)


def require_known(
    name: str, value: str, choices: Iterable[str], hint: str = "", error: type[KvCondenseError] = UnsupportedError
) -> None:
    """Raise ``error`` unless ``value`` is one of ``choices``; it asks whether the nearest of them was meant."""
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, 1)
    hints = [f"did you mean {near[0]}?" if near else "", hint]
    raise error(name, f"one of {', '.join(known)}", repr(value), "; ".join(h for h in hints if h))


def require_int(name: str, value: object, low: int) -> int:
    """``value`` if it is an integer (no bool) of at least ``low``; raises DtypeError or RangeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(name, "an integer", repr(value))
    if value < low:
        raise RangeError(name, f"at least {low}", value)
    return value


class IntegrityWarning(UserWarning):
    """What was read could not be, or was not to be, compared with the digests that it was written with."""
