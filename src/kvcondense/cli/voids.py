"""Options that mean nothing beside another one: who types them expects something that would not happen, and is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from kvcondense.errors import UnsupportedError


@dataclass(frozen=True)
class Void:
    """Beside ``by``, none of ``options`` means anything; all are parameters of a command's declaration.

    value: of ``by``, where it takes several; missing: they mean nothing where ``by`` is *not* typed.
    """

    by: str
    options: tuple[str, ...]
    value: str | None = None
    missing: bool = False


def check(rules: Iterable[Void], context: typer.Context, typed: Mapping[str, str]) -> None:
    """Raise for the first option that was typed and means nothing; typed: what a person types for each parameter."""
    given: dict[str, Any] = {name: value for name, value in context.params.items() if _is_typed(context, name)}
    for rule in rules:
        holds = rule.by in given and rule.value in (None, given[rule.by])
        for name in rule.options:
            if name in given and holds != rule.missing:
                by = typed[rule.by] if rule.value is None else f"{context.info_name} {rule.value}"
                wanted = f"{by} beside it" if rule.missing else f"to be left out with {by}, which makes no use of it"
                raise UnsupportedError(typed[name], wanted, _told(typed[name], given[name]))


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def _told(option: str, value: Any) -> str:
    """As it was typed; a list is an option that was repeated."""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(option if one is True else f"{option} {one}" for one in values)
