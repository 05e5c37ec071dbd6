"""The way every command runs: its files and packages are looked at before any work, and it ends in one of five ways.

A command is declared in a module of its own, options and help, and imports no torch; its work, the function ``run`` of
the module of that name in ``kvcondense.cli.work``, is imported when it is wanted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, NoReturn, get_type_hints

import typer
import typer.models
from typer.core import TyperCommand

from kvcondense.cli import paths, voids
from kvcondense.cli.output import Output, fit, width
from kvcondense.errors import IntegrityWarning, KvCondenseError

HOLDS, DOES_NOT_HOLD, NOT_ASKED, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141
_ALIASES = {
    "impl": ("backend",),
    "indexer_format": ("format",),
    "config": ("model", "preset", "checkpoint"),
    "hidden states": ("hidden",),
}
"""What the library calls what an option of another name says."""
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
# What torch says in a RuntimeError.
_MEMORY = ("allocate memory", "out of memory", "overflow")


def add(
    app: typer.Typer,
    declared: Callable[..., None],
    example: str,
    fails: str = "",
    void: Iterable[voids.Void] = (),
) -> None:
    """Make a command of a declaration.

    fails: what exit status 1 means, if there is anything that may not hold; void: options that others make void.
    """
    holds = f"0: {'it holds' if fails else 'done'}; {f'1: {fails}; ' if fails else ''}2: it could not be asked"
    app.command(
        declared.__name__,
        short_help=summary(declared),
        epilog=f"{example}\n\nExit status {holds}; 130: interrupted.",
        cls=_asking(void, options_of(declared)),
    )(_through(declared))


def summary(declared: Callable[..., None]) -> str:
    """The first paragraph of a declaration's docstring, whole: what the list of commands says."""
    return " ".join((inspect.getdoc(declared) or "").partition("\n\n")[0].split())


def options_of(declared: Callable[..., None]) -> dict[str, str]:
    """Parameters of a declaration -> what a person types for each: the option's name, or an argument's."""
    typed = {}
    for name, hint in get_type_hints(declared, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, typer.models.ParameterInfo):
                # Of the names that stand in an Annotated, typer takes the first for a default, at first.
                given = [d.partition("/")[0] for d in (info.default, *(info.param_decls or ())) if isinstance(d, str)]
                option = not isinstance(info, typer.models.ArgumentInfo)
                typed[name] = given[0] if given else "--" + name.replace("_", "-") if option else name.upper()
    return typed


def _asking(void: Iterable[voids.Void], typed: Mapping[str, str]) -> type[TyperCommand]:
    """Commands that ask first whether all that was typed means something: afterwards a default looks the same."""

    class Asking(TyperCommand):
        def invoke(self, ctx: Any) -> Any:
            with ending(typed):
                voids.check(void, ctx, typed)
            return super().invoke(ctx)

    return Asking


def _through(declared: Callable[..., None]) -> Callable[..., None]:
    work = f"kvcondense.cli.work.{declared.__name__}"
    typed = options_of(declared)

    @functools.wraps(declared)
    def run(**options: Any) -> None:
        with ending(typed), warnings.catch_warnings():
            warnings.showwarning = _note
            warnings.simplefilter("always", IntegrityWarning)
            paths.check(options, typed)
            output = Output(options.pop("json_file"), quiet=options.pop("quiet"))
            holds = import_module(work).run(output, **options)
            sys.stdout.flush()
        raise typer.Exit(HOLDS if holds in (True, None) else DOES_NOT_HOLD)

    return run


@contextlib.contextmanager
def ending(typed: Mapping[str, str]) -> Iterator[None]:
    """Turn what a command may raise into one line and an exit status; ``typed``: what errors' arguments are called."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except KvCondenseError as error:
        _stop(_as_typed(error, typed))
    except KeyboardInterrupt:
        _stop("interrupted", INTERRUPTED)
    except BrokenPipeError:  # whoever read standard output has seen enough
        _leave_stdout()
        raise typer.Exit(UNREAD) from None
    except OSError as error:
        where = error.filename or ("standard output" if error.errno in _FULL else "the system")
        if error.filename is None:
            _leave_stdout()
        _stop(f"{where}: {error.strerror or error}")
    except ImportError as error:
        _stop(f"{error.name or 'a package'}: it cannot be imported ({error}); is it installed?")
    except (MemoryError, OverflowError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(part in str(error) for part in _MEMORY):
            _fault()
        _stop("this is more than memory or a number can hold: ask for less (batch, tokens, rows, processes)")
    except Exception:
        _fault()


def _note(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """A warning of this library's as a line of its own; others as Python shows them."""
    if issubclass(category, IntegrityWarning):
        typer.echo(fit(f"note: {message}", width()), err=True)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


def _as_typed(error: KvCondenseError, typed: Mapping[str, str]) -> str:
    known = (error.argument, *_ALIASES.get(error.argument, ()))
    name = next((typed[one] for one in known if one in typed), error.argument)
    hint = f" ({error.hint})" if error.hint else ""
    return f"{name}: expected {error.expected}, got {error.got}{hint}"


def _stop(message: str, status: int = NOT_ASKED) -> NoReturn:
    text = message if status == INTERRUPTED else f"error: {message}"
    typer.echo(fit(text, width()), err=True)
    raise typer.Exit(status) from None


def _fault() -> NoReturn:
    """An error that nobody foresaw is told whole, and never passes for a check that does not hold."""
    traceback.print_exc()
    _stop("this is a fault of kvcondense or of a package that it uses; please report it with the lines above")


def _leave_stdout() -> None:
    """Standard output cannot be written: what is left in its buffer goes nowhere, without another error at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
