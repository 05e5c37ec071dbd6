"""Cache files: the compressed rows of a sequence in any cache format, live state and a header, as safetensors.

``<part>.rows`` [n, count] if the format's rows are values of one type, or ``<part>.pages`` uint8 [num_pages,
page_bytes] as an engine's cache holds them; ``<part>.scales`` if scales lie outside, ``<part>.second`` [num_pages,
page_rows, count] if channels do; ``<part>.state`` [live, state_dim] fp32, the rows that the next token needs. The
header says what it is, in JSON, and holds a digest of every tensor and of itself (``files.sealed``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcondense.api import store
from kvcondense.errors import CheckpointError, require_int, require_known
from kvcondense.files import sealed
from kvcondense.files.schema import typed
from kvcondense.formats import FORMATS, CacheFormat, get_format
from kvcondense.formats.catalog import converted
from kvcondense.layout.cache import PagedCache
from kvcondense.spec import CompressorSpec

SCHEMA = 3
"""2 had no digests; it is still read."""
PAGE_TOKENS = 256
"""Tokens per page by default, as in vLLM: 64 rows of ratio 4, 2 rows of ratio 128."""
_ROWS_AT_A_TIME = 4096


@dataclass
class CachePart:
    """Rows of one compressor: row w of the sequence is cache slot w. ``converted_from``: formats that lost bits.

    weights_sha256: of each tensor (w, ape, norm) that made them; of all together in files of schema 2.
    """

    spec: CompressorSpec
    weights_sha256: dict[str, str] | str
    cache: PagedCache
    state: torch.Tensor
    converted_from: tuple[str, ...] = ()

    def header(self) -> dict[str, Any]:
        """What a reader must know."""
        return {
            "spec": self.spec.as_dict(),
            "weights_sha256": self.weights_sha256,
            "state_dtype": "float32",
            "format": self.cache.format.name,
            "page_rows": self.cache.page_rows,
            "converted_from": list(self.converted_from),
        }


@dataclass
class CacheFile:
    """The compressors of a layer after ``position`` tokens."""

    layer: int
    position: int
    last_hidden: str
    """Digest of the hidden state at position - 1."""
    parts: dict[str, CachePart]

    def header(self) -> dict[str, Any]:
        """The header of the file, as JSON holds it."""
        return {
            "schema": SCHEMA,
            "layer": self.layer,
            "position": self.position,
            "last_hidden_sha256": self.last_hidden,
            "parts": {name: part.header() for name, part in self.parts.items()},
        }

    def save(self, path: Path) -> None:
        """Write the file; ``path`` keeps its old content until the new one is complete."""
        tensors = {}
        for name, part in self.parts.items():
            n = part.spec.visible_rows(self.position)
            tensors.update({f"{name}.{k}": t for k, t in _stored(part.cache, n).items()})
            tensors[f"{name}.state"] = part.state
        sealed.save(path, self.header(), tensors)

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> CacheFile:
        """Read a file; sizes are checked before reading, digests with it. Schema 2 has none: an IntegrityWarning.

        Without ``verify`` the tensors' digests are not looked at, with the same warning; the header's is. Raises
        CheckpointError if header and tensors do not agree, or are not those that were written.
        """
        with sealed.opened(path, unsealed=(2,), verify=verify) as file:
            found = file.header
            if found.get("schema") not in (2, SCHEMA):
                raise CheckpointError(f"{path} header", f"an object of schema {SCHEMA} or 2", _short(found))
            about = typed(found, _Header, str(path))
            for key in ("position", "layer"):
                require_int(f"{path} {key}", getattr(about, key), 0)
            parts = {name: _part(file, name, part, about.position) for name, part in about.parts.items()}
        return cls(about.layer, about.position, about.last_hidden_sha256, parts)

    def convert(
        self,
        formats: dict[str, str],
        *,
        page_tokens: int = PAGE_TOKENS,
        tensor_scale: float | None = None,
        strict: bool = True,
    ) -> CacheFile:
        """The same rows in other formats, by part: decoded, then encoded again. Parts not named stay as they are.

        From fp32, and from bf16 to anything but fp32, the bytes are those of compressing into the new format at once;
        otherwise bits were lost before, and the part says so (``converted_from``). In ``strict`` mode a value that
        the new format cannot hold raises RangeError.
        """
        parts = dict(self.parts)
        for name, target in formats.items():
            require_known("part", name, parts)
            part = parts[name]
            fmt, n = get_format(target), part.spec.visible_rows(self.position)
            cache = empty_cache(part.spec, fmt, n, page_tokens=page_tokens, tensor_scale=tensor_scale, strict=strict)
            for start in range(0, n, _ROWS_AT_A_TIME):
                slots = torch.arange(start, min(n, start + _ROWS_AT_A_TIME), device="cpu")
                store(part.cache.decode_rows(slots), slots, cache)
            lost = converted(part.converted_from, part.cache.format.name, fmt.name)
            parts[name] = CachePart(part.spec, part.weights_sha256, cache, part.state, lost)
        return CacheFile(self.layer, self.position, self.last_hidden, parts)


def empty_cache(
    spec: CompressorSpec,
    fmt: CacheFormat,
    rows: int,
    *,
    page_tokens: int = PAGE_TOKENS,
    tensor_scale: float | None = None,
    strict: bool = False,
) -> PagedCache:
    """Zeroed pages for ``rows`` rows. Formats whose pages are rows and nothing else have one row a page."""
    fmt.check(spec.head_dim, spec.rope_dim)
    require_int("page_tokens", page_tokens, 1)
    page_rows = 1 if _dense(fmt) else max(1, page_tokens // spec.ratio)
    scale = tensor_scale if fmt.tensor_scale else None
    return PagedCache.allocate(
        spec.head_dim, -(-rows // page_rows), page_rows, format=fmt, tensor_scale=scale, strict=strict
    )


def first_difference(wanted: Any, found: Any, path: str = "") -> tuple[str, str, str] | None:
    """Where two JSON values differ first: (path, expected, got); None if they are equal."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in [*wanted, *(k for k in found if k not in wanted)]:
            missing = object()
            pair = wanted.get(key, missing), found.get(key, missing)
            label = f"{path}.{key}" if path else str(key)
            if missing in pair:
                return label, *("nothing" if v is missing else _short(v) for v in pair)  # type: ignore[return-value]
            if (inner := first_difference(*pair, label)) is not None:
                return inner
        return None
    return None if wanted == found else (path, _short(wanted), _short(found))


def _dense(fmt: CacheFormat) -> bool:
    return len(fmt.channels) == 1 and fmt.sections == ((fmt.channels[0].name,),) and fmt.align == 1


def _stored(cache: PagedCache, n: int) -> dict[str, torch.Tensor]:
    """The tensors that hold the first ``n`` rows of ``cache``, without what lies behind them."""
    out = {}
    if _dense(cache.format):
        out["rows"] = cache.field("rows")[:n, 0].contiguous()
    else:
        out["pages"] = cache.data[: -(-n // cache.page_rows)].contiguous()
    if cache.scales is not None:
        out["scales"] = cache.scales if cache.scales.dim() == 0 else cache.scales[:n, 0].contiguous()
    if cache.second is not None:
        out["second"] = cache.second[: -(-n // cache.page_rows)].contiguous()
    return out


def _shapes(fmt: CacheFormat, head_dim: int, n: int, page_rows: int) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and dtype of the tensors of ``_stored``."""
    out: dict[str, tuple[list[int], torch.dtype]] = {}
    if _dense(fmt):
        (field,) = fmt.fields(head_dim)
        out["rows"] = ([n, field.count], field.dtype)
    else:
        out["pages"] = ([-(-n // page_rows), fmt.page_bytes(head_dim, page_rows)], torch.uint8)
    if fmt.scales_outside:
        out["scales"] = ([] if fmt.tensor_scale else [n], torch.float32)
    if (beside := fmt.second(head_dim)) is not None:
        out["second"] = ([-(-n // page_rows), page_rows, beside.count], beside.dtype)
    return out


def _cache(fmt: CacheFormat, head_dim: int, page_rows: int, tensors: dict[str, torch.Tensor]) -> PagedCache:
    if not _dense(fmt):
        return PagedCache(tensors["pages"], fmt, head_dim, page_rows, second=tensors.get("second"))
    scales = tensors.get("scales")
    data = tensors["rows"].view(torch.uint8)
    return PagedCache(data, fmt, head_dim, 1, scales if scales is None or scales.dim() == 0 else scales[:, None])


@dataclass
class _Header:
    """What a file must say of itself."""

    schema: int
    layer: int
    position: int
    last_hidden_sha256: str
    parts: dict[str, Any]


@dataclass
class _About:
    """What it must say of a part."""

    spec: dict[str, Any]
    weights_sha256: dict[str, str] | str
    format: str
    page_rows: int
    converted_from: list[str]


def _part(file: sealed.Sealed, name: str, entries: Any, position: int) -> CachePart:
    """One compressor of an open file, checked against its header before any tensor is read."""
    label = f"{file.name} parts.{name}"
    about = typed(entries, _About, label)
    spec = CompressorSpec.from_dict(about.spec, f"{label} spec")
    page_rows = require_int(f"{label} page_rows", about.page_rows, 1)
    for one in (about.format, *about.converted_from):
        require_known(f"{label} format", one, FORMATS, error=CheckpointError)
    fmt = get_format(about.format)
    fmt.check(spec.head_dim, spec.rope_dim)
    n, live = spec.visible_rows(position), position - spec.live_start(position)
    shapes = {"state": ([live, spec.state_dim], torch.float32), **_shapes(fmt, spec.head_dim, n, page_rows)}
    tensors = {key: file.tensor(f"{name}.{key}", *wanted) for key, wanted in shapes.items()}
    cache = _cache(fmt, spec.head_dim, page_rows, tensors)
    return CachePart(spec, about.weights_sha256, cache, tensors["state"], tuple(about.converted_from))


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
