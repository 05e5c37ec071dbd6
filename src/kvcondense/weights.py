"""Learned tensors of one compressor, and their names in checkpoints (official and transformers)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kvcondense.errors import CheckpointError, RangeError, require
from kvcondense.files import require_file
from kvcondense.spec import CompressorSpec

_MAX_INDEX_BYTES = 64 << 20
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# (base of the names, {our name: checkpoint name}, sub-trees that belong to somebody else)
_OFFICIAL = {"wkv": "wkv.weight", "wgate": "wgate.weight", "ape": "ape", "norm": "norm.weight"}
_TRANSFORMERS = {
    "wkv": "kv_proj.weight",
    "wgate": "gate_proj.weight",
    "ape": "position_bias",
    "norm": "kv_norm.weight",
}
_SCHEMES: dict[str, tuple[tuple[str, dict[str, str], tuple[str, ...]], ...]] = {
    "main": (
        ("layers.{layer}.attn.compressor.", _OFFICIAL, ()),
        ("layers.{layer}.self_attn.compressor.", _TRANSFORMERS, ("indexer.",)),
    ),
    "indexer": (
        ("layers.{layer}.attn.indexer.compressor.", _OFFICIAL, ()),
        ("layers.{layer}.self_attn.compressor.indexer.", _TRANSFORMERS, ("q_b_proj.", "scorer.", "weights_proj.")),
    ),
}
_PREFIXES = ("", "model.")


@dataclass(frozen=True)
class CompressorWeights:
    """Weights of one compressor.

    w [projected, D]: wkv stacked on wgate (wkv alone without a gate), any float dtype; None if the caller brings its
    own kv_score. ape [ratio, N] fp32 or None. norm [head_dim] fp32.
    """

    norm: torch.Tensor
    ape: torch.Tensor | None = None
    w: torch.Tensor | None = None

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
        """Load one compressor from a model directory of safetensors files, official or transformers names.

        mtp: which MTP layer ``layer`` is (``ModelConfig.mtp_index``), whose names may begin with ``mtp.{mtp}``.
        Reads the headers and the few tensors of this compressor, nothing else. Raises CheckpointError that names the
        tensor when one is missing, misshapen, of an unusable dtype, or there is one that ``spec`` has no use for.
        """
        require("spec", spec, CompressorSpec)
        if part not in _SCHEMES:
            raise RangeError("part", " or ".join(map(repr, _SCHEMES)), repr(part))
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
    shapes = {
        "wkv": (spec.width, hidden_size),
        "wgate": (spec.width, hidden_size),
        "ape": (spec.ratio, spec.width),
        "norm": (spec.head_dim,),
    }
    loaded = {ours: _read(files[name], name, shapes[ours], device) for ours, name in names.items()}
    return CompressorWeights.from_parts(loaded["wkv"], loaded.get("wgate"), loaded.get("ape"), loaded["norm"])


def tensor_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, from model.safetensors.index.json, model.safetensors, or the only safetensors file."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(str(index), f"at most {_MAX_INDEX_BYTES} bytes", index.stat().st_size)
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            entries = [(str(k), str(v)) for k, v in weight_map.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(str(index), "an object with a weight_map", repr(error)) from error
        for name, file in entries:
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{index} entry {name!r}", "a safetensors file of the same folder", file)
        return {name: directory / file for name, file in entries}
    # Results and hidden states may lie in the same folder: the conventional name comes first.
    model = directory / "model.safetensors"
    single = [model] if model.is_file() else sorted(directory.glob("*.safetensors"))
    if len(single) != 1:
        raise CheckpointError(
            str(directory),
            "model.safetensors.index.json, model.safetensors or one .safetensors file",
            f"{len(single)} files",
        )
    with open_safetensors(single[0]) as handle:
        return dict.fromkeys(handle.keys(), single[0])


def open_safetensors(path: Path, device: torch.device | str = "cpu"):  # noqa: ANN201 - the type is private to safetensors
    """``safetensors.safe_open`` with this library's errors."""
    from safetensors import SafetensorError, safe_open

    require_file(path, "a safetensors file")
    try:
        return safe_open(str(path), framework="pt", device=str(device))
    except SafetensorError as error:
        raise CheckpointError(str(path), "a valid safetensors file", error) from error


def has_names(files: dict[str, Path], layer: int, part: str, mtp: int | None = None) -> bool:
    """Whether there is any tensor of this compressor; models cut to their first layers may list more than they have."""
    bases = [prefix + base for prefix in _PREFIXES for base, _, _ in _schemes(part, layer, mtp)]
    return any(name.startswith(tuple(bases)) for name in files)


def _schemes(part: str, layer: int, mtp: int | None) -> Iterator[tuple[str, dict[str, str], tuple[str, ...]]]:
    """``_SCHEMES`` of one layer; the official checkpoints have MTP layers as mtp.0, mtp.1 ..."""
    for template, scheme, foreign in _SCHEMES[part]:
        yield template.format(layer=layer), scheme, foreign
        if mtp is not None:
            yield template.replace("layers.{layer}", f"mtp.{mtp}"), scheme, foreign


def find_names(
    files: dict[str, Path], spec: CompressorSpec, layer: int, part: str, mtp: int | None = None
) -> dict[str, str]:
    """wkv, wgate, ape, norm, as far as ``spec`` has them -> their names in a checkpoint."""
    wanted = ["wkv", *(["wgate"] if spec.has_gate else []), *(["ape"] if spec.has_ape else []), "norm"]
    tried = []
    for prefix in _PREFIXES:
        for name, scheme, foreign in _schemes(part, layer, mtp):
            base = prefix + name
            tried.append(base + scheme["wkv"])
            present = {n[len(base) :] for n in files if n.startswith(base)}
            present = {n for n in present if not n.startswith(foreign)}
            if not present:
                continue
            names = {ours: base + scheme[ours] for ours in wanted}
            for name in names.values():
                if name not in files:
                    raise CheckpointError(name, "to be in the checkpoint", "a missing tensor")
            extra = sorted(present - {scheme[ours] for ours in wanted})
            if extra:
                raise CheckpointError(base + extra[0], "no such tensor for this compressor", "an extra tensor")
            return names
    hint = "kvcondense info --checkpoint DIR lists the compressors that are there"
    raise CheckpointError(f"compressor of layer {layer}", f"one of {', '.join(tried)}", "none of them", hint)


def _read(path: Path, name: str, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    with open_safetensors(path, device) as handle:
        if name not in handle.keys():  # noqa: SIM118 - a handle is no dict
            raise CheckpointError(name, f"to be in {path}", "a missing tensor")
        got = tuple(handle.get_slice(name).get_shape())
        if got != shape:
            raise CheckpointError(name, f"shape {list(shape)}", f"shape {list(got)}")
        tensor = handle.get_tensor(name)
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(name, "bf16, fp16, fp32 or fp64", tensor.dtype)
    return tensor


def _at_least_fp32(t: torch.Tensor) -> torch.Tensor:
    return t if t.dtype == torch.float64 else t.to(torch.float32)
