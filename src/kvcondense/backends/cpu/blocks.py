"""Blocks of 64-bit integers that a kernel is called with: a class lists the fields once, for host and kernels.

The host assigns fields by name and packs them; kernels read the same names (``kernels.fields``). Slots and a packer
made for the class cost less than an array of positional values does.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from struct import Struct
from typing import Annotated, Any, get_type_hints

LINE = 64
"""Bytes of a cache line."""


def whole_lines(size: int) -> int:
    """``size`` bytes, rounded up: what follows begins a line, and no vector there crosses one."""
    return -(-size // LINE) * LINE


@dataclass(frozen=True)
class Behind:
    """Stands behind the values, not among them: the host gives nothing for it, a kernel takes its address.

    of: the block that it is the first of, None for plain integers; room: how many of them the packed block has; align:
    where it begins.
    """

    of: type[Block] | None = None
    room: int = 0
    align: int = 8


TABLE, FP32_BITS = "table", "fp32"
Table = Annotated[int, TABLE]
"""Address of int64 values, which kernels index."""
Real = Annotated[int, FP32_BITS]
"""Bits of an fp32, which kernels read as one."""
Counter = Annotated[int, Behind(room=1, align=LINE)]
"""Zero at first; on a line of its own, so that threads that count do not share one."""


class _Listed(type):
    """Gives a class a slot for each of its annotations."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> _Listed:
        return super().__new__(cls, name, bases, {"__slots__": tuple(space.get("__annotations__", ())), **space})


class Block(metaclass=_Listed):
    """Fields in order: ``int``, ``Table``, ``Real``, ``Annotated[int, B]`` (the address of a block B); then Behinds."""

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True)
        kinds = {name: getattr(hint, "__metadata__", (None,))[0] for name, hint in hints.items()}
        values = [name for name, kind in kinds.items() if not isinstance(kind, Behind)]
        offsets, size = {}, 0
        for name, kind in kinds.items():
            behind = kind if isinstance(kind, Behind) else Behind(room=1)
            offsets[name] = size = -(-size // behind.align) * behind.align
            size += behind.room * (behind.of.size if behind.of else 8)
        assert list(kinds)[: len(values)] == values, "what stands behind the values is listed behind them"
        cls.kinds, cls.offsets, cls.size = kinds, offsets, size
        layout = Struct(f"{len(values)}q{size - 8 * len(values)}x")
        source = f"lambda self: array('q', pack({', '.join(f'self.{name}' for name in values)}))"
        cls.pack = eval(source, {"array": array, "pack": layout.pack})  # a loop over names takes thrice the time

    @classmethod
    def place(cls, *path: str) -> int:
        """Where a field stands among a packed block's integers, or one of a block in it: place("slots", "rows")."""
        name, *rest = path
        kind: Any = cls.kinds[name]
        return cls.offsets[name] // 8 + (kind.of.place(*rest) if rest else 0)

    def pack(self) -> array[int]:
        """The block, with zeros for what the host does not give. A field that was not assigned is an AttributeError."""
        raise NotImplementedError


def address(block: array[int]) -> int:
    """Where a packed block is, as long as somebody keeps it."""
    return block.buffer_info()[0]
