"""From a file to a ``ModelConfig``: which spelling of each key, which part of the file, and errors that name both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvcondense.config import ratios, rope
from kvcondense.config.model import ModelConfig
from kvcondense.config.values import EPS, agree, listed, mapping, number, text, whole
from kvcondense.errors import CheckpointError, KvCondenseError, UnsupportedError
from kvcondense.files import read_text, require_file
from kvcondense.files.reading import clipped, parsed, short

_MAX_CONFIG_BYTES = 1 << 20
_INFERENCE = Path("inference") / "config.json"
_GENERATIONS = {"deepseek_v4": "v4", "deepseek_v4_text": "v4", "deepseek_v41": "v4.1", "deepseek_v41_text": "v4.1"}
_ARCHITECTURES = {"DeepseekV4": "v4", "DeepseekV41": "v4.1"}
"""What stands before "For" in ``architectures``, for files that have no model_type where it counts."""
_SPELLINGS = {
    "hidden_size": ("hidden_size", "dim"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "head_dim": ("head_dim",),
    "index_head_dim": ("index_head_dim",),
    "eps": ("rms_norm_eps", "norm_eps"),
    "max_positions": ("max_position_embeddings",),
    "sources": ("kv_source_layer_ids", "kv_source_layers"),
}
"""Field -> its key in config.json, and in inference/config.json (ModelArgs of DeepSeek's inference/model.py)."""
_DEFAULT_EPS = 1e-6
"""ModelArgs.norm_eps: DeepSeek-V4's inference/config.json leaves it out, V4.1's has it."""
_DEFAULT_LENGTH = 4096
"""ModelArgs.max_seq_len."""


def read(path: Path) -> ModelConfig:
    """See ``ModelConfig.from_json``."""
    path = _file(path)
    data = json_of(path)
    folder = path.parent.parent if path.parts[-2:] == _INFERENCE.parts else path.parent
    try:
        return _parse(data, name=folder.name or "model")
    except KvCondenseError as error:
        raise _of_file(error, path) from error
    except RecursionError as error:  # of values that are compared or shown
        raise CheckpointError(str(path), "a JSON object", "one nested too deeply") from error


def json_of(path: Path) -> dict[str, Any]:
    """The object in a config.json; raises CheckpointError for another one, too large, or with two values for a key."""
    return parsed(read_text(path, "a JSON object", _MAX_CONFIG_BYTES), str(path))


def _of_file(error: KvCondenseError, path: Path) -> KvCondenseError:
    return type(error)(f"{path}: {error.argument}", error.expected, clipped(error.got), error.hint)


def config_of(folder: Path) -> Path | None:
    """The config.json of a model's folder; DeepSeek's inference/config.json only where there is no other."""
    return next((file for file in (folder / "config.json", folder / _INFERENCE) if file.is_file()), None)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return require_file(path, "a config.json")
    found = config_of(path)
    if found is None:
        raise CheckpointError(str(path), f"a config.json, or {_INFERENCE}", "a folder without")
    return found


def _parse(data: dict[str, Any], name: str) -> ModelConfig:
    inside = _text_config(data)
    generation, inference = _generation(inside, data)
    layers = _whole(inside, "num_hidden_layers")
    head_dim = _whole(inside, "head_dim")
    ratio_of_layer, overlap = ratios.read(inside, generation, layers)
    turned = rope.read(inside, head_dim)
    if inference and not turned.said:
        raise CheckpointError("config.json key 'original_seq_len'", "to be present (0: no YaRN)", "nothing")
    return ModelConfig(
        name=name,
        generation=generation,
        hidden_size=_whole(inside, "hidden_size"),
        num_hidden_layers=layers,
        compress_ratios=ratio_of_layer,
        eps=number(*_get(inside, "eps", _DEFAULT_EPS if inference and generation == "v4" else None), EPS),
        compress_rope_theta=turned.theta,
        yarn=turned.yarn,
        max_positions=_length(inside, turned) if inference else _whole(inside, "max_positions"),
        head_dim=head_dim,
        rope_dim=turned.channels,
        index_head_dim=_whole(inside, "index_head_dim"),
        overlap_ratios=overlap,
        kv_source_layers=_sources(inside) if generation == "v4.1" else None,
    )


def _get(data: dict[str, Any], field: str, default: object = None) -> tuple[str, Any]:
    """(key, value) of a field in whichever spelling; two that differ, or none where there is no default, raise."""
    keys = _SPELLINGS[field]
    present = [key for key in keys if data.get(key) is not None]
    if not present and default is not None:
        return keys[0], default
    return (present or keys)[0], agree(f"key {keys[0]!r}", {key: data.get(key) for key in keys})


def _whole(data: dict[str, Any], field: str) -> int:
    return whole(*_get(data, field))


def _text_config(data: dict[str, Any]) -> dict[str, Any]:
    """The part that is about the language model. What stands beside it may repeat it, not contradict it."""
    inside = data.get("text_config")
    if inside is None:
        return data
    inside = mapping("text_config", inside)
    sizes = [key for keys in _SPELLINGS.values() for key in keys if inside.get(key) is not None]
    for key in (*sizes, *ratios.KEYS, *rope.KEYS):
        beside = data.get(key)
        if beside is not None and beside != inside.get(key):
            got = f"{key}: {short(beside)}; text_config.{key}: {short(inside.get(key))}"
            raise CheckpointError(f"config.json key {key!r}", "one value, in text_config", got)
    return inside


def _generation(inside: dict[str, Any], outside: dict[str, Any]) -> tuple[str, bool]:
    """(v4 or v4.1, whether the file is one of DeepSeek's inference code, which has no model_type)."""
    found: dict[str, str] = {}
    for where, data in (("text_config.model_type", inside), ("model_type", outside)):
        if data.get("model_type") is None:
            continue
        kind = text(where, data["model_type"])
        if kind in _GENERATIONS:
            found[where] = _GENERATIONS[kind]
        elif data is inside:
            known = f"one of {', '.join(_GENERATIONS)}"
            raise UnsupportedError("config.json key 'model_type'", known, short(kind))
    if not found and outside.get("architectures") is not None:
        for i, one in enumerate(listed("architectures", outside["architectures"])):
            head = text(f"architectures[{i}]", one).partition("For")[0]
            found |= {f"architectures[{i}]": _ARCHITECTURES[head]} if head in _ARCHITECTURES else {}
    if found:
        return agree("generation", found), False
    if outside.get("model_type") is None and inside.get("n_layers") is not None:
        return ("v4" if inside.get("kv_source_layers") is None else "v4.1"), True
    got = short(outside.get("model_type")) if outside.get("model_type") is not None else "nothing"
    raise CheckpointError("config.json key 'model_type'", f"one of {', '.join(_GENERATIONS)}", got)


def _length(data: dict[str, Any], turned: rope.Rope) -> int:
    """Positions of a model of DeepSeek's inference code: max_seq_len is what a run allocates, not how far YaRN goes."""
    if turned.yarn is not None:
        return whole("original_seq_len x rope_factor", int(turned.yarn.original_max_positions * turned.yarn.factor))
    given = data.get("max_seq_len")
    return _DEFAULT_LENGTH if given is None else whole("max_seq_len", given)


def _sources(data: dict[str, Any]) -> tuple[int, ...]:
    key, ids = _get(data, "sources")
    return tuple(whole(f"{key}[{i}]", layer, 0) for i, layer in enumerate(listed(key, ids)))
