"""RoPE of the compressed layers, from every block and key that says something of it; what is not understood raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcondense.config.model import Yarn
from kvcondense.config.values import FACTOR, MAX_SIZE, THETA, TURNS, agree, mapping, number, text, whole
from kvcondense.errors import CheckpointError, RangeError, UnsupportedError, require_known
from kvcondense.files.reading import short

BLOCKS = ("rope_scaling", "rope_parameters")
KEYS = (*BLOCKS, "compress_rope_theta")
_TYPES = {"default": False, "yarn": True, "deepseek_yarn": True}
"""Whether frequencies are stretched. vLLM's build_deepseek_v4_rope writes deepseek_yarn into the block it was given."""
_STRETCH = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_INFERENCE = ("rope_factor", "original_seq_len", "beta_fast", "beta_slow")
"""The same in ModelArgs of DeepSeek's inference/model.py, whose original_seq_len of 0 means no YaRN."""
_DEFAULT_BETAS = (32.0, 1.0)
"""ModelArgs.beta_fast and beta_slow, and what transformers' _compute_yarn_parameters takes where they are missing."""
_SCALES = ("attention_factor", "attn_factor", "extrapolation_factor")
"""transformers multiplies cos and sin by the first, vLLM by the second, and blends with the third. DeepSeek's code has
none of them and no mscale, so 1 is what the models were trained with; any other number would change rows. Where
attention_factor is null transformers derives 0.1 ln(factor) + 1, which DeepSeek's code does not: it means 1 here."""
_MSCALES = ("mscale", "mscale_all_dim")
"""cos and sin are scaled by a ratio that is 1 if both are equal; vLLM writes 0 and 0 for DeepSeek-V4."""
_FLAGS = ("truncate", "apply_yarn_scaling", "is_deepseek_v4")
"""True is what happens here."""
_CHANNELS = ("partial_rotary_factor", "rope_dim")
_HEADS = ("qk_rope_head_dim", "rope_head_dim", "partial_rotary_factor")
_KNOWN = ("rope_type", "type", "rope_theta", *_STRETCH, *_SCALES, *_MSCALES, *_FLAGS, *_CHANNELS)


@dataclass(frozen=True)
class Rope:
    """Base, rotated channels and stretch of the compressed layers; ``said``: whether any key speaks of a stretch."""

    theta: float
    channels: int
    yarn: Yarn | None
    said: bool


def read(data: dict[str, Any], head_dim: int) -> Rope:
    """The RoPE that all blocks and keys agree on; raises with the names of two that do not, or of what is unknown."""
    # rope_theta of a block without "main" and "compress" is the other layers' (transformers), or that of the layer
    # which an engine built last (vLLM): only compress_rope_theta and rope_parameters.compress speak of these.
    thetas: dict[str, object] = {"compress_rope_theta": data.get("compress_rope_theta")}
    channels: dict[str, object] = {key: data.get(key) for key in _HEADS}
    stretches: dict[str, Yarn | None] = {}
    for name, block, nested in _blocks(data):
        for key in block:
            require_known(f"config.json {name}", key, _KNOWN)
        if block.get("rope_theta") is not None:
            number(f"{name}.rope_theta", block["rope_theta"], THETA)
        if nested:
            thetas[f"{name}.rope_theta"] = block.get("rope_theta")
        channels |= {f"{name}.{key}": block.get(key) for key in _CHANNELS}
        stretched = _stretched(name, block)
        if stretched is not None:
            stretches[name] = _yarn(name, block, _STRETCH) if stretched else None
        _neutral(name, block)
    stretches |= _inference(data)
    theta = agree("RoPE base of the compressed layers", {k: _number(k, v, THETA) for k, v in thetas.items()})
    yarn = next(iter(stretches.values()), None)
    if any(y != yarn for y in stretches.values()):
        got = "; ".join(f"{name}: {y}" for name, y in stretches.items())
        raise CheckpointError("config.json RoPE scaling", "blocks that agree", got)
    beside = data.get(_STRETCH[1])
    if yarn is not None and beside is not None and beside != yarn.original_max_positions:
        got = f"{_STRETCH[1]}: {short(beside)}; {', '.join(stretches)}: {yarn.original_max_positions}"
        raise CheckpointError("config.json RoPE scaling", "one original length", got)
    return Rope(theta, _channels(channels, head_dim), yarn, bool(stretches))


def _blocks(data: dict[str, Any]) -> list[tuple[str, dict[str, Any], bool]]:
    """(name, block, whether it is of the compressed layers alone) of every block that is there and not empty."""
    found = []
    for name in BLOCKS:
        if data.get(name) in (None, {}):
            continue
        block = mapping(name, data[name])
        if "main" not in block and "compress" not in block:
            found.append((name, block, False))
            continue
        if block.get("main") is not None:
            mapping(f"{name}.main", block["main"])  # of the layers without a compressor
        if block.get("compress") is None:
            raise CheckpointError(f"config.json {name}.compress", "to be present beside main", "nothing")
        found.append((f"{name}.compress", mapping(f"{name}.compress", block["compress"]), True))
        rest = {k: v for k, v in block.items() if k not in ("main", "compress")}
        if rest.get("rope_type") == "default":
            # transformers may leave one beside the two that count (DeepseekV4RotaryEmbedding.__init__ says so).
            del rest["rope_type"]
        if rest:
            found.append((name, rest, False))
    return found


def _stretched(name: str, block: dict[str, Any]) -> bool | None:
    """What a block's type says of YaRN; None if it says nothing."""
    kinds = {}
    for key in ("rope_type", "type"):
        if block.get(key) is not None:
            kind = text(f"{name}.{key}", block[key])
            require_known(f"{name}.{key}", kind, _TYPES)
            kinds[f"{name}.{key}"] = _TYPES[kind]
    given = [key for key in _STRETCH if block.get(key) is not None]
    if not kinds:
        if given:
            raise CheckpointError(f"config.json {name}.rope_type", f"to be present beside {given[0]}", "nothing")
        return None
    stretched = agree("RoPE type", kinds)
    if given and not stretched:
        raise CheckpointError(f"config.json {name}.{given[0]}", "none in a block of rope_type 'default'", given[0])
    return stretched


def _yarn(prefix: str, block: dict[str, Any], keys: tuple[str, ...]) -> Yarn:
    factor, original, *betas = (f"{prefix}.{key}" if prefix else key for key in keys)
    values = dict(zip((factor, original, *betas), (block.get(key) for key in keys), strict=True))
    for key in (factor, original):
        if values[key] is None:
            raise CheckpointError(f"config.json {key}", "to be present", "nothing")
    length = number(original, values[original], (1, MAX_SIZE))
    if length != int(length):
        raise RangeError(original, "a whole number", length)
    fast, slow = (
        default if values[key] is None else number(key, values[key], TURNS)
        for key, default in zip(betas, _DEFAULT_BETAS, strict=True)
    )
    if fast < slow:
        raise RangeError(betas[0], f"at least {betas[1]}, {slow:g}", f"{fast:g}")
    return Yarn(number(factor, values[factor], FACTOR), int(length), fast, slow)


def _inference(data: dict[str, Any]) -> dict[str, Yarn | None]:
    """What DeepSeek's own keys say: {} nothing, {name: None} no YaRN."""
    factor, original = (data.get(key) for key in _INFERENCE[:2])
    if factor is None and original is None:
        return {}
    name = "original_seq_len"
    if original is None:
        raise CheckpointError(f"config.json {name}", "to be present beside rope_factor", "nothing")
    whole(name, original, 0)
    return {name: _yarn("", data, _INFERENCE) if original else None}


def _neutral(name: str, block: dict[str, Any]) -> None:
    """Raise for what would scale cos and sin, or form frequencies in another way."""
    for key in _SCALES:
        value = block.get(key)
        if value is not None and number(f"{name}.{key}", value, (0, MAX_SIZE)) != 1:
            raise UnsupportedError(f"{name}.{key}", "1 (cos and sin are not scaled)", short(value))
    scales = [0.0 if block.get(k) is None else number(f"{name}.{k}", block[k], (0, MAX_SIZE)) for k in _MSCALES]
    if scales[0] != scales[1]:
        raise UnsupportedError(f"{name}.mscale", f"as much as mscale_all_dim, {scales[1]:g}", f"{scales[0]:g}")
    for key in _FLAGS:
        if block.get(key) is not None and block[key] is not True:
            raise UnsupportedError(f"{name}.{key}", "true", short(block[key]))


def _channels(spellings: dict[str, object], head_dim: int) -> int:
    """Rotated channels from numbers of them and fractions of head_dim (transformers: int(head_dim * fraction))."""

    def channels(key: str, value: object) -> int | None:
        if value is None:
            return None
        if key.endswith("partial_rotary_factor"):
            return int(head_dim * number(key, value, (0, 1)))
        return whole(key, value)

    found = {key: channels(key, value) for key, value in spellings.items()}
    rope_dim = agree("RoPE channels", found)
    if rope_dim % 2 or not 2 <= rope_dim <= head_dim:
        key = next(k for k, v in found.items() if v is not None)
        raise RangeError(f"config.json {key}", f"an even number of channels, 2 to head_dim {head_dim}", rope_dim)
    return rope_dim


def _number(key: str, value: object, bounds: tuple[float, float]) -> float | None:
    return None if value is None else number(key, value, bounds)
