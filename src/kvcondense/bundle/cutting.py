"""A new bundle of a prefix of another one, in one commit, and in other formats where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kvcondense.bundle.reader import Bundle
from kvcondense.bundle.writer import create
from kvcondense.errors import RangeError
from kvcondense.formats import get_format
from kvcondense.formats.catalog import converted


def cut(
    source: Bundle, path: str | Path, position: int | None = None, formats: Mapping[str, str] | None = None
) -> None:
    """Write the request as it stood at ``position`` (default: as it stands) to ``path``, which is replaced whole.

    formats: part -> format for its rows, which are decoded and encoded again; what is lost is recorded
    (``Member.converted_from``). Raises RangeError for a position that is not restorable, or a format with a scale for
    the whole cache.
    """
    position = source.position if position is None else position
    if not source.restorable(position):
        raise RangeError("position", "one that the bundle can go on at", position, f"{source.nearest(position)} is")
    wanted = {part: get_format(name) for part, name in (formats or {}).items()}
    for part, fmt in wanted.items():
        if fmt.tensor_scale:
            raise RangeError(f"format of {part}", "one without a scale for the whole cache", fmt.name)
        for member in source.members.values():
            if member.part == part:
                fmt.check(member.spec.head_dim, member.spec.rope_dim)
    about = next(commit.about for commit in source.commits if commit.position >= position)
    with create(path, about) as file:
        for (layer, part), member in source.members.items():
            rows = source.rows(layer, part, member.spec.visible_rows(position))
            state = source.state(layer, part, position)
            target = wanted.get(part, member.format)
            if target != member.format:
                rows = source.encoded(member, rows, target)
                lost = converted(member.converted_from, member.format.name, target.name)
                member = replace(member, format=target, tensor_scale=None, converted_from=lost)
            file.add_raw(member, position, rows, state)
