"""PagedCache: backing bytes of compressed rows and typed views of them. No copies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvcondense.errors import (
    DeviceError,
    DtypeError,
    KvCondenseError,
    RangeError,
    ShapeError,
    UnsupportedError,
    require_known,
)
from kvcondense.formats import CacheFormat, format_of_dtype, get_format
from kvcondense.formats.descriptor import SCALES, check_tensor_scale
from kvcondense.layout.memory import check_written


@dataclass
class PagedCache:
    """Pages of compressed rows: ``data`` uint8 [num_pages, page_bytes], pages at any stride.

    Slot s is row s % page_rows of page s // page_rows. ``scales``: fp32 scales of formats that keep them outside the
    pages, [num_pages, page_rows] or one for the whole cache []. ``second``: [num_pages, page_rows, count], the second
    buffer of formats that have one (``CacheFormat.second``), pages at any stride. ``strict`` is the validation mode: a
    row that the format cannot hold (a saturated value, an infinity) raises RangeError before anything is written.
    """

    data: torch.Tensor
    format: CacheFormat
    head_dim: int
    page_rows: int
    scales: torch.Tensor | None = None
    strict: bool = False
    second: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.check_memory()

    def check_memory(self) -> None:
        """Raise unless the tensors hold these pages: their shapes, types and strides. They may have been exchanged."""
        for name, value in (("head_dim", self.head_dim), ("page_rows", self.page_rows)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RangeError(name, "an integer of at least 1", repr(value))
        self.format.check_page_rows(self.page_rows)
        payload = self.page_rows * self.format.row_bytes(self.head_dim)
        page = self.format.page_bytes(self.head_dim, self.page_rows)
        if self.data.dtype != torch.uint8:
            raise DtypeError("cache data", "uint8 bytes", self.data.dtype)
        if self.data.dim() != 2 or self.data.shape[1] not in (payload, page) or self.data.stride(1) != 1:
            wanted = f"{page}" if payload == page else f"{page} (or {payload}, without the page's tail)"
            raise ShapeError("cache data", f"shape [num_pages, {wanted}], bytes in order", f"{list(self.data.shape)}")
        check_written("cache data", self.data)
        self._check_second()
        wanted = self.format.scale_shape(self.data.shape[0], self.page_rows)
        if (wanted is None) != (self.scales is None):
            raise KvCondenseError("scales", "None" if wanted is None else f"fp32 {list(wanted)}", f"{self.scales}")
        if self.scales is not None:
            if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != wanted:
                raise ShapeError("scales", f"fp32 {wanted}", f"{self.scales.dtype} {list(self.scales.shape)}")
            if self.scales.device != self.data.device:
                raise DeviceError("scales", f"device {self.data.device}", self.scales.device)
            if self.scales.dim() == 2 and self.scales.stride(1) != 1:
                raise ShapeError("scales", "scales of a page one behind the other", f"strides {self.scales.stride()}")
            check_written("scales", self.scales)

    def _check_second(self) -> None:
        field, got = self.format.second(self.head_dim), self.second
        if field is None or got is None:
            if (field is None) != (got is None):
                wanted = "None" if field is None else f"a tensor of {field.name}, {field.dtype}"
                raise KvCondenseError(
                    "second", f"{wanted} for {self.format.name}", "a tensor" if got is not None else got
                )
            return
        shape = (self.data.shape[0], self.page_rows, field.count)
        if tuple(got.shape) != shape or got.stride(2) != 1 or got.stride(1) != field.count:
            raise ShapeError("second", f"{list(shape)}, contiguous within a page", f"{list(got.shape)} {got.stride()}")
        if got.dtype != field.dtype:
            raise DtypeError("second", f"{field.dtype} for {self.format.name}", got.dtype)
        if got.device != self.data.device:
            raise DeviceError("second", f"device {self.data.device}", got.device)
        check_written("second", got)

    @classmethod
    def allocate(
        cls,
        head_dim: int,
        num_pages: int,
        page_rows: int,
        *,
        format: str | CacheFormat = "bf16",
        tensor_scale: float | None = None,
        strict: bool = False,
        device: torch.device | str = "cpu",
    ) -> PagedCache:
        """Zeroed pages of ``page_rows`` rows of ``head_dim`` channels.

        ``tensor_scale`` is the scale of formats that have one for the whole cache. Raises RangeError for a size that
        makes no sense and UnsupportedError for a head_dim that the format does not have.
        """
        for name, value, low in (("head_dim", head_dim, 1), ("num_pages", num_pages, 0), ("page_rows", page_rows, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise RangeError(name, f"an integer of at least {low}", repr(value))
        fmt = get_format(format) if isinstance(format, str) else format
        fmt.check_page_rows(page_rows)
        if fmt.tensor_scale != (tensor_scale is not None):
            wanted = "a positive number" if fmt.tensor_scale else "None"
            raise KvCondenseError("tensor_scale", f"{wanted} for {fmt.name}", tensor_scale)
        data = torch.zeros(num_pages, fmt.page_bytes(head_dim, page_rows), dtype=torch.uint8, device=device)
        shape, scales = fmt.scale_shape(num_pages, page_rows), None
        if shape is not None:
            fill = 0.0 if tensor_scale is None else check_tensor_scale(tensor_scale)
            scales = torch.full(shape, fill, dtype=torch.float32, device=device)
        field, second = fmt.second(head_dim), None
        if field is not None:
            second = torch.zeros(num_pages, page_rows, field.count, dtype=field.dtype, device=device)
        return cls(data, fmt, head_dim, page_rows, scales, strict, second)

    @classmethod
    def wrap(
        cls,
        rows: torch.Tensor,
        *,
        format: str | CacheFormat | None = None,
        head_dim: int | None = None,
        scales: torch.Tensor | None = None,
        second: torch.Tensor | None = None,
    ) -> PagedCache:
        """An engine's own tensor [num_pages, page_rows, n], written in place; pages may lie at any stride.

        n elements make up the bytes of account of a row, as engines shape it: [.., 584] uint8 for ``fp8_model1``.
        Within a page, the format's byte map counts, not the shape. rows are uint8, or of the type of the format's
        codes (``CacheFormat.typed``). Without ``format``, the dtype says it (bf16 or fp32). ``head_dim`` is needed
        where neither the format nor n tells. Raises DtypeError for a type that contradicts the format, ShapeError for
        rows of another size.
        """
        if rows.dim() != 3 or rows.stride(2) != 1 or rows.stride(1) != rows.shape[2]:
            raise ShapeError("rows", "[num_pages, page_rows, n], contiguous within a page", f"{list(rows.shape)}")
        if format is None:
            fmt = format_of_dtype(rows.dtype)
        else:
            fmt = get_format(format) if isinstance(format, str) else format
        if rows.dtype not in (torch.uint8, *fmt.typed):
            raise DtypeError("rows", " or ".join(map(str, (torch.uint8, *fmt.typed))) + f" for {fmt.name}", rows.dtype)
        if head_dim is None:
            head_dim = fmt.head_dim or rows.shape[2]
        if rows.shape[2] * rows.dtype.itemsize != fmt.row_bytes(head_dim):
            raise ShapeError(
                "rows",
                f"{fmt.row_bytes(head_dim)} bytes a row for {fmt.name}",
                f"{rows.shape[2] * rows.dtype.itemsize} bytes",
            )
        data = rows.as_strided((rows.shape[0], rows.shape[1] * rows.shape[2]), (rows.stride(0), 1))
        return cls(data.view(torch.uint8), fmt, head_dim, rows.shape[1], scales, second=second)

    @property
    def memory(self) -> tuple[torch.Tensor, ...]:
        """What a step writes."""
        return tuple([t for t in (self.data, self.scales, self.second) if t is not None])

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The same by name."""
        named = {"cache": self.data, "cache scales": self.scales, "cache second": self.second}
        return {name: t for name, t in named.items() if t is not None}

    def copy(self) -> PagedCache:
        """The same bytes in memory of their own."""
        held = {"data": self.data, "scales": self.scales, "second": self.second}
        return replace(self, **{name: t.clone() for name, t in held.items() if t is not None})

    def fill(self, byte: int) -> None:
        """Set every byte of the pages and of the second buffer, but no scale beside them."""
        self.data.fill_(byte)
        if self.second is not None:
            self.second.view(torch.uint8).fill_(byte)

    @property
    def num_rows(self) -> int:
        """Slots in all pages."""
        return self.data.shape[0] * self.page_rows

    @property
    def rows(self) -> torch.Tensor:
        """View [num_pages, page_rows, head_dim] in the element type of a plain format (bf16, fp32)."""
        if self.format.plain is None:
            names = ", ".join(f.name for f in self.format.fields(self.head_dim))
            raise UnsupportedError("rows", f"a plain format (use field: {names}; or decode_rows)", self.format.name)
        return self.field("rows")

    def field(self, name: str) -> torch.Tensor:
        """View [num_pages, page_rows, count] of one field of the pages, or of what lies beside them.

        Of a field in tiles, [num_pages, page_rows / t, count / t, t, t]: tile of rows, of bytes, row in it, byte in it.
        """
        if name == SCALES and self.scales is not None and self.scales.dim() == 2:
            return self.scales[:, :, None]
        beside = self.format.second(self.head_dim)
        if beside is not None and name == beside.name:
            assert self.second is not None
            return self.second
        fields = {f.name: f for f in self.format.fields(self.head_dim)}
        require_known("field", name, fields, error=RangeError)
        f = fields[name]
        begin = f.base * self.page_rows
        section = self.data[:, begin : begin + f.stride * self.page_rows]
        if f.tile > 1:
            return section.unflatten(1, (self.page_rows // f.tile, f.stride // f.tile, f.tile, f.tile))
        section = section.unflatten(1, (self.page_rows, f.stride))
        return section[:, :, f.offset : f.offset + f.nbytes].view(f.dtype)

    def encode(self, rows: torch.Tensor, exact: bool = False) -> dict[str, torch.Tensor]:
        """``CacheFormat.encode``: rows [E, d] -> fields [E, count]; in validation mode, RangeError if one is lost."""
        stored = self.format.encode(rows, self.tensor_scale, exact)
        if self.strict:
            lost = self.format.lost(rows, stored, self.tensor_scale, exact).nonzero()
            if lost.shape[0]:
                row, channel = lost[0].tolist()
                got = f"{rows[row, channel].item()!r} in channel {channel}, and {lost.shape[0] - 1} more"
                raise RangeError(f"row {row}", f"values that {self.format.name} can hold", got)
        return stored

    def put(self, slot: torch.Tensor, stored: dict[str, torch.Tensor]) -> None:
        """Write encoded rows (``CacheFormat.encode``) to their slots [E], all of them legal."""
        page, at = slot // self.page_rows, slot % self.page_rows
        for name, values in stored.items():
            view = self.field(name)
            if view.dim() == 5:
                t = view.shape[4]
                view[page, at // t, :, at % t] = values.unflatten(1, (-1, t))
            else:
                view[page, at] = values

    def get(self, slot: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encoded rows at the slots [E], field by field, as ``put`` takes them."""
        page, at = slot // self.page_rows, slot % self.page_rows
        names = [f.name for f in self.format.fields(self.head_dim)]
        if self.scales is not None and self.scales.dim() == 2:
            names.append(SCALES)
        if (beside := self.format.second(self.head_dim)) is not None:
            names.append(beside.name)
        return {name: self._taken(self.field(name), page, at) for name in names}

    @staticmethod
    def _taken(view: torch.Tensor, page: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if view.dim() == 3:
            return view[page, at]
        return view[page, at // view.shape[4], :, at % view.shape[4]].flatten(1)

    @property
    def tensor_scale(self) -> torch.Tensor | None:
        """The scale of the whole cache, fp32 [], if the format has one."""
        return self.scales if self.format.tensor_scale else None

    def decode_rows(self, slot_mapping: torch.Tensor) -> torch.Tensor:
        """What a reader sees: the rows at slot_mapping [E] as fp32 [E, head_dim], q * s; zeros for slot -1.

        slot_mapping int32 or int64. Raises DtypeError or RangeError if a slot is neither -1 nor a row of the cache.
        """
        if slot_mapping.dtype not in (torch.int32, torch.int64) or slot_mapping.dim() != 1:
            raise DtypeError("slot_mapping", "int32 or int64 [E]", f"{slot_mapping.dtype} {list(slot_mapping.shape)}")
        slot = slot_mapping.to(torch.int64)
        if bool(((slot < -1) | (slot >= self.num_rows)).any()):
            wrong = slot[(slot < -1) | (slot >= self.num_rows)]
            raise RangeError("slot_mapping", f"-1 or a cache row below {self.num_rows}", int(wrong[0]))
        rows = torch.zeros(slot.shape[0], self.head_dim, dtype=torch.float32, device=self.data.device)
        live = slot >= 0
        rows[live] = self.format.decode(self.get(slot[live]), self.tensor_scale)
        return rows
