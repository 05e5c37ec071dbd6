"""A test vector: what is to be done, in JSON, and what must come out, in safetensors. Read with bounds, written whole.

``Vector`` and ``Op`` are the schema: their fields are the entries of the JSON file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvcondense import files
from kvcondense.conformance import cases
from kvcondense.conformance.vectors import bounds, text
from kvcondense.errors import CheckpointError
from kvcondense.files.reading import parsed
from kvcondense.files.schema import known, typed
from kvcondense.files.tensors import TensorFile, told

SCHEMA = 1
"""Of the folder. Any change that a reader could stumble over makes it one more."""
JUNK = tuple(cases.JUNK)
"""By the number in ``Op.pieces``: what every channel of such tokens is."""
_MAX_JSON = 4 << 20
_MAX_TENSOR = 1 << 28


@dataclass
class Op:
    """One thing to do; entries that do not belong to its kind are absent.

    ``step``: tokens ``pieces`` [stream, first, count, junk] one after the other (junk 0: values of the generator, count
    tokens from token ``first`` of the stream on; else every channel is NaN (1), infinity (2), 1e4 (3)). Request q owns
    tokens query_start_loc[q] .. query_start_loc[q + 1] - 1, its first one at start_positions[q], the last draft_rows[q]
    may be rejected, its state is at state_slots[q] (-1: nobody's, nothing may happen). Later tokens belong to nobody.
    slot_mapping [T], for all tokens: the cache row of the window that ends with a token, or -1. block_table: pages of
    each request's windows, from page first_page on, for who addresses rows so; absent where slot_mapping says something
    else.
    ``refuse``: a step that must be refused, and change nothing; ``why`` says what is wrong with it.
    ``begin``: a request without history begins at ``position`` (a window boundary) in ``slot``: what its first row
    reads of the window before has no weight, as if its scores were minus infinity.
    ``copy``: the state of the request at ``position`` goes from state slot ``slot`` to ``to``, which goes on with it.
    ``reset``: ``slot`` is to be cleaned, or filled with anything: it gets a new owner.
    """

    op: str
    pieces: list[list[int]] | None = None
    query_start_loc: list[int] | None = None
    start_positions: list[int] | None = None
    draft_rows: list[int] | None = None
    state_slots: list[int] | None = None
    slot_mapping: list[int] | None = None
    first_page: int | None = None
    block_table: list[list[int]] | None = None
    why: str | None = None
    slot: int | None = None
    to: int | None = None
    position: int | None = None


@dataclass
class Vector:
    """What is to be done.

    needs: what an implementation must be able to do. compressor: the fields of ``CompressorSpec``; format, page_rows,
    num_pages: the cache, full of bytes 0xA5 before anything is done; num_slots, max_draft, max_positions: the state.
    seed, scale: of the generator; tokens are its values times scale (in fp32, which scale is rounded to), ape half of
    that, the norm's weight 1 + value / 4.
    pattern: tokens of stream 2 + q are all row q of tensor ``pattern`` [R, head_dim], for kv in both halves if windows
    overlap, with scores 0; the norm's weight is tensor ``norm``. ops: in order, ``repeat`` times from the start. read:
    cache slots to return as ``rows``. equal: pairs of them that must be equal to the bit. min_equal: share of elements
    of ``rows`` that must equal the expected bf16 ones to the bit; four may always differ. untouched: slots that must
    still hold 0xA5. exact: rows must equal the expected bytes.
    """

    name: str
    invariant: str
    promise: str
    bug_class: str
    needs: list[str]
    compressor: dict[str, Any]
    format: str
    page_rows: int
    num_pages: int
    num_slots: int
    max_draft: int
    max_positions: int
    seed: int
    scale: float
    ops: list[Op]
    read: list[int]
    equal: list[list[int]] = field(default_factory=list)
    untouched: list[int] = field(default_factory=list)
    min_equal: float = 0.0
    repeat: int = 1
    pattern: bool = False
    exact: bool = False
    tensor_scale: float | None = None
    schema: int = SCHEMA

    def to_json(self) -> str:
        """A line for each entry, and for each op; without entries that are absent."""
        entries = asdict(self)
        ops = [json.dumps({k: v for k, v in op.items() if v is not None}, sort_keys=True) for op in entries.pop("ops")]
        lines = [f'"{k}": {json.dumps(v)}' for k, v in sorted(entries.items())]
        listed = ",\n  ".join(ops)
        return "{\n" + ",\n".join([*lines, f'"ops": [\n  {listed}\n]']) + "\n}\n"

    @classmethod
    def from_json(cls, content: str, name: str) -> Vector:
        """``to_json``, out of a file; raises CheckpointError for anything else."""
        data = parsed(content, name)
        known(data, cls, name)
        for i, op in enumerate(typed(data.get("ops"), list[dict[str, Any]], f"{name} ops")):
            known(op, Op, f"{name} ops[{i}]")
        vector = typed(data, cls, name)
        if vector.schema != SCHEMA:
            raise CheckpointError(f"{name} schema", str(SCHEMA), vector.schema)
        bounds.check(vector, name)
        return vector


@dataclass
class Entry:
    """A vector in ``index.json``: the sha256 of both of its files, and what it is for."""

    json: str
    safetensors: str
    invariant: str
    bug_class: str


def write(folder: Path, made: list[tuple[Vector, dict[str, torch.Tensor]]], made_by: str) -> int:
    """Write the vectors, an index with checksums and a README into ``folder``; bytes written."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    entries, size = {}, 0
    for vector, expected in made:
        both = vector.to_json().encode(), save({k: v.contiguous() for k, v in expected.items()})
        for data, suffix in zip(both, ("json", "safetensors"), strict=True):
            files.write(folder / f"{vector.name}.{suffix}", data)
            size += len(data)
        first, second = (hashlib.sha256(data).hexdigest() for data in both)
        entries[vector.name] = asdict(Entry(first, second, vector.invariant, vector.bug_class))
    index = {"schema": SCHEMA, "made_by": made_by, "vectors": entries}
    whole = json.dumps(index, indent=1, sort_keys=True) + "\n"
    files.write(folder / "index.json", whole)
    told = f"{text.README}\n## Entries of a vector\n\n{inspect.getdoc(Vector)}\n\n## Ops\n\n{inspect.getdoc(Op)}\n"
    files.write(folder / "README.md", told)
    return size + len(whole) + len(told.encode())


def index(folder: Path) -> dict[str, Entry]:
    """What ``index.json`` lists; raises CheckpointError unless it is one."""
    content = files.read_text(folder / "index.json", "an index of test vectors", _MAX_JSON, "")
    data = typed(parsed(content, "index.json"), dict[str, Any], "index.json")
    if data.get("schema") != SCHEMA:
        raise CheckpointError("index.json schema", str(SCHEMA), data.get("schema"))
    found = typed(data.get("vectors"), dict[str, Entry], "index.json vectors")
    for name in found:
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise CheckpointError("index.json", "names of letters, digits, - and _", repr(name)[:80])
    return found


def read(folder: Path, name: str, entry: Entry) -> tuple[Vector, dict[str, torch.Tensor]]:
    """A vector and what must come out of it; raises CheckpointError if a checksum does not hold."""
    path = folder / f"{name}.json"
    both = (
        files.read_bytes(path, "a test vector", _MAX_JSON),
        files.read_bytes(path.with_suffix(".safetensors"), "a test vector", _MAX_TENSOR),
    )
    for data, expected, suffix in zip(both, (entry.json, entry.safetensors), ("json", "safetensors"), strict=True):
        if hashlib.sha256(data).hexdigest() != expected:
            raise CheckpointError(f"{name}.{suffix}", "the checksum in index.json", "another: the file has changed")
    return Vector.from_json(both[0].decode(), str(path)), tensors(path.with_suffix(".safetensors"))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.names}


def save_outputs(path: Path, outputs: dict[str, torch.Tensor]) -> None:
    """What an implementation returned for a vector."""
    from safetensors.torch import save

    with told(str(path), "room for the file"):
        files.write(path, save({k: v.contiguous() for k, v in outputs.items()}))
