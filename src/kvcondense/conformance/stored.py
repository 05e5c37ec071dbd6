"""Rows as they are stored, byte by byte: from a cache to one line of bytes a row, and back to fields and values."""

from __future__ import annotations

import torch

from kvcondense.errors import DtypeError, ShapeError
from kvcondense.formats import CacheFormat
from kvcondense.formats.descriptor import PAD, SCALES
from kvcondense.golden.run import CANARY, TENSOR_SCALE
from kvcondense.layout.cache import PagedCache


def stored(cache: PagedCache, slots: torch.Tensor) -> torch.Tensor:
    """The rows at slots [n], as ``Adapter.rows`` returns them.

    [n, head_dim] in the cache's own type for bf16 and fp32; otherwise uint8 [n, bytes]: the fields of the format one
    after the other, then its scales or its second buffer if they lie beside the pages.
    """
    if cache.format.plain is not None:
        return cache.rows[slots // cache.page_rows, slots % cache.page_rows]
    return torch.cat([t.contiguous().view(torch.uint8).flatten(1) for t in cache.get(slots).values()], dim=1)


def parts(form: CacheFormat, head_dim: int) -> list[tuple[str, torch.dtype, int]]:
    """The fields of a row in the order of ``stored``: name, type, count."""
    found = [(f.name, f.dtype, f.count) for f in form.fields(head_dim)]
    if form.scales_outside and not form.tensor_scale:
        found.append((SCALES, torch.float32, 1))
    if (beside := form.second(head_dim)) is not None:
        found.append((beside.name, beside.dtype, beside.count))
    return found


def check(form: CacheFormat, head_dim: int, rows: torch.Tensor, count: int, *, exact: bool = False) -> None:
    """Raise unless ``rows`` are ``count`` rows of that format, as ``stored`` has them.

    exact: rows of bf16 and fp32 in the format's own type, not in the other one, which holds the same values.
    """
    if not isinstance(rows, torch.Tensor):
        raise DtypeError("rows", "a tensor", type(rows).__name__)
    if form.plain is not None:
        shape = (count, head_dim)
        types = (form.plain.dtype,) if exact else (torch.bfloat16, torch.float32)
    else:
        sizes = (n * dtype.itemsize for _, dtype, n in parts(form, head_dim))
        shape, types = (count, sum(sizes)), (torch.uint8,)
    if rows.dtype not in types:
        raise DtypeError("rows", f"{' or '.join(map(str, types))} for {form.name}", rows.dtype)
    if tuple(rows.shape) != shape:
        raise ShapeError("rows", f"{list(shape)} for {form.name}", list(rows.shape))


def fields(form: CacheFormat, head_dim: int, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of bytes -> the fields that ``CacheFormat.decode`` takes."""
    found, begin = {}, 0
    for name, dtype, count in parts(form, head_dim):
        end = begin + count * dtype.itemsize
        found[name] = rows[:, begin:end].contiguous().view(dtype)
        begin = end
    return found


def values(form: CacheFormat, head_dim: int, rows: torch.Tensor) -> torch.Tensor:
    """What a reader sees: rows of ``stored`` -> [n, head_dim] fp32."""
    if form.plain is not None:
        return rows.float()
    scale = torch.tensor(TENSOR_SCALE) if form.tensor_scale else None
    return form.decode(fields(form, head_dim, rows), scale)


def name_byte(form: CacheFormat, head_dim: int, index: int) -> str:
    """What byte ``index`` of a row of ``stored`` is: "scales[3]"."""
    for name, dtype, count in parts(form, head_dim):
        if index < count * dtype.itemsize:
            return f"{name}[{index // dtype.itemsize}]"
        index -= count * dtype.itemsize
    return "nothing"


def pad_of(form: CacheFormat, head_dim: int, rows: torch.Tensor) -> torch.Tensor:
    """The bytes that must be 0: [n, pad]."""
    return fields(form, head_dim, rows).get(PAD, rows[:, :0])


def new_cache(form: CacheFormat, head_dim: int, num_pages: int, page_rows: int) -> PagedCache:
    """Pages full of :data:`CANARY`; of a cache beyond 2^30 bytes, pages that nobody has touched, which cost no memory.

    Scales beside the pages are canaries, too; the scale of a whole cache is :data:`TENSOR_SCALE`.
    """
    page_bytes = form.page_bytes(head_dim, page_rows)
    data = torch.empty(num_pages, page_bytes, dtype=torch.uint8)
    shape, beside = form.scale_shape(num_pages, page_rows), form.second(head_dim)
    scales = None if shape is None else torch.empty(shape)
    second = None if beside is None else torch.empty(num_pages, page_rows, beside.count, dtype=beside.dtype)
    cache = PagedCache(data, form, head_dim, page_rows, scales, second=second)
    if scales is not None and form.tensor_scale:
        scales.fill_(TENSOR_SCALE)
    if num_pages * page_bytes < 1 << 30:
        cache.fill(CANARY)
        if scales is not None and not form.tensor_scale:
            scales.view(torch.uint8).fill_(CANARY)
    return cache
