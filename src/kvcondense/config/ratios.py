"""The compress ratio of every layer, as a list of ratios or as layer types and the rate of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcondense.config.values import MAX_RATIO, agree, listed, mapping, text, whole
from kvcondense.errors import CheckpointError, RangeError, ShapeError, UnsupportedError, require_known

CSA, HCA, PLAIN = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
RATES = {CSA: "compress_rate_csa", HCA: "compress_rate_hca"}
"""transformers' layer types that have a compressor, and the key that older files of it have for their rate."""
DEFAULT_RATES = {CSA: 4, HCA: 128}
"""transformers' configuration_deepseek_v4.py, ``default_compress_rates``: of files without ``compress_rates``."""
KEYS = ("compress_ratios", "layer_types", "compress_rates", *RATES.values())
OVERLAPPING = 4
"""DeepSeek's inference/model.py: windows overlap if the ratio is 4. In transformers those of CSA layers do."""


def read(data: dict[str, Any], generation: str, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ratio per layer, entries past ``layers`` (MTP's, however many) last, and the ratios whose windows overlap."""
    ratios = _listed(data.get("compress_ratios"), layers)
    if generation != "v4":
        for key in KEYS[1:]:
            if data.get(key) is not None:
                raise UnsupportedError(f"config.json key {key!r}", "compress_ratios alone in a V4.1 model", key)
        if ratios is None:
            raise CheckpointError("config.json layer ratios", "compress_ratios", "nothing")
        return ratios, ()
    rates = _rates(data)
    types = _types(data.get("layer_types"), _filled(rates, data), layers)
    if ratios is None and types is None:
        raise CheckpointError("config.json layer ratios", "compress_ratios or layer_types", "neither")
    if types is None:
        assert ratios is not None
        _same_rates(ratios, rates)
        return ratios, (OVERLAPPING,)
    if ratios is not None:
        # Both may go on past the layers, and need not go on equally far.
        for i, (ratio, rate) in enumerate(zip(_without_ones(ratios), types, strict=False)):
            if ratio != rate:
                got = f"compress_ratios[{i}]: {ratio}; layer_types[{i}]: {rate}"
                raise CheckpointError("config.json layer ratios", "compress_ratios and layer_types that agree", got)
    overlap = _filled(rates, data)[CSA]
    longest = types if ratios is None or len(types) > len(ratios) else ratios
    return longest, () if overlap is None else (overlap,)


def _listed(value: object, layers: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    entries = enumerate(listed("compress_ratios", value))
    ratios = tuple(whole(f"compress_ratios[{i}]", ratio, 0, MAX_RATIO) for i, ratio in entries)
    if len(ratios) < layers:
        raise ShapeError("compress_ratios", f"at least {layers} entries, one per layer", f"{len(ratios)} entries")
    return ratios


def _without_ones(ratios: Sequence[int]) -> list[int]:
    """In a V4 list 1 means what 0 does: no compressor."""
    return [0 if ratio == 1 else ratio for ratio in ratios]


def _rates(data: dict[str, Any]) -> dict[str, int | None]:
    """Rate of each layer type, None where no key says it."""
    given = data.get("compress_rates")
    table = {} if given is None else mapping("compress_rates", given)
    for key in table:
        require_known("config.json compress_rates", key, RATES)
    rates: dict[str, int | None] = {}
    for kind, legacy in RATES.items():
        said = {f"compress_rates.{kind}": table.get(kind), legacy: data.get(legacy)}
        said = {key: None if rate is None else whole(key, rate, 2, MAX_RATIO) for key, rate in said.items()}
        rates[kind] = agree(f"rate of {kind}", said) if any(v is not None for v in said.values()) else None
    return rates


def _filled(rates: dict[str, int | None], data: dict[str, Any]) -> dict[str, int | None]:
    """Rates of ``layer_types``: those of transformers where the file has no ``compress_rates``."""
    if data.get("compress_rates") is None:
        rates = {kind: rate or DEFAULT_RATES[kind] for kind, rate in rates.items()}
    if rates[CSA] is not None and rates[CSA] == rates[HCA]:
        raise RangeError("compress_rates", "different rates for overlapping and plain windows", rates[CSA])
    return rates


def _types(value: object, rates: dict[str, int | None], layers: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    types = [text(f"layer_types[{i}]", kind) for i, kind in enumerate(listed("layer_types", value))]
    for i, kind in enumerate(types):
        require_known(f"layer_types[{i}]", kind, (PLAIN, *RATES))
        if kind != PLAIN and rates[kind] is None:
            raise CheckpointError(f"config.json compress_rates.{kind}", f"a rate for layer_types[{i}]", "nothing")
    if len(types) < layers:
        raise ShapeError("layer_types", f"at least {layers} entries, one per layer", f"{len(types)} entries")
    return tuple(0 if kind == PLAIN else rates[kind] or 0 for kind in types)


def _same_rates(ratios: Sequence[int], rates: dict[str, int | None]) -> None:
    """A list of ratios beside rates. transformers takes the list's 4 and 128 for names of layer types then, and the
    rates for their ratios; DeepSeek's code takes the list as it stands: a file in which both differ has no one meaning.
    """
    for i, ratio in enumerate(_without_ones(ratios)):
        kind = CSA if ratio == OVERLAPPING else HCA
        if ratio and rates[kind] not in (None, ratio):
            got = f"compress_ratios[{i}]: {ratio}; compress_rates.{kind} or {RATES[kind]}: {rates[kind]}"
            raise CheckpointError("config.json layer ratios", "compress_ratios and rates that agree", got)
