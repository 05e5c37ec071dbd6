"""The compressors that the kit asks for, each a line of words: a name, and what differs from it in size or format."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvcondense.config import ModelConfig
from kvcondense.errors import KvCondenseError, RangeError, UnsupportedError
from kvcondense.formats import FORMATS, CacheFormat
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding

# Flash with narrow heads: real theta, YaRN and eps; ratios 4 (overlapping) and 128.
CONFIG = replace(ModelConfig.FLASH, name="small", hidden_size=64, head_dim=64, rope_dim=16, index_head_dim=32)
_NAMED = {
    "csa": CompressorSpec.csa(CONFIG),
    "hca": CompressorSpec.hca(CONFIG),
    "indexer": CompressorSpec.indexer(CONFIG),
    "fused": replace(CompressorSpec.hca(CONFIG), ratio=8, rounding=Rounding.FUSED),
    "r2": replace(CompressorSpec.hca(CONFIG), ratio=2, has_ape=False, eps=1e-20),
}
SMALL = tuple(_NAMED)
"""Narrow heads, for implementations that take any: every history costs little."""
REAL = ("csa head_dim=512 rope_dim=64", "hca head_dim=512 rope_dim=64", "indexer head_dim=128 rope_dim=64")
"""DeepSeek-V4's own sizes, for kernels that have them built in."""
_PAGE_ROWS = 4
_TABLES: dict[ModelConfig, RopeTable] = {}


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text]


_FIELDS: dict[str, Callable[[str], object]] = {
    "ratio": int,
    "head_dim": int,
    "rope_dim": int,
    "overlap": _flag,
    "rotate": _flag,
    "has_ape": _flag,
    "eps": float,
    "rounding": Rounding,
    "format": FORMATS.__getitem__,
    "page_rows": int,
}
_MOST = {"ratio": 1024, "head_dim": 4096, "rope_dim": 4096, "page_rows": 4096}


@dataclass(frozen=True)
class Compressor:
    """A compressor, the format of its cache, and the rows of a cache page."""

    spec: CompressorSpec
    format: CacheFormat = FORMATS["bf16"]
    page_rows: int = _PAGE_ROWS

    @property
    def page_bytes(self) -> int:
        """Of one page, from the beginning of one to the beginning of the next."""
        return self.format.page_bytes(self.spec.head_dim, self.page_rows)


def config_of(spec: CompressorSpec) -> ModelConfig:
    """A model with such heads: what a RoPE table is built from."""
    return replace(CONFIG, head_dim=spec.head_dim, rope_dim=spec.rope_dim)


def rope_of(spec: CompressorSpec, positions: int) -> RopeTable:
    """A table of one's own. The longest of a model is kept: a row does not depend on those behind it."""
    config = config_of(spec)
    kept = _TABLES.get(config)
    if kept is None or kept.cos.shape[0] < positions:
        kept = _TABLES[config] = RopeTable.build(config, 1 << (positions - 1).bit_length())
    return RopeTable(kept.cos[:positions].clone(), kept.sin[:positions].clone())


@functools.cache
def compressor(words: str) -> Compressor:
    """The compressor of a line: csa, hca, indexer, fused or r2, then any of the fields that differ.

    ``csa head_dim=512 rope_dim=64 format=fp8_model1 page_rows=64``: ratio, head_dim, rope_dim, overlap, rotate,
    has_ape, eps and rounding of ``CompressorSpec``, format of ``FORMATS`` (bf16 by default), page_rows of a cache page
    (4 by default). Raises a KvCondenseError that names the word which is not understood or does not fit.
    """
    name, *changes = words.split()[:32] if isinstance(words, str) and words.strip() else [""]
    if name not in _NAMED:
        raise UnsupportedError("compressor", f"one of {', '.join(_NAMED)}, then field=value", repr(words)[:200])
    found: dict[str, object] = {}
    for word in changes:
        field, equals, text = word.partition("=")
        if field not in _FIELDS or not equals or field in found:
            raise UnsupportedError("compressor", f"field=value, once, of {', '.join(_FIELDS)}", repr(word)[:200])
        try:
            found[field] = _FIELDS[field](text)
        except (ValueError, KeyError, OverflowError) as error:
            raise RangeError(f"compressor {field}", "a value that it can have", repr(text)[:200]) from error
        if field in _MOST and not 0 <= int(text) <= _MOST[field]:
            raise RangeError(f"compressor {field}", f"at most {_MOST[field]}", int(text))
    form, page_rows = found.pop("format", FORMATS["bf16"]), found.pop("page_rows", _PAGE_ROWS)
    assert isinstance(form, CacheFormat)
    assert isinstance(page_rows, int)
    spec = replace(_NAMED[name], **found)  # type: ignore[arg-type]
    form.check(spec.head_dim, spec.rope_dim)
    if page_rows < 1:
        raise RangeError("compressor page_rows", "at least 1", page_rows)
    form.check_page_rows(page_rows)
    return Compressor(spec, form, page_rows)


def require(names: tuple[str, ...]) -> None:
    """Raise unless every line is one of a compressor, and none is there twice."""
    if not names:
        raise KvCondenseError("specs", "a compressor at least", "none")
    for name in names:
        compressor(name)
    if len(set(names)) < len(names):
        raise KvCondenseError("specs", "every compressor once", ", ".join(names))
