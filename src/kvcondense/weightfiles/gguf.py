"""GGUF files: a bounded reader of their headers, and tensors through the ``gguf`` package's dequantisation."""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from kvcondense.errors import CheckpointError, UnsupportedError
from kvcondense.files import require_file

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of metadata, by its type (ggml-org/ggml, docs/gguf.md); 8 is a string, 9 an array."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = 32
_MAX_DIMS = 4
_MAX_TENSORS = 1 << 20
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


@dataclass(frozen=True)
class Entry:
    """A tensor in a GGUF file: shape with rows first (the file has them last), type, place of its bytes."""

    shape: tuple[int, ...]
    dtype: str
    offset: int
    bytes: int


def package() -> Any:
    """The ``gguf`` package; raises UnsupportedError without it."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UnsupportedError(
            "a .gguf file", "the gguf package", "none installed", "pip install 'kvcondense[gguf]'"
        ) from error


def header(path: Path) -> dict[str, Entry]:
    """Tensor name -> entry.

    Every count and size is checked against the file before it is used. Raises CheckpointError for what is no GGUF file
    of version 2 or 3, cut short, or of an unknown type, UnsupportedError without the ``gguf`` package.
    """
    status = require_file(path, "a GGUF file").stat()
    return _header(path, status.st_mtime_ns, status.st_size)


def read(path: Path, name: str) -> torch.Tensor:
    """F16, F32, F64 and BF16 as they are; any other type through ``gguf.quants.dequantize``, to fp32.

    Raises UnsupportedError when the package cannot dequantise the type.
    """
    entry = header(path)[name]
    with path.open("rb") as file:
        file.seek(entry.offset)
        data = np.frombuffer(bytearray(file.read(entry.bytes)), np.uint8)
    if data.size != entry.bytes:
        raise CheckpointError(f"{path} {name}", f"{entry.bytes} bytes", data.size)
    if entry.dtype == "BF16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).reshape(entry.shape)
    if entry.dtype in _PLAIN:
        return torch.from_numpy(data.view(_PLAIN[entry.dtype])).reshape(entry.shape)
    gguf = package()
    kind = gguf.GGMLQuantizationType[entry.dtype]
    try:
        with np.errstate(all="ignore"):  # scales may be NaN or infinite: whoever reads the rows looks for that
            rows = gguf.quants.dequantize(data.reshape(*entry.shape[:-1], -1), kind)
    except NotImplementedError as error:
        raise UnsupportedError(name, "a type that the gguf package dequantises", entry.dtype) from error
    return torch.from_numpy(np.ascontiguousarray(rows, np.float32)).reshape(entry.shape)


class _Reader:
    """Integers and strings from the front of a file, never past its end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def bytes(self, count: int) -> bytes:
        self.check(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self.check(count)
        self.file.seek(count, 1)

    def check(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise CheckpointError(str(self.path), "a whole GGUF file", f"one cut short, of {self.size} bytes")

    def number(self, count: int) -> int:
        return int.from_bytes(self.bytes(count), "little")

    def string(self) -> str:
        return self.bytes(self.number(8)).decode("utf-8", "replace")

    def value(self) -> int | None:
        """The next value of metadata; only one of type uint32 is kept."""
        kind = self.number(4)
        if kind == _UINT32:
            return self.number(4)
        if kind == _STRING:
            self.skip(self.number(8))
        elif kind == _ARRAY:
            kind, count = self.number(4), self.number(8)
            if kind == _STRING:
                self.check(8 * count)
                for _ in range(count):
                    self.skip(self.number(8))
            else:
                self.skip(count * self.size_of(kind))
        else:
            self.skip(self.size_of(kind))
        return None

    def size_of(self, kind: int) -> int:
        if kind not in _SIZES:
            raise CheckpointError(str(self.path), "values of known types in its metadata", f"type {kind}")
        return _SIZES[kind]


@functools.lru_cache(maxsize=16)
def _header(path: Path, changed: int, size: int) -> dict[str, Entry]:  # noqa: ARG001 - changed is part of the key
    gguf = package()
    with path.open("rb") as file:
        reader = _Reader(file, path, size)
        if reader.bytes(4) != b"GGUF":
            raise CheckpointError(str(path), "a GGUF file", "another one")
        version = reader.number(4)
        if version not in (2, 3):
            raise CheckpointError(str(path), "GGUF of version 2 or 3, little-endian", f"version {version}")
        tensors, values = reader.number(8), reader.number(8)
        reader.check(24 * tensors + 12 * values)
        if tensors > _MAX_TENSORS:
            raise CheckpointError(str(path), f"at most {_MAX_TENSORS} tensors", tensors)
        alignment = _ALIGNMENT
        for _ in range(values):
            key, value = reader.string(), reader.value()
            if key == "general.alignment":
                alignment = value or 0
        if alignment < 8 or alignment & (alignment - 1):
            raise CheckpointError(f"{path} general.alignment", "a power of two from 8", alignment)
        listed = [_tensor(reader, gguf) for _ in range(tensors)]
        start = -(-file.tell() // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, shape, dtype, offset, count in listed:
        if name in entries:
            raise CheckpointError(f"{path} {name}", "one tensor of this name", "two")
        if start + offset + count > size:
            raise CheckpointError(f"{path} {name}", f"a file of {start + offset + count} bytes", f"{size} bytes")
        entries[name] = Entry(shape, dtype, start + offset, count)
    return entries


def _tensor(reader: _Reader, gguf: Any) -> tuple[str, tuple[int, ...], str, int, int]:
    name, dims = reader.string(), reader.number(4)
    if not 1 <= dims <= _MAX_DIMS:
        raise CheckpointError(f"{reader.path} {name}", f"1 to {_MAX_DIMS} dimensions", dims)
    shape = tuple(reader.number(8) for _ in range(dims))[::-1]
    code, offset = reader.number(4), reader.number(8)
    try:
        kind = gguf.GGMLQuantizationType(code)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{reader.path} {name}", "a type that the gguf package knows", f"type {code}") from error
    if shape[-1] % block:
        raise CheckpointError(f"{reader.path} {name}", f"rows of whole blocks of {block}", f"shape {list(shape)}")
    return name, shape, kind.name, offset, math.prod(shape) // block * size
