"""How many bytes of state and cache the compressors of a model take: per layer, per token, per request, per device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvcondense.config import ModelConfig
from kvcondense.errors import RangeError, require, require_int, require_known
from kvcondense.formats import CacheFormat, get_format
from kvcondense.spec import CompressorSpec

STATE_BYTES = 4
"""Of a stored value: states are fp32."""
STATES = ("ring", "online")


@dataclass(frozen=True)
class Line:
    """One kind of compressor, in one request. Bytes of one layer: ``ring`` and ``online`` (None with overlap) states,
    ``cache`` of whole pages; ``per_token``: of cache that one more token costs, on average.
    """

    compressor: str
    layers: int
    ratio: int
    format: str
    ring_rows: int
    ring: int
    online: int | None
    rows: int
    pages: int
    cache: int
    per_token: float

    def state(self, kind: str) -> int:
        """Bytes of one layer's state; without an online form, of the ring."""
        return self.online if kind == "online" and self.online is not None else self.ring


@dataclass(frozen=True)
class Capacity:
    """The memory of one request of ``context`` tokens, all compressors of a model together."""

    config: ModelConfig
    context: int
    kind: str
    lines: tuple[Line, ...]
    uncompressed: int
    """Bytes of a cache with one main row per token in each layer that has a compressor, in the same format."""

    @property
    def state(self) -> int:
        """Bytes of states."""
        return sum(x.layers * x.state(self.kind) for x in self.lines)

    @property
    def cache(self) -> int:
        """Bytes of cache pages."""
        return sum(x.layers * x.cache for x in self.lines)

    @property
    def per_token(self) -> float:
        """Bytes of cache that one more token costs, on average."""
        return sum(x.layers * x.per_token for x in self.lines)

    def fits(self, memory: int) -> int:
        """Requests of this context whose states and caches fit in ``memory`` bytes."""
        return memory // (self.state + self.cache) if self.state + self.cache else 0


def capacity(
    config: ModelConfig,
    context: int,
    *,
    format: str = "fp8_model1",
    indexer_format: str = "mxfp4_indexer",
    draft: int = 0,
    state: str = "ring",
    page_tokens: int = 256,
) -> Capacity:
    """Count for ``context`` tokens, ``draft`` of a step's last ones open to rejection, pages of ``page_tokens`` tokens.

    Counted are the main layers, no MTP layer.
    Raises RangeError for a context that the model does not have, UnsupportedError for a format that does not fit.
    """
    require("config", config, ModelConfig)
    for name, value, low in (("context", context, 0), ("draft", draft, 0), ("page_tokens", page_tokens, 1)):
        require_int(name, value, low)
    if context > config.max_positions:
        raise RangeError("context", f"at most {config.max_positions} ({config.name})", context)
    require_known("state", state, STATES)
    main, lines, whole = get_format(format), [], 0
    for spec, layers in compressors(config).items():
        indexer = spec.head_dim == config.index_head_dim
        form = get_format(indexer_format) if indexer else main
        lines.append(_line(config, spec, layers, form, context, draft, page_tokens))
        if not indexer:
            one = replace(spec, ratio=1, overlap=False)
            whole += layers * _cache(one, form, context, page_tokens)[2]
    return Capacity(config, context, state, tuple(lines), whole)


def compressors(config: ModelConfig) -> dict[CompressorSpec, int]:
    """Every kind of compressor in a model's main layers, and the number of those that own one; no MTP layer counts."""
    specs: dict[CompressorSpec, int] = {}
    for layer in config.compressor_layers:
        for part in CompressorSpec.parts_of_layer(config, layer):
            spec = CompressorSpec.for_layer(config, layer, part)
            specs[spec] = specs.get(spec, 0) + 1
    return specs


def kind_of(config: ModelConfig, spec: CompressorSpec) -> str:
    """CSA, indexer or HCA; V4.1's have their ratio for a name."""
    if config.generation != "v4":
        return f"ratio {spec.ratio}"
    return ("indexer" if spec.rotate else "CSA") if spec.overlap else "HCA"


def exported(config: ModelConfig, spec: CompressorSpec) -> dict[str, Any]:
    """Bytes of rows in an exported request at every position: they repeat with the ratio after the first window."""
    row, r = STATE_BYTES * spec.state_dim, spec.ratio
    first, later = ([spec.seed_rows(begin + p) * row for p in range(r)] for begin in (0, r))
    name = f"{config.name} {kind_of(config, spec)}"
    return {"compressor": name, "ratio": r, "row": row, "first_window": first, "later": later}


def _line(
    config: ModelConfig,
    spec: CompressorSpec,
    layers: int,
    form: CacheFormat,
    context: int,
    draft: int,
    page_tokens: int,
) -> Line:
    row, ring_rows = STATE_BYTES * spec.state_dim, spec.required_ring_rows(draft)
    rows, pages, cache, page = _cache(spec, form, context, page_tokens)
    return Line(
        compressor=f"{config.name} {kind_of(config, spec)}",
        layers=layers,
        ratio=spec.ratio,
        format=form.name,
        ring_rows=ring_rows,
        ring=ring_rows * row,
        online=None if spec.overlap else 3 * STATE_BYTES * spec.head_dim + draft * row,
        rows=rows,
        pages=pages,
        cache=cache,
        per_token=page / (max(1, page_tokens // spec.ratio) * spec.ratio),
    )


def _cache(spec: CompressorSpec, form: CacheFormat, context: int, page_tokens: int) -> tuple[int, int, int, int]:
    """(rows, pages, bytes of them, bytes of a page) of one layer, with what lies beside the pages."""
    form.check(spec.head_dim, spec.rope_dim)
    rows, page_rows = spec.visible_rows(context), max(1, page_tokens // spec.ratio)
    pages = -(-rows // page_rows)
    outside = form.outside_bytes(spec.head_dim) * page_rows
    page = form.page_bytes(spec.head_dim, page_rows) + outside
    return rows, pages, pages * page, page
