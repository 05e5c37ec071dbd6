"""Blocks of the CPU backend: what the host assigns by name is what kernels read by that name."""

import inspect
from pathlib import Path
from typing import Annotated

import numba
import numpy as np
import pytest

from kvcondense.backends.cpu import blocks, params
from kvcondense.backends.cpu.blocks import Behind, Block, Counter, Real, Table, address
from kvcondense.backends.cpu.kernels import condense, fields, pool

BLOCKS = [b for b in vars(params).values() if inspect.isclass(b) and issubclass(b, Block) and b is not Block]


class Inner(Block):
    first: int
    second: int


class Outer(Block):
    plain: int
    inner: Annotated[int, Inner]
    half: Real
    items: Table
    none: Table
    counter: Counter
    other: Counter
    behind: Annotated[int, Behind(Inner)]


@pytest.fixture
def packed():
    """An Outer with two Inners behind it, an Inner, and the values of a table."""
    inner = Inner()
    inner.first, inner.second = 10, 20
    inner, items = inner.pack(), np.array([5, 6, 7])
    outer = Outer()
    outer.plain, outer.inner, outer.items, outer.none = 7, address(inner), items.ctypes.data, 0
    outer.half = int(np.float32(0.5).view(np.int32))
    return outer.pack() + inner + inner, inner, items


outer_at = fields.view(Outer)


def test_kernels_read_fields_tables_and_blocks(packed):
    @numba.njit
    def read(p):
        outer = outer_at(p)
        outer.items[2] = outer.items[0] + outer.items[1]
        outer.behind[1].second = 40
        last = outer.behind[1]
        return outer.plain, outer.inner.second, outer.half, outer.items[2], last.first, last.second, bool(outer.none)

    block, inner, items = packed
    found = read(address(block))
    assert found == (7, 20, 0.5, 11, 10, 40, False)
    assert items.tolist() == [5, 6, 11]
    assert inner.tolist() == [10, 20], "a block behind another one is a copy"


def test_counters_stand_on_lines_of_their_own(packed):
    @numba.njit
    def places(p):
        outer = outer_at(p)
        return outer.counter - p, outer.other - p

    block, *_ = packed
    assert places(address(block)) == (blocks.LINE, 2 * blocks.LINE)
    assert not any(block[5:17]), "zeros"
    assert Outer.size == 8 * 17


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_every_field_lies_where_kernels_look(block):
    values = block()
    given = [name for name, kind in block.kinds.items() if not isinstance(kind, Behind)]
    for i, name in enumerate(given):
        setattr(values, name, i + 1)
    packed = values.pack()
    assert 8 * len(packed) == block.size
    assert [packed[block.offsets[name] // 8] for name in given] == list(range(1, len(given) + 1))
    assert sum(packed) == sum(range(1, len(given) + 1))


def test_a_field_that_is_forgotten_or_misspelt_is_an_error():
    values = Inner()
    values.first = 1
    with pytest.raises(AttributeError, match="second"):
        values.pack()
    with pytest.raises(AttributeError, match="third"):
        values.third = 1


def test_kernels_know_fields_by_name_alone():
    """No offset is written down: constants of ``params`` are kinds and sizes, in capitals; the rest are blocks."""
    folder = Path(condense.__file__).parent
    for path in folder.glob("*.py"):
        assert "8 * params" not in path.read_text(), path
    assert pool.ENTRY == pool.Candidate.size == 24


@pytest.mark.parametrize("head_dim", [16, 128, 512])
@pytest.mark.parametrize("window", [1, 6, 8, 128])
def test_rooms_are_whole_lines(head_dim, window):
    """Else vectors of m, l, o and of rows lie across two lines each."""
    assert params.ROOM % blocks.LINE == 0 <= params.ROOM - params.Room.size < blocks.LINE
    assert params.Room.bytes(head_dim, window) % blocks.LINE == 0
