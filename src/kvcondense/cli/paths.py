"""Which options name files: what is read is there, what is written can be, and nobody writes over what is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcondense import files
from kvcondense.cli import names
from kvcondense.config import config_of
from kvcondense.errors import UnsupportedError

ReportFile = Annotated[
    Path | None, typer.Option("--report", metavar="FILE.html", help="Write a page of tables and plots to FILE.html.")
]


@dataclass(frozen=True)
class Written:
    """A file that a command writes: how its name may end, and the package that is needed."""

    suffixes: tuple[str, ...] = ()
    package: str = ""


WRITTEN = {
    "json_file": Written(),
    "out": Written(),
    "junit_file": Written((".xml",)),
    "trace_file": Written(),
    "page_file": Written(),
    "tour": Written(),
    "plot": Written((".png", ".svg", ".pdf"), "matplotlib"),
    "report_file": Written((".html", ".htm"), "matplotlib"),
}
READ = ("hidden", "source", "replay", "from_file", "measured")
FOLDERS = ("checkpoint",)
PLACES = ("folder", "outputs", "against")
"""Folders that their commands look at themselves: ``require_folder``."""


def check(options: Mapping[str, Any], typed: Mapping[str, str]) -> None:
    """Raise, before any work, for a file that is missing, cannot be written, or is both read and written.

    options: a command's, by parameter; typed: what a person types for each.
    """
    for name in READ:
        if options.get(name) is not None:
            files.require_file(options[name], "a file", typed[name])
    for name in FOLDERS:
        folder = options.get(name)
        if folder is not None and not folder.is_dir():
            got = f"{folder} ({'a file' if folder.exists() else 'no such folder'})"
            hint = f"{folder.parent} has it" if folder.name == "config.json" and folder.exists() else ""
            raise UnsupportedError(typed[name], "a model's folder", got, hint)
    if "model" in options and options["model"] not in names.MODELS:
        path = Path(options["model"])
        if path.is_dir() and config_of(path) is None:
            raise UnsupportedError(typed["model"], "a folder with a config.json", f"{path}, without one")
        files.require_file(config_of(path) or path, "a model's config.json", typed["model"])
    read, written = list(_read(options, typed)), {}
    for name, kind in WRITTEN.items():
        path = options.get(name)
        if path is None or (name == "json_file" and str(path) == "-"):
            continue
        _writable(typed[name], path, kind)
        if path.exists() and not path.is_file():
            continue  # /dev/null may be named more than once
        for option, other in (*read, *written.items()):
            if files.same(path, other):
                does = "writes" if option in written else "reads"
                raise UnsupportedError(typed[name], f"another file than {option} {does}", path)
        written[typed[name]] = path


def require_folder(option: str, folder: Path) -> None:
    """Raise unless files can be written into ``folder``, which need not be there yet."""
    if folder.exists() and not folder.is_dir():
        raise UnsupportedError(option, "a folder", f"{folder}, which is a file")
    reason = files.why_not_written(folder / "summary.md" if folder.exists() else folder)
    if reason is not None:
        raise UnsupportedError(option, "a folder that can be written", f"{folder} ({reason})")


def require_package(option: str, package: str, extra: str) -> None:
    """Raise unless ``package`` can be imported; ``extra``: what of kvcondense to install for it."""
    try:
        import_module(package)
    except ImportError as error:
        wanted = f"{package} (pip install 'kvcondense[{extra}]')"
        raise UnsupportedError(option, wanted, "not installed" if error.name == package else error) from None


def _writable(option: str, path: Path, kind: Written) -> None:
    if kind.suffixes and path.suffix not in kind.suffixes:
        raise UnsupportedError(option, f"a file that ends in {' or '.join(kind.suffixes)}", path)
    if str(path) == "-":
        raise UnsupportedError(option, "a file (--json alone takes - for standard output)", path)
    reason = files.why_not_written(path)
    if reason is not None:
        raise UnsupportedError(option, "a file that can be written", f"{path} ({reason})")
    if kind.package:
        require_package(option, kind.package, "bench")


def _read(options: Mapping[str, Any], typed: Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    """Every file that a command reads, with the option that says so."""
    for name in READ:
        if options.get(name) is not None:
            yield typed[name], options[name]
    for text in options.get("peer_file") or ():
        yield typed["peer_file"], Path(text.partition("=")[2])
    for name in ("model", *FOLDERS):
        path = options.get(name)
        if path in names.MODELS:
            continue
        if path is not None and Path(path).is_dir():
            for file in _of_model(Path(path)):
                yield typed[name], file
        elif path is not None:
            yield typed[name], Path(path)


def _of_model(folder: Path) -> list[Path]:
    """What is read of a model's folder; results may lie beside it."""
    tensors = sorted(folder.glob("*.safetensors"))
    read = tensors if len(tensors) == 1 else [t for t in tensors if t.name.startswith("model")]
    return [config_of(folder) or folder / "config.json", folder / "model.safetensors.index.json", *read]
