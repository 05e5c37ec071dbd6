"""Learned tensors of one compressor, loaded from weight files of every published form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvcondense import forks
from kvcondense.errors import RangeError, require
from kvcondense.spec import CompressorSpec
from kvcondense.weightfiles.files import header, tensor_files
from kvcondense.weightfiles.names import MATRICES, Names
from kvcondense.weightfiles.settings import Settings
from kvcondense.weightfiles.storage import WEIGHT_DTYPES, storage_of, vector

__all__ = [
    "WEIGHT_DTYPES",
    "CompressorWeights",
    "find_names",
    "has_names",
    "read_compressor",
    "tensor_files",
]
PARTS = ("main", "indexer")


@dataclass(frozen=True)
class CompressorWeights:
    """Weights of one compressor.

    w [projected, D]: wkv stacked on wgate (wkv alone without a gate), any float dtype; None if the caller brings its
    own kv_score. ape [ratio, N] fp32 or None. norm [head_dim] fp32. Both may be fp64, too; bf16 and fp16, as engines
    keep them, are widened when this is made: a copy, which does not see what becomes of theirs.
    """

    norm: torch.Tensor
    ape: torch.Tensor | None = None
    w: torch.Tensor | None = None

    def __post_init__(self) -> None:
        forks.note()
        for name in ("norm", "ape"):
            t = getattr(self, name)
            if isinstance(t, torch.Tensor) and t.dtype in (torch.bfloat16, torch.float16):
                object.__setattr__(self, name, t.to(torch.float32))

    def __getstate__(self) -> dict[str, torch.Tensor | None]:
        """The tensors: what was found out of them here (``bound.bind``) is of no use in a copy or elsewhere."""
        return {"norm": self.norm, "ape": self.ape, "w": self.w}

    @classmethod
    def from_parts(
        cls,
        wkv: torch.Tensor | None,
        wgate: torch.Tensor | None,
        ape: torch.Tensor | None,
        norm: torch.Tensor,
    ) -> CompressorWeights:
        """Merge wkv [N, D] and wgate [N, D]; ape and norm are widened to fp32 (fp64 stays)."""
        parts = [p for p in (wkv, wgate) if p is not None]
        return cls(
            norm=_at_least_fp32(norm),
            ape=None if ape is None else _at_least_fp32(ape),
            w=torch.cat(parts) if parts else None,
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        spec: CompressorSpec,
        layer: int,
        *,
        hidden_size: int,
        part: str = "main",
        mtp: int | None = None,
        device: torch.device | str = "cpu",
    ) -> CompressorWeights:
        """Load one compressor from a model's folder (safetensors or GGUF), or from one .gguf file.

        Names: any scheme of ``weightfiles.names.SCHEMES`` (official, transformers, vLLM, ATOM, TensorRT-LLM, Ascend,
        Automodel, MLX, GGUF), behind one prefix for the whole file. Storage: ``weightfiles.storage.storage_of``; plain
        matrices stay in their dtype; those of FP8, MLX and GGUF's quantised types become bf16, rounded once from fp32
        to nearest even.

        mtp: which MTP layer ``layer`` is (``ModelConfig.mtp_index``), whose names may begin with ``mtp.{mtp}``.
        Reads the headers and the few tensors of this compressor, nothing else. Raises CheckpointError that names the
        tensor when one is missing (an FP8 matrix's scale is one), misshapen, of an unusable dtype, not finite where it
        is quantised, or there is one that ``spec`` has no use for; UnsupportedError for GGUF without its package.
        """
        require("spec", spec, CompressorSpec)
        if part not in PARTS:
            raise RangeError("part", " or ".join(map(repr, PARTS)), repr(part))
        return read_compressor(tensor_files(Path(directory)), spec, layer, hidden_size, part, device, mtp)


def read_compressor(
    files: dict[str, Path],
    spec: CompressorSpec,
    layer: int,
    hidden_size: int,
    part: str = "main",
    device: torch.device | str = "cpu",
    mtp: int | None = None,
) -> CompressorWeights:
    """``CompressorWeights.load`` from ``files``, which says in which file each tensor is."""
    names = find_names(files, spec, layer, part, mtp)
    stored = {role: header(files[name], name) for role, name in names.items()}
    settings = Settings.of(files[names["norm"]].parent)
    roles = [role for role in MATRICES if role in stored]
    read = [storage_of(stored, role, matrix_shape(spec, role, hidden_size), settings) for role in roles]
    return CompressorWeights(
        norm=_at_least_fp32(vector(stored["norm"], (spec.head_dim,))).to(device),
        ape=_at_least_fp32(vector(stored["ape"], (spec.ratio, spec.width))).to(device) if "ape" in stored else None,
        w=torch.cat([storage.read() for storage in read]).to(device),
    )


def matrix_shape(spec: CompressorSpec, role: str, hidden_size: int) -> tuple[int, int]:
    """[N, D] of wkv and wgate, [projected, D] of wkv_wgate."""
    return (spec.projected if role == "wkv_wgate" else spec.width), hidden_size


def has_names(files: dict[str, Path], layer: int, part: str, mtp: int | None = None) -> bool:
    """Whether there is any tensor of this compressor; models cut to their first layers may list more than they have."""
    return Names(files).has(layer, part, mtp)


def find_names(
    files: dict[str, Path], spec: CompressorSpec, layer: int, part: str, mtp: int | None = None
) -> dict[str, str]:
    """Role -> name in a checkpoint, see ``weightfiles.names.Found``."""
    return Names(files).find(spec, layer, part, mtp).tensors


def _at_least_fp32(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.to(torch.float32)
