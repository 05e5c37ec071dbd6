"""Where one compressor of one request is held: its state, and the cache pages of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvcondense.backends import Backend
from kvcondense.errors import RangeError, ShapeError
from kvcondense.formats import CacheFormat
from kvcondense.formats.descriptor import SCALES
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState
from kvcondense.layout.state import StatePool
from kvcondense.spec import CompressorSpec


@dataclass(frozen=True)
class Held:
    """One compressor of one request, as an engine holds it.

    batch: ``RaggedBatch.at``, where the request stands (or is to stand) and its state slot or pages. pages: the cache
    pages of its rows 0, 1, ..., in order, int [pages]. ape and impl: as ``snapshot.save_live`` takes them.
    """

    spec: CompressorSpec
    state: StatePool | OnlineState
    batch: RaggedBatch
    cache: PagedCache
    pages: torch.Tensor | Sequence[int]
    ape: torch.Tensor | None = None
    impl: str | Backend = "auto"

    @property
    def position(self) -> int:
        """Where the request stands; raises ShapeError if there is not one request."""
        if self.batch.start_positions.shape[0] != 1:
            raise ShapeError("batch", "one request", f"{self.batch.start_positions.shape[0]}")
        position = int(self.batch.start_positions[0])
        if position < 0:
            raise RangeError("batch", "a request at position 0 or later", position)
        return position

    def slots(self, first: int, last: int) -> torch.Tensor:
        """Cache slots of rows first .. last - 1; raises unless the cache has a page of its own for each."""
        each, used = self.cache.page_rows, self._used(last)
        row = torch.arange(first, last, device=used.device)
        return used[row // each] * each + row % each

    def take(self, first: int, last: int) -> dict[str, torch.Tensor]:
        """Rows first .. last - 1 as their format has them: field -> [rows, elements], copies."""
        cache, each, used = self.cache, self.cache.page_rows, self._used(last)
        if cache.format.tile > 1:
            return cache.get(self.slots(first, last))
        begin = first // each
        cut = slice(first - begin * each, last - begin * each)
        # By whole pages: picking single rows of bytes takes five times as long.
        names = fields_of(cache.format, cache.head_dim)
        return {name: cache.field(name).index_select(0, used[begin:]).flatten(0, 1)[cut] for name in names}

    def put(self, fields: dict[str, torch.Tensor]) -> None:
        """Write rows 0, 1, ... ; what else a page may hold stays."""
        cache, each = self.cache, self.cache.page_rows
        count = next(iter(fields.values())).shape[0]
        whole = 0 if cache.format.tile > 1 else count // each
        used = self._used(count)
        fields = {name: t.to(used.device) for name, t in fields.items()}
        for name, t in fields.items():
            if whole:
                cache.field(name).index_copy_(0, used[:whole], t[: whole * each].unflatten(0, (whole, each)))
        cache.put(self.slots(whole * each, count), {name: t[whole * each :] for name, t in fields.items()})

    def _used(self, last: int) -> torch.Tensor:
        """The pages of rows 0 .. last - 1, int64, checked."""
        each, pages = self.cache.page_rows, torch.as_tensor(self.pages, device=self.cache.data.device).to(torch.int64)
        if pages.dim() != 1 or pages.shape[0] * each < last:
            raise ShapeError("pages", f"[pages], at least {-(-last // each)} for {last} rows", f"{list(pages.shape)}")
        used = pages[: -(-last // each)]
        if bool(((used < 0) | (used >= self.cache.data.shape[0])).any()) or used.unique().shape != used.shape:
            raise RangeError("pages", f"pages of their own in 0..{self.cache.data.shape[0] - 1}", used.tolist()[:16])
        return used


def fields_of(fmt: CacheFormat, head_dim: int) -> dict[str, tuple[torch.dtype, int]]:
    """Field -> (dtype, elements of a row): what ``PagedCache.get`` gives of a row, whatever the page size.

    Wide types first: one behind the other, fields of any number of rows are then aligned.
    """
    # By the descriptor, not by a page: head_dim is what a file says.
    found = {f.name: (f.dtype, f.count) for f in fmt.fields(head_dim)}
    if fmt.scales_outside and not fmt.tensor_scale:
        found[SCALES] = (torch.float32, 1)
    if (beside := fmt.second(head_dim)) is not None:
        found[beside.name] = (beside.dtype, beside.count)
    return dict(sorted(found.items(), key=lambda item: -item[1][0].itemsize))


def row_bytes(fmt: CacheFormat, head_dim: int) -> int:
    """Bytes of a row's fields."""
    return sum(dtype.itemsize * count for dtype, count in fields_of(fmt, head_dim).values())


def split(data: torch.Tensor, fmt: CacheFormat, head_dim: int) -> dict[str, torch.Tensor]:
    """Rows' fields out of their bytes, one field behind the other: [rows, elements] each, views."""
    found, at, rows = {}, 0, data.shape[0] // row_bytes(fmt, head_dim)
    for name, (dtype, count) in fields_of(fmt, head_dim).items():
        size = rows * count * dtype.itemsize
        found[name] = data[at : at + size].view(dtype).view(rows, count)
        at += size
    return found
