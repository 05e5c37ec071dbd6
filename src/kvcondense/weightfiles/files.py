"""Which file has which tensor, what its header says of it, and its bytes: safetensors and GGUF, never pickle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcondense.errors import CheckpointError
from kvcondense.files import read_bytes, require_file
from kvcondense.files.schema import decoded
from kvcondense.files.tensors import TensorFile
from kvcondense.weightfiles import gguf

_MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header has it; dtype in safetensors' spelling (BF16, F8_E4M3 ...) or GGUF's (Q8_0)."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    bytes: int


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, of a model's folder or of one .gguf file.

    In a folder, the first that is there: model.safetensors.index.json, model.safetensors, all .gguf files (a model may
    be split), or the only safetensors file. Raises CheckpointError when there is nothing of the kind.
    """
    if directory.suffix == ".gguf":
        return dict.fromkeys(gguf.header(require_file(directory, "a GGUF file")), directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return _of_index(index)
    # Results and hidden states may lie in the same folder: the conventional name comes first.
    model = directory / "model.safetensors"
    ggufs = [] if model.is_file() else sorted(directory.glob("*.gguf"))
    if ggufs:
        return _of_ggufs(ggufs)
    single = [model] if model.is_file() else sorted(directory.glob("*.safetensors"))
    if len(single) != 1:
        raise CheckpointError(
            str(directory),
            "model.safetensors.index.json, model.safetensors, one .safetensors file or .gguf files",
            f"{len(single)} files",
        )
    with TensorFile(single[0]) as file:
        return dict.fromkeys(file.names, single[0])


@dataclass
class _Index:
    weight_map: dict[str, str]


def _of_index(index: Path) -> dict[str, Path]:
    data = read_bytes(index, "an index of safetensors files", _MAX_INDEX_BYTES)
    entries = decoded(data, _Index, str(index)).weight_map
    for name, file in entries.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} entry {name!r}", "a safetensors file of the same folder", file)
    return {name: index.parent / file for name, file in entries.items()}


def _of_ggufs(paths: list[Path]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in paths:
        for name in gguf.header(path):
            if name in files:
                raise CheckpointError(f"{path} {name}", "one GGUF model in a folder", f"it in {files[name].name}, too")
            files[name] = path
    return files


def header(path: Path, name: str) -> StoredTensor:
    """What the file says of a tensor, without reading it."""
    if path.suffix == ".gguf":
        entry = gguf.header(path).get(name)
        if entry is None:
            raise CheckpointError(name, f"to be in {path}", "a missing tensor")
        return StoredTensor(name, path, entry.shape, entry.dtype, entry.bytes)
    with TensorFile(path) as file:
        shape, dtype = file.shape(name), file.dtype(name)
    return StoredTensor(name, path, shape, dtype, math.prod(shape) * bits(dtype) // 8)


def read(tensor: StoredTensor) -> torch.Tensor:
    """The tensor, on the CPU. A quantised type of GGUF becomes fp32; every other type is what it is in the file."""
    if tensor.file.suffix == ".gguf":
        return gguf.read(tensor.file, tensor.name)
    with TensorFile(tensor.file) as file:
        return file.read(tensor.name)


def bits(dtype: str) -> int:
    """Bits of an element: what safetensors' names of types say first (BF16, F8_E4M3, I64)."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(digits) if digits else 8  # BOOL
