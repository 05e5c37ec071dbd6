"""The compressors of a model directory, one by one: what headers say of each, and its weights when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcondense.config import ModelConfig
from kvcondense.errors import CheckpointError
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights, find_names, has_names, open_safetensors, read_compressor, tensor_files


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header has it; dtype in safetensors' spelling (BF16, F32, F8_E4M3 ...)."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class StoredCompressor:
    """One compressor of a checkpoint. tensors: wkv, wgate, ape, norm as far as it has them; mtp: which MTP layer."""

    layer: int
    part: str
    spec: CompressorSpec
    hidden_size: int
    tensors: dict[str, StoredTensor]
    mtp: int | None = None

    @property
    def bytes(self) -> int:
        """Of all its tensors."""
        return sum(t.bytes for t in self.tensors.values())

    def load(self, device: torch.device | str = "cpu") -> CompressorWeights:
        """Its weights; raises CheckpointError as ``CompressorWeights.load`` does."""
        files = {t.name: t.file for t in self.tensors.values()}
        return read_compressor(files, self.spec, self.layer, self.hidden_size, self.part, device, self.mtp)


def compressors(directory: str | Path, config: ModelConfig | None = None) -> Iterator[StoredCompressor]:
    """Every compressor of a directory of safetensors files (sharded or not), by layer, main before indexer.

    Those of MTP layers come last, as far as they are there: a list of ratios may go on for layers that are not.

    Official or transformers names; ``config`` defaults to the directory's config.json. The index is read once, of every
    compressor its tensors' headers, and no tensor. Raises CheckpointError, that names it, when a tensor is missing.
    """
    directory = Path(directory)
    if config is None:
        config = ModelConfig.from_json(directory)
    files = tensor_files(directory)
    for layer in (*config.compressor_layers, *config.mtp_compressor_layers):
        mtp, parts = config.mtp_index(layer), CompressorSpec.parts_of_layer(config, layer)
        if mtp is not None and not any(has_names(files, layer, part, mtp) for part in parts):
            continue
        for part in parts:
            spec = CompressorSpec.for_layer(config, layer, part)
            names = find_names(files, spec, layer, part, mtp)
            tensors = {ours: _header(files[name], name) for ours, name in names.items()}
            yield StoredCompressor(layer, part, spec, config.hidden_size, tensors, mtp)


def _header(path: Path, name: str) -> StoredTensor:
    with open_safetensors(path) as handle:
        if name not in handle.keys():  # noqa: SIM118 - a handle is no dict
            raise CheckpointError(name, f"to be in {path}", "a missing tensor")
        part = handle.get_slice(name)
        shape, dtype = tuple(part.get_shape()), str(part.get_dtype())
    count = 1
    for size in shape:
        count *= size
    return StoredTensor(name, path, shape, dtype, count * _bits(dtype) // 8)


def _bits(dtype: str) -> int:
    """Bits of an element: what safetensors' names of types say first (BF16, F8_E4M3, I64)."""
    digits = "".join(c for c in dtype.partition("_")[0] if c.isdigit())
    return int(digits) if digits else 8  # BOOL
