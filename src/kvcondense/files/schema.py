"""The types that a file's values must have: declared as classes, checked by msgspec, told as this library's errors."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, TypeVar

from kvcondense.errors import CheckpointError, KvCondenseError
from kvcondense.files.reading import clipped, short

_T = TypeVar("_T")
_PLACE = re.compile(r"^(.*?)(?: - at `\$?(.*)`)?$", re.DOTALL)
_FORMS = (
    (re.compile(r"Expected (.+), got (.+)", re.DOTALL), None),
    (re.compile(r"Object missing required field `(.+)`", re.DOTALL), "nothing"),
    (re.compile(r"Expected (.+)", re.DOTALL), ""),
)


def typed(value: Any, kind: type[_T], name: str) -> _T:
    """``value``, as JSON has it, as a ``kind``: a dataclass, dict[str, int] ...

    Nothing is converted: 4.0 is no integer, true no number. Raises CheckpointError that names the entry below
    ``name``, what was expected and what was there.
    """
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise _told(error, name, value) from error
    except KvCondenseError as error:  # of a class that checks itself
        raise CheckpointError(f"{name} {error.argument}", error.expected, error.got, error.hint) from error


def known(value: Any, kind: type, name: str) -> None:
    """Raise CheckpointError unless ``value`` is an object, and all its entries are fields of the dataclass ``kind``."""
    names = {f.name for f in fields(kind)}
    for key in typed(value, dict[str, Any], name):
        if key not in names:
            raise CheckpointError(f"{name} {clipped(key)}", f"one of {', '.join(sorted(names))}", "an unknown entry")


def decoded(data: bytes, kind: type[_T], name: str) -> _T:
    """The same from JSON, and no memory is taken for what ``kind`` does not have. Of a key twice, the last counts."""
    import msgspec

    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _told(error, name, None) from error


def _told(error: Exception, name: str, value: Any) -> KvCondenseError:
    found = _PLACE.match(str(error))
    text, place = (found[1], found[2] or "") if found else (str(error), "")
    label = f"{name} {place.removeprefix('.')}".rstrip()
    for pattern, got in _FORMS:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        first = clipped(match[1].replace("`", ""))
        if got is None:
            return CheckpointError(label, first, clipped(match[2].replace("`", "")))
        if got:
            return CheckpointError(f"{label}{'.' if place else ' '}{first}", "it to be there", got)
        return CheckpointError(label, first, short(_at(value, place)))
    return CheckpointError(label, "JSON of the right form", clipped(text))


def _at(value: Any, place: str) -> Any:
    """What stands at a path such as ``.ops[2].q``, as far as it can be followed."""
    for key, index in re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", place):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return "another value"
    return value
