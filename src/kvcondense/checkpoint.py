"""The compressors of a model directory, one by one: what headers say of each, and its weights when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcondense.config import ModelConfig
from kvcondense.spec import CompressorSpec
from kvcondense.weightfiles.files import StoredTensor, header, tensor_files
from kvcondense.weightfiles.names import MATRICES, Names
from kvcondense.weightfiles.settings import Settings
from kvcondense.weightfiles.storage import storage_of
from kvcondense.weights import CompressorWeights, matrix_shape, read_compressor


@dataclass(frozen=True)
class StoredCompressor:
    """One compressor of a checkpoint.

    tensors: wkv, wgate (or wkv_wgate), ape, norm as far as it has them, and what stands beside a matrix
    (``wkv.scale``); mtp: which MTP layer; scheme and prefix: of the names; storage: how the matrices are stored.
    """

    layer: int
    part: str
    spec: CompressorSpec
    hidden_size: int
    tensors: dict[str, StoredTensor]
    mtp: int | None = None
    scheme: str = ""
    prefix: str = ""
    storage: str = ""

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

    Names and storage: as ``CompressorWeights.load`` takes them; ``config`` defaults to the directory's config.json. The
    index is read once, of every compressor its tensors' headers, and no tensor. Raises CheckpointError, that names it,
    when a tensor is missing, has a wrong shape or type, or no scale where it needs one.
    """
    directory = Path(directory)
    if config is None:
        config = ModelConfig.from_json(directory)
    files = tensor_files(directory)
    names = Names(files)
    settings = Settings.of(directory)
    for layer in (*config.compressor_layers, *config.mtp_compressor_layers):
        mtp, parts = config.mtp_index(layer), CompressorSpec.parts_of_layer(config, layer)
        if mtp is not None and not any(names.has(layer, part, mtp) for part in parts):
            continue
        for part in parts:
            spec = CompressorSpec.for_layer(config, layer, part)
            found = names.find(spec, layer, part, mtp)
            tensors = {role: header(files[name], name) for role, name in found.tensors.items()}
            stored = [
                storage_of(tensors, role, matrix_shape(spec, role, config.hidden_size), settings).text
                for role in MATRICES
                if role in tensors
            ]
            yield StoredCompressor(
                layer=layer,
                part=part,
                spec=spec,
                hidden_size=config.hidden_size,
                tensors=tensors,
                mtp=mtp,
                scheme=found.scheme,
                prefix=found.prefix,
                storage=" and ".join(dict.fromkeys(stored)),
            )
