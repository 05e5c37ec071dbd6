"""Cache files: the compressed rows of a sequence in any cache format, live state and a header, as safetensors.

``<part>.rows`` [n, count] if the format's rows are values of one type, or ``<part>.pages`` uint8 [num_pages,
page_bytes] as an engine's cache holds them; ``<part>.scales`` if scales lie outside, ``<part>.second`` [num_pages,
page_rows, count] if channels do; ``<part>.state`` [live, state_dim] fp32, the rows that the next token needs. The
header says what it is, in JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from kvcondense.api import store
from kvcondense.errors import CheckpointError, require_int, require_known
from kvcondense.files import replacing
from kvcondense.formats import FORMATS, CacheFormat, get_format
from kvcondense.layout.cache import PagedCache
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import open_safetensors

SCHEMA = 2
PAGE_TOKENS = 256
"""Tokens per page by default, as in vLLM: 64 rows of ratio 4, 2 rows of ratio 128."""
_HEADER = "kvcondense"
_MAX_HEADER_BYTES = 1 << 20
_ROWS_AT_A_TIME = 4096


@dataclass
class CachePart:
    """Rows of one compressor: row w of the sequence is cache slot w. ``converted_from``: formats that lost bits."""

    spec: CompressorSpec
    weights_sha256: str
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
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = {}
        for name, part in self.parts.items():
            n = part.spec.visible_rows(self.position)
            tensors.update({f"{name}.{k}": t for k, t in _stored(part.cache, n).items()})
            tensors[f"{name}.state"] = part.state
        header = {_HEADER: json.dumps(self.header(), sort_keys=True)}
        with replacing(path) as made:
            try:
                save_file(tensors, made, metadata=header)
            except SafetensorError as error:  # a full disk
                raise CheckpointError(str(path), "room for the file", error) from error

    @classmethod
    def load(cls, path: Path) -> CacheFile:
        """Read a file; raises CheckpointError if header and tensors do not agree. Sizes are checked before reading."""
        with open_safetensors(path) as handle:
            found = _read_header(path, handle.metadata() or {})
            position, layer = (require_int(f"{path} {key}", found.get(key), 0) for key in ("position", "layer"))
            digest, entries = _entry(path, found, "last_hidden_sha256", str), _entry(path, found, "parts", dict)
            parts = {name: _part(path, handle, name, about, position) for name, about in entries.items()}
        return cls(layer, position, digest, parts)

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
                slots = torch.arange(start, min(n, start + _ROWS_AT_A_TIME))
                store(part.cache.decode_rows(slots), slots, cache)
            source = part.cache.format.name
            exact = source in ("fp32", fmt.name) or (source == "bf16" and fmt.name != "fp32")
            lost = part.converted_from if exact else (*part.converted_from, source)
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


def _part(path: Path, handle: Any, name: str, about: Any, position: int) -> CachePart:
    """One compressor of an open file, checked against its header before any tensor is read."""
    label = f"{path} parts.{name}"
    if not isinstance(about, dict):
        raise CheckpointError(label, "an object", _short(about))
    spec, fmt = _spec(label, about), _format(label, about)
    page_rows = require_int(f"{label} page_rows", about.get("page_rows"), 1)
    fmt.check(spec.head_dim, spec.rope_dim)
    n, live = spec.visible_rows(position), position - spec.live_start(position)
    shapes = {"state": ([live, spec.state_dim], torch.float32), **_shapes(fmt, spec.head_dim, n, page_rows)}
    tensors = {key: _tensor(path, handle, f"{name}.{key}", *wanted) for key, wanted in shapes.items()}
    return CachePart(
        spec,
        _entry(label, about, "weights_sha256", str),
        _cache(fmt, spec.head_dim, page_rows, tensors),
        tensors["state"],
        tuple(get_format(f).name for f in _entry(label, about, "converted_from", list)),
    )


def _tensor(path: Path, handle: Any, name: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    if name not in handle.keys():  # noqa: SIM118 - a handle is no dict
        raise CheckpointError(f"{path} {name}", "a tensor", "nothing")
    got = list(handle.get_slice(name).get_shape())
    if got != shape:
        raise CheckpointError(f"{path} {name}", f"shape {shape}", f"shape {got}")
    tensor = handle.get_tensor(name)
    if tensor.dtype != dtype:
        raise CheckpointError(f"{path} {name}", str(dtype), tensor.dtype)
    return tensor


def _spec(label: str, about: dict[str, Any]) -> CompressorSpec:
    entry = _entry(label, about, "spec", dict)
    names = {f.name for f in fields(CompressorSpec)}
    if set(entry) != names:
        raise CheckpointError(f"{label} spec", f"the entries {', '.join(sorted(names))}", _short(entry))
    profiles = {r.value: r for r in Rounding}
    if entry["rounding"] not in profiles:
        raise CheckpointError(f"{label} spec.rounding", " or ".join(profiles), _short(entry["rounding"]))
    for name in ("overlap", "rotate", "has_ape", "has_gate"):
        if not isinstance(entry[name], bool):
            raise CheckpointError(f"{label} spec.{name}", "true or false", _short(entry[name]))
    return CompressorSpec(**{**entry, "rounding": profiles[entry["rounding"]]})


def _format(label: str, about: dict[str, Any]) -> CacheFormat:
    name = _entry(label, about, "format", str)
    require_known(f"{label} format", name, FORMATS, error=CheckpointError)
    return FORMATS[name]


def _entry(label: object, found: dict[str, Any], key: str, kind: type) -> Any:
    value = found.get(key)
    if not isinstance(value, kind):
        raise CheckpointError(f"{label} {key}", f"a JSON {kind.__name__}", _short(value))
    return value


def _read_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get(_HEADER)
    if text is None or len(text) > _MAX_HEADER_BYTES:
        raise CheckpointError(str(path), f"a {_HEADER!r} header of at most {_MAX_HEADER_BYTES} bytes", "none")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} header", "a JSON object", error) from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} header", f"an object of schema {SCHEMA}", _short(header))
    return header


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
