"""PagedCache: backing bytes of compressed rows and typed views of them. No copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.errors import DtypeError, RangeError, ShapeError
from kvcondense.formats import FORMATS, CacheFormat, get_format


@dataclass
class PagedCache:
    """Pages of compressed rows: ``data`` uint8 [num_pages, page_bytes].

    Slot s is row s % page_rows of page s // page_rows.
    """

    data: torch.Tensor
    format: CacheFormat
    head_dim: int
    page_rows: int

    def __post_init__(self) -> None:
        page_bytes = self.format.page_bytes(self.head_dim, self.page_rows)
        if self.data.dtype != torch.uint8:
            raise DtypeError("cache data", "uint8 bytes", self.data.dtype)
        if self.data.dim() != 2 or self.data.shape[1] != page_bytes:
            raise ShapeError("cache data", f"shape [num_pages, {page_bytes}]", f"shape {list(self.data.shape)}")

    @classmethod
    def allocate(
        cls,
        head_dim: int,
        num_pages: int,
        page_rows: int,
        *,
        format: str = "bf16",
        device: torch.device | str = "cpu",
    ) -> PagedCache:
        """Zeroed pages of ``page_rows`` rows of ``head_dim`` channels."""
        for name, value, low in (("head_dim", head_dim, 1), ("num_pages", num_pages, 0), ("page_rows", page_rows, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RangeError(name, f"an integer of at least {low}", repr(value))
        fmt = get_format(format)
        data = torch.zeros(num_pages, fmt.page_bytes(head_dim, page_rows), dtype=torch.uint8, device=device)
        return cls(data, fmt, head_dim, page_rows)

    @classmethod
    def wrap(cls, rows: torch.Tensor) -> PagedCache:
        """An engine's own tensor [num_pages, page_rows, head_dim], written in place; the dtype says the format."""
        formats = {f.element: f for f in FORMATS.values()}
        if rows.dtype not in formats:
            raise DtypeError("rows", " or ".join(map(str, formats)), rows.dtype)
        if rows.dim() != 3 or not rows.is_contiguous():
            raise ShapeError("rows", "a contiguous [num_pages, page_rows, head_dim]", f"{list(rows.shape)}")
        return cls(rows.flatten(1).view(torch.uint8), formats[rows.dtype], rows.shape[2], rows.shape[1])

    @property
    def num_rows(self) -> int:
        """Slots in all pages."""
        return self.data.shape[0] * self.page_rows

    @property
    def rows(self) -> torch.Tensor:
        """View [num_pages, page_rows, head_dim] in the element type of the format."""
        return self.data.view(self.format.element).view(-1, self.page_rows, self.head_dim)
