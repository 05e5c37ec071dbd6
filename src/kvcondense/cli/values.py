"""What options take: names that the shell completes, a typo of which gets a suggestion, and numbers that are some."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcondense.cli import names
from kvcondense.errors import KvCondenseError, require_known

_HINTS = {
    names.FORMATS: "kvcondense info --formats says what each is",
    names.BACKENDS: "kvcondense info says which can run here",
    names.MUTANTS: "kvcondense verify --list-mutants prints them",
}


def one_of(known: tuple[str, ...], *more: str) -> dict[str, Any]:
    """Options of a typer.Option that takes one of ``known``, or of ``more``, or several if it may be given again."""
    choices = (*more, *known)

    def check(context: typer.Context, value: Any) -> Any:
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not context.resilient_parsing:
                _refusing(lambda one=one: require_known("", one, choices, _HINTS.get(known, "")))
        return value

    return {"autocompletion": completer(choices), "callback": check}


def completer(known: Iterable[str]) -> Callable[[str], list[str]]:
    """What the shell offers behind an option."""
    offered = tuple(known)
    return lambda incomplete: [name for name in offered if name.startswith(incomplete)]


def whole(low: int, high: int | None = None) -> dict[str, Any]:
    """Options of a typer.Option that takes a whole number from ``low`` on, up to ``high`` where there is an end."""
    range_ = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str | int) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise typer.BadParameter(f"expected {range_}, got {_short(text)}.")
        return value

    return {"parser": parse, "metavar": "N"}


def positive(metavar: str = "X") -> dict[str, Any]:
    """Options of a typer.Option that takes a finite number above 0."""

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise typer.BadParameter(f"expected a finite number above 0, got {_short(text)}.")
        return value

    return {"parser": parse, "metavar": metavar}


def _short(text: object) -> str:
    """What was typed, unless it goes on and on."""
    return repr(text) if len(repr(text)) <= 80 else f"{str(text)[:60]!r}... ({len(str(text))} characters)"


def _format_pair(context: typer.Context, value: str) -> str:
    if not context.resilient_parsing:
        for one in value.split(","):
            _refusing(lambda one=one: require_known("", one, names.FORMATS, _HINTS[names.FORMATS]))
        if value.count(",") > 1:
            raise typer.BadParameter(f"expected MAIN or MAIN,INDEXER, got {value!r}.")
    return value


def _complete_pair(incomplete: str) -> list[str]:
    main, comma, indexer = incomplete.partition(",")
    offer = completer(names.FORMATS)
    return [f"{main}{comma}{name}" for name in offer(indexer)] if comma else offer(main)


def _model(context: typer.Context, value: str) -> str:
    """A preset, or what looks like a path: whether something is there is for the one who opens it."""
    path = Path(value)
    if not context.resilient_parsing and not (path.exists() or path.suffix == ".json" or len(path.parts) > 1):
        hint = "or name a model's folder or config.json"
        _refusing(lambda: require_known("", value, names.MODELS, hint))
    return value


def _refusing(check: Callable[[], object]) -> None:
    """Whatever ``check`` does not like, in typer's words, which name the option."""
    try:
        check()
    except KvCondenseError as error:
        hint = f" ({error.hint})" if error.hint else ""
        raise typer.BadParameter(f"expected {error.expected}, got {error.got}{hint}.") from None


Model = Annotated[
    str,
    typer.Option(
        metavar="NAME|PATH",
        help="Preset (demo, flash, pro, v41), or a model's folder or config.json.",
        autocompletion=completer(names.MODELS),
        callback=_model,
    ),
]
FormatPair = Annotated[
    str,
    typer.Option(
        metavar="MAIN[,INDEXER]",
        help="Cache formats (kvcondense info --formats).",
        autocompletion=_complete_pair,
        callback=_format_pair,
    ),
]
MOST_PAGE_TOKENS = 1 << 20
PageTokens = Annotated[int, typer.Option(help="Tokens per cache page.", **whole(1, MOST_PAGE_TOKENS))]
IndexerFormat = Annotated[
    str | None,
    typer.Option(help="Cache format of the indexer's rows (default: --format, which must fit).",
                 **one_of(names.FORMATS)),
]  # fmt: skip
FilePageTokens = Annotated[
    int, typer.Option(help="Tokens per page, of formats that have pages.", **whole(1, MOST_PAGE_TOKENS))
]
TensorScale = Annotated[float | None, typer.Option(help="The scale of fp8_tensor.", **positive())]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="Compare what is read with its digests. --no-verify skips those of the tensors, not the header's.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict/--saturate", help="Refuse values that the format cannot hold, or saturate them.")
]
AdapterName = Annotated[
    str,
    typer.Option(
        help="module:factory, a module with a BACKEND, cpu or reference[:ring|paged|online], or mutant:NAME.",
        autocompletion=completer(names.ADAPTERS),
    ),
]
ExecCommand = Annotated[
    str | None,
    typer.Option("--exec", metavar="COMMAND", help="The adapter is this program, in any language (see the docs)."),
]
Timeout = Annotated[
    float, typer.Option(help="Seconds that the program of --exec may take to answer.", **positive("SECONDS"))
]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.", **whole(0, (1 << 32) - 1))]
Jobs = Annotated[int | None, typer.Option(help="Processes that compile. Default: one per processor.", **whole(1, 4096))]
