"""The work of ``kvcondense vectors``: write, play, check, and the table of mutants."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import kvcondense
from kvcondense import files
from kvcondense.cli.output import Output
from kvcondense.cli.paths import require_folder
from kvcondense.cli.work.adapters import adapter_of
from kvcondense.conformance.adapter import Factory
from kvcondense.conformance.invariants import words
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.own import BackendAdapter
from kvcondense.conformance.vectors import made, schema
from kvcondense.conformance.vectors.compared import wrong
from kvcondense.conformance.vectors.played import Tensors, outputs
from kvcondense.conformance.vectors.schema import Vector
from kvcondense.errors import CheckpointError, KvCondenseError, UnsupportedError

_CORRECT = ("ring", "paged")


def run(
    output: Output,
    *,
    action: str,
    folder: Path,
    against: Path | None,
    without: list[str] | None,
    adapter: str,
    command: str | None,
    timeout: float,
    outputs: Path | None,
) -> bool | None:
    """Whether all that was checked is right, if that was asked."""
    if action == "write":
        return _write(output, folder)
    if not folder.is_dir():
        raise UnsupportedError("FOLDER", "a folder that vectors write made", _no_folder(folder))
    if action == "mutants":
        return _mutants(output, folder)
    if action == "play":
        if outputs is None:
            raise UnsupportedError("--out", "a folder for what the adapter returns", "none")
        return _play(output, folder, outputs, adapter_of(adapter, command, timeout)[1], without or ())
    if against is None or not against.is_dir():
        got = "none" if against is None else _no_folder(against)
        raise UnsupportedError("--against", "a folder with what an implementation returned", got)
    return _check(output, folder, against, without or ())


def _write(output: Output, folder: Path) -> None:
    require_folder("FOLDER", folder)
    old = []
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "index.json").is_file():
            raise UnsupportedError("FOLDER", "an empty folder, or one of test vectors", folder)
        old = list(schema.index(folder))
    vectors = list(made.vectors())
    size = schema.write(folder, vectors, f"kvcondense {kvcondense.__version__}")
    for name in {*old} - {vector.name for vector, _ in vectors}:
        for suffix in ("json", "safetensors"):
            (folder / f"{name}.{suffix}").unlink(missing_ok=True)
    output.say(f"{len(vectors)} vectors, {size / 1e6:.1f} MB, written to {folder}")
    output.finish({"vectors": len(vectors), "bytes": size, "schema": schema.SCHEMA})


def _no_folder(path: Path) -> str:
    return f"{path} ({'a file' if path.exists() else files.absent(path, 'folder')})"


def _index(folder: Path) -> dict[str, schema.Entry]:
    """Every vector of a folder that has some: nothing is right because nothing was looked at."""
    index = schema.index(folder)
    if not index:
        raise CheckpointError("index.json vectors", "one at least", f"none in {folder}")
    return index


def _read(
    folder: Path, index: dict[str, schema.Entry], without: Collection[str]
) -> Iterator[tuple[str, Vector, Tensors | None]]:
    """Every vector, and what must come out of it: None if it is left out. Raises, in the end, if all of them were.

    Without exact bits, everything else is asked all the same.
    """
    asked, left_out = 0, {*without} - {"exact"}
    for name, entry in index.items():
        vector, expected = schema.read(folder, name, entry)
        left = {word for need in vector.needs for word in need.split()} & left_out
        asked += not left
        yield name, vector, None if left else expected
    if not asked:
        got = f"{', '.join(without)}: each of the {len(index)} vectors needs one of them"
        raise UnsupportedError("--without", "needs that leave a vector to compare", got)


def _play(output: Output, folder: Path, out: Path, make: Factory, without: Collection[str]) -> bool:
    require_folder("--out", out)
    if out.exists() and out.samefile(folder):
        raise UnsupportedError("--out", "another folder than that of the vectors", out)
    index, played, failed = _index(folder), 0, 0
    count = len(index)
    for name, vector, expected in output.track(_read(folder, index, without), count, "vectors"):
        if expected is None:
            continue
        out.mkdir(exist_ok=True)
        try:
            schema.save_outputs(out / f"{name}.safetensors", outputs(vector, expected, make))
            played += 1
        except (Exception, SystemExit) as error:  # whatever an adapter raises: there is no output, and check says so
            failed += 1
            output.say(f"FAIL  {name}  {type(error).__name__}: {words(error)}")
    output.say(f"{played} of {count} vectors played, {failed} failed; outputs in {out}")
    output.finish({"played": played, "failed": failed, "vectors": count})
    return not failed


def _check(output: Output, folder: Path, against: Path, without: Collection[str]) -> bool:
    counts: dict[str, dict[str, int]] = {}
    found: dict[str, list[str]] = {}
    left: dict[str, list[str]] = {}
    for name, vector, expected in _read(folder, _index(folder), without):
        count = counts.setdefault(vector.invariant, {"right": 0, "wrong": 0, "left out": 0})
        if expected is None:
            count["left out"] += 1
            left[name] = vector.needs
            continue
        problems = _against(vector, expected, against / f"{name}.safetensors", without)
        count["wrong" if problems else "right"] += 1
        if problems:
            found[name] = problems
            output.say(f"FAIL  {name} ({vector.bug_class}): {problems[0]}")
    rows = [(name, c["right"], c["wrong"], c["left out"]) for name, c in counts.items()]
    output.table(("invariant", "right", "wrong", "left out"), rows)
    right = sum(c["right"] for c in counts.values())
    output.say(f"{right} of {right + len(found)} vectors are right, {len(left)} are left out")
    report: dict[str, Any] = {"right": right, "wrong": found, "left_out": left, "without": list(without)}
    output.finish(report)
    return not found


def _against(vector: Vector, expected: Tensors, path: Path, without: Collection[str]) -> list[str]:
    if path.is_symlink() and not path.exists():
        return [f"{path} is {files.absent(path)}"]
    if not path.exists():
        return [f"{path} is missing (needs {', '.join(vector.needs) or 'nothing'})"]
    try:
        return wrong(vector, expected, schema.tensors(path), without)
    except KvCondenseError as error:
        return [str(error)]


def _mutants(output: Output, folder: Path) -> bool:
    by_invariant: dict[str, int] = {}
    numbered = []
    for name, entry in _index(folder).items():
        by_invariant[entry.invariant] = number = by_invariant.get(entry.invariant, -1) + 1
        numbered.append((number, schema.read(folder, name, entry)))
    # One of each invariant, then the next of each: what is wrong shows early.
    vectors = [vector for _, vector in sorted(numbered, key=lambda pair: pair[0])]
    caught: dict[str, str | None] = {}
    output.say(f"{'wrong compressor':<26} {'caught by vector':<36} {'class':<22} what is wrong with it")
    for name, mutant in MUTANTS.items():
        caught[name] = _first(vectors, lambda m=mutant: BackendAdapter(m, m.kind))
        told = caught[name] or "SURVIVED"
        output.say(f"{name:<26} {told:<36} {mutant.bug_class:<22} {mutant.bug}")
    correct = {kind: _first(vectors, lambda kind=kind: BackendAdapter("reference", kind)) for kind in _CORRECT}
    for kind, by in correct.items():
        output.say(f"{f'reference:{kind}':<26} {f'WRONGLY CAUGHT by {by}' if by else 'passes'}")
    alive = [name for name, by in caught.items() if by is None]
    output.say(f"{len(caught) - len(alive)} of {len(caught)} caught")
    output.finish({"mutants": caught, "correct": correct})
    return not alive and not any(correct.values())


def _first(vectors: list[tuple[Vector, Tensors]], make: Factory) -> str | None:
    """The first vector whose output is wrong; one that cannot be played says nothing."""
    for vector, expected in vectors:
        try:
            got = outputs(vector, expected, make)
        except UnsupportedError:
            continue
        if wrong(vector, expected, got):
            return vector.name
    return None
