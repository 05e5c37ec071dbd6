"""Constants of a model: presets and a reader of Hugging Face ``config.json`` that guesses nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcondense.errors import (
    CheckpointError,
    DtypeError,
    KvCondenseError,
    RangeError,
    ShapeError,
    UnsupportedError,
    require_int,
)
from kvcondense.files import require_file

_MAX_CONFIG_BYTES = 4 << 20
_MAX_SIZE = 1 << 31
_LARGEST = 1e300


@dataclass(frozen=True)
class Yarn:
    """YaRN stretch of the RoPE frequencies; the magnitude scale is 1 (DeepSeek's reference applies no mscale)."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """What the compressors of one model need to know.

    ``compress_ratios`` has one entry per layer, MTP layers last. In generation ``"v4"`` 0 and 1 mean "no compressor";
    in ``"v4.1"`` 0 does, and only ``kv_source_layers`` own a compressor. ``overlap_ratios`` are the ratios whose
    windows overlap. ``eps`` has no default: V4 uses 1e-6, V4.1 uses 1e-20.
    """

    name: str
    generation: str
    hidden_size: int
    num_hidden_layers: int
    compress_ratios: tuple[int, ...]
    eps: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_positions: int
    head_dim: int
    rope_dim: int
    index_head_dim: int
    overlap_ratios: tuple[int, ...]
    kv_source_layers: tuple[int, ...] | None = None

    DEMO: ClassVar[ModelConfig]
    FLASH: ClassVar[ModelConfig]
    PRO: ClassVar[ModelConfig]
    V41_FLASH: ClassVar[ModelConfig]

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_hidden_layers", "max_positions", "head_dim", "index_head_dim"):
            if require_int(field, getattr(self, field), low=1) > _MAX_SIZE:
                raise RangeError(field, f"at most {_MAX_SIZE}", getattr(self, field))
        require_int("rope_dim", self.rope_dim, low=0)
        for field in ("eps", "compress_rope_theta"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise RangeError(field, "a positive finite number", getattr(self, field))
        if self.generation not in ("v4", "v4.1"):
            raise UnsupportedError("generation", "'v4' or 'v4.1'", repr(self.generation))
        if len(self.compress_ratios) < self.num_hidden_layers:
            raise ShapeError(
                "compress_ratios", f"at least {self.num_hidden_layers} entries", f"{len(self.compress_ratios)} entries"
            )
        for i, ratio in enumerate(self.compress_ratios):
            require_int(f"compress_ratios[{i}]", ratio, low=0)
        for layer in self.kv_source_layers or ():
            if not 0 <= layer < self.num_hidden_layers or self.compress_ratios[layer] == 0:
                raise RangeError("kv_source_layers", "layers with a compress ratio above 0", layer)

    def owns_compressor(self, layer: int) -> bool:
        """True if ``layer`` has compressor weights of its own."""
        if not 0 <= layer < len(self.compress_ratios):
            raise RangeError("layer", f"0..{len(self.compress_ratios) - 1}", layer)
        if self.kv_source_layers is not None:
            return layer in self.kv_source_layers
        return self.compress_ratios[layer] > 1

    @property
    def compressor_layers(self) -> tuple[int, ...]:
        """Layers that own a compressor, in order."""
        return tuple(i for i in range(len(self.compress_ratios)) if self.owns_compressor(i))

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read ``config.json`` of a DeepSeek-V4 or V4.1 model, in DeepSeek's or transformers' spelling.

        Raises a ``KvCondenseError`` that names the key when one is missing, malformed or contradicts another.
        """
        path = require_file(path, "a config.json")
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(str(path), f"at most {_MAX_CONFIG_BYTES} bytes", path.stat().st_size)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(str(path), "a JSON object", error) from error
        if not isinstance(data, dict):
            raise CheckpointError(str(path), "a JSON object", type(data).__name__)
        try:
            text = _object("text_config", data.get("text_config", data))
            return _parse(text, name=path.parent.name or "model")
        except KvCondenseError as error:
            raise type(error)(f"{path}: {error.argument}", error.expected, error.got, error.hint) from error


def _get(data: dict[str, Any], key: str) -> Any:
    if data.get(key) is None:
        raise CheckpointError(f"config.json key {key!r}", "to be present", "nothing")
    return data[key]


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DtypeError(name, "an object", type(value).__name__)
    return value


def _list(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise DtypeError(name, "a list", type(value).__name__)
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise DtypeError(name, "a string", type(value).__name__)
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise DtypeError(name, "a finite number", repr(value))
    return float(value)


def _agree(name: str, values: dict[str, Any]) -> Any:
    """The one value of all spellings that are present; different values contradict each other."""
    present = {k: v for k, v in values.items() if v is not None}
    if not present:
        raise CheckpointError(f"config.json {name}", f"one of {', '.join(values)}", "none of them")
    first = next(iter(present.values()))
    if any(v != first for v in present.values()):
        raise CheckpointError(f"config.json {name}", "spellings that agree", present)
    return first


def _parse(data: dict[str, Any], name: str) -> ModelConfig:
    model_type = _text("model_type", _get(data, "model_type"))
    generations = {"deepseek_v4": "v4", "deepseek_v41": "v4.1", "deepseek_v41_text": "v4.1"}
    if model_type not in generations:
        raise UnsupportedError("config.json key 'model_type'", f"one of {', '.join(generations)}", repr(model_type))
    generation = generations[model_type]
    layers = require_int("num_hidden_layers", _get(data, "num_hidden_layers"), low=1)
    head_dim = require_int("head_dim", _get(data, "head_dim"), low=1)
    ratios, overlap = _ratios(data, generation, layers)
    nested = data.get("rope_parameters") or {}
    compress_rope = nested.get("compress") if isinstance(nested, dict) else None
    compress_rope = compress_rope if isinstance(compress_rope, dict) else {}
    partial = data.get("partial_rotary_factor")
    return ModelConfig(
        name=name,
        generation=generation,
        hidden_size=_get(data, "hidden_size"),
        num_hidden_layers=layers,
        compress_ratios=ratios,
        eps=_number("rms_norm_eps", _get(data, "rms_norm_eps")),
        compress_rope_theta=_agree(
            "RoPE base of the compressed layers",
            {
                key: None if value is None else _number(key, value)
                for key, value in {
                    "compress_rope_theta": data.get("compress_rope_theta"),
                    "rope_parameters.compress.rope_theta": compress_rope.get("rope_theta"),
                }.items()
            },
        ),
        yarn=_yarn(data, compress_rope),
        max_positions=_get(data, "max_position_embeddings"),
        head_dim=head_dim,
        rope_dim=_agree(
            "RoPE channels",
            {
                "qk_rope_head_dim": data.get("qk_rope_head_dim"),
                "partial_rotary_factor": None
                if partial is None
                else int(head_dim * _number("partial_rotary_factor", partial)),
            },
        ),
        index_head_dim=_get(data, "index_head_dim"),
        overlap_ratios=overlap,
        kv_source_layers=_sources(data) if generation == "v4.1" else None,
    )


def _sources(data: dict[str, Any]) -> tuple[int, ...]:
    ids = _list("kv_source_layer_ids", _get(data, "kv_source_layer_ids"))
    return tuple(require_int(f"kv_source_layer_ids[{i}]", layer, low=0) for i, layer in enumerate(ids))


def _ratios(data: dict[str, Any], generation: str, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ratio per layer (MTP entries last) and the ratios whose windows overlap."""
    from_list = from_types = None
    overlap: tuple[int, ...] = (4,) if generation == "v4" else ()
    if (listed := data.get("compress_ratios")) is not None:
        listed = _list("compress_ratios", listed)
        from_list = tuple(require_int(f"compress_ratios[{i}]", r, low=0) for i, r in enumerate(listed))
        extra = require_int("num_nextn_predict_layers", data.get("num_nextn_predict_layers", 0), low=0)
        if len(from_list) not in (layers, layers + extra):
            raise ShapeError(
                "compress_ratios", f"{layers} entries, or {layers + extra} with MTP layers", f"{len(from_list)} entries"
            )
    if (types := data.get("layer_types")) is not None and generation == "v4":
        rates = _object("compress_rates", _get(data, "compress_rates"))
        types = [_text(f"layer_types[{i}]", kind) for i, kind in enumerate(_list("layer_types", types))]
        table = {
            "sliding_attention": 0,
            "compressed_sparse_attention": rates.get("compressed_sparse_attention"),
            "heavily_compressed_attention": rates.get("heavily_compressed_attention"),
        }
        for i, kind in enumerate(types):
            if table.get(kind) is None:
                raise UnsupportedError(f"layer_types[{i}]", f"one of {', '.join(table)} with a rate", repr(kind))
        if len(types) != layers:
            raise ShapeError("layer_types", f"{layers} entries", f"{len(types)} entries")
        csa, hca = table["compressed_sparse_attention"], table["heavily_compressed_attention"]
        if csa is not None and csa == hca:
            raise RangeError("compress_rates", "different rates for overlapping and plain windows", rates)
        from_types = tuple(require_int(f"compress_rates[{kind}]", table[kind], low=0) for kind in types)
        overlap = (csa,) if csa is not None else ()
    if from_list is not None and from_types is not None and from_list[:layers] != from_types:
        raise CheckpointError("config.json layer ratios", "compress_ratios and layer_types that agree", from_list)
    ratios = from_list or from_types
    if ratios is None:
        raise CheckpointError("config.json layer ratios", "compress_ratios or layer_types", "neither")
    return ratios, overlap


def _yarn(data: dict[str, Any], compress_rope: dict[str, Any]) -> Yarn | None:
    found: list[Yarn | None] = []
    for name, block in (("rope_scaling", data.get("rope_scaling")), ("rope_parameters.compress", compress_rope)):
        if not block:
            continue
        kind = _object(name, block).get("rope_type", block.get("type", "default"))
        if kind == "default":
            found.append(None)
            continue
        if kind != "yarn":
            raise UnsupportedError(f"{name}.rope_type", "'yarn' or 'default'", repr(kind))
        if block.get("attention_factor", 1.0) != 1.0:
            raise UnsupportedError(f"{name}.attention_factor", "1.0", block["attention_factor"])
        found.append(
            Yarn(
                factor=_number("factor", _get(block, "factor")),
                original_max_positions=require_int(
                    "original_max_position_embeddings", _get(block, "original_max_position_embeddings"), low=1
                ),
                beta_fast=_number("beta_fast", _get(block, "beta_fast")),
                beta_slow=_number("beta_slow", _get(block, "beta_slow")),
            )
        )
    if found and any(y != found[0] for y in found):
        raise CheckpointError("config.json RoPE scaling", "rope_scaling and rope_parameters that agree", found)
    return found[0] if found else None


_YARN_16X = Yarn(factor=16.0, original_max_positions=65536, beta_fast=32.0, beta_slow=1.0)
_V4: dict[str, Any] = {
    "generation": "v4",
    "eps": 1e-6,
    "head_dim": 512,
    "rope_dim": 64,
    "index_head_dim": 128,
    "overlap_ratios": (4,),
}

# Defaults of DeepSeek's inference/model.py, which are also the preset of pypto-lib's PR 270.
ModelConfig.DEMO = ModelConfig(
    name="demo",
    hidden_size=4096,
    num_hidden_layers=7,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 0),
    compress_rope_theta=40000.0,
    yarn=None,
    max_positions=4096,
    **_V4,
)
# config.json of deepseek-ai/DeepSeek-V4-Flash.
ModelConfig.FLASH = ModelConfig(
    name="flash",
    hidden_size=4096,
    num_hidden_layers=43,
    compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
    compress_rope_theta=160000.0,
    yarn=_YARN_16X,
    max_positions=1 << 20,
    **_V4,
)
# config.json of deepseek-ai/DeepSeek-V4-Pro.
ModelConfig.PRO = ModelConfig(
    name="pro",
    hidden_size=7168,
    num_hidden_layers=61,
    compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
    compress_rope_theta=160000.0,
    yarn=_YARN_16X,
    max_positions=1 << 20,
    **_V4,
)
# text_config of deepseek-ai/DeepSeek-V4.1-Flash; the last three entries are its DSpark draft layers.
ModelConfig.V41_FLASH = ModelConfig(
    name="v41",
    generation="v4.1",
    hidden_size=5120,
    num_hidden_layers=40,
    compress_ratios=(0, 0, *(2,) * 18, *(1,) * 20, 0, 0, 0),
    eps=1e-20,
    compress_rope_theta=160000.0,
    yarn=_YARN_16X,
    max_positions=1 << 20,
    head_dim=512,
    rope_dim=64,
    index_head_dim=128,
    overlap_ratios=(),
    kv_source_layers=(2, 8, 14, 20),
)

PRESETS: dict[str, ModelConfig] = {
    c.name: c for c in (ModelConfig.DEMO, ModelConfig.FLASH, ModelConfig.PRO, ModelConfig.V41_FLASH)
}
