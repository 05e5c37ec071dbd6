"""The block of 64-bit integers of the kernel that plans: a head, the columns of a batch, then a job for each plan.

Host and kernel share these names, as those of ``params``.
"""

from __future__ import annotations

from typing import Annotated

from kvcondense.backends.cpu.blocks import Behind, Block, Table

COLUMNS = 7


class Column(Block):
    """Integers of the caller, and where the batch has its own."""

    source: int  # where the caller's are
    rows: int  # -1: the batch has no such column
    width: int
    row_stride: int
    stride: int
    bytes: int  # of an integer; 0: they are the batch's own
    offset: int  # of the batch's own, in bytes from Step.base
    to: Table  # there, as the kernel says


class Job(Block):
    """A plan: what it is made for, then what the kernel says of it."""

    ratio: int
    halves: int
    kind: int
    blocks: int  # slots or pages
    block_rows: int
    page_tokens: int
    keep_all: int
    page_rows: int  # of the cache; 0: not said
    window_fields: Table  # three lists of ``windows`` integers
    keep_fields: Table  # four of ``keeps``
    windows: int
    keeps: int
    last_window: int  # -1: none
    lowest: int
    highest: int
    shared: int
    overwrites: int


class Step(Block):
    """A batch and its plans; the columns are in the order of ``RaggedBatch``'s fields."""

    status: int  # 1: irregular, in a way that only the builders in torch explain
    fill: int  # 0: take the batch and count, 1: fill the plans
    most: int  # positions of a sequence
    drafts: int  # draft rows of every request; -1: the column has them
    count: int  # plans
    tokens: int  # as the kernel says
    base: int  # of the batch's own columns
    seen: Table  # hash table
    seen_size: int  # entries, a power of two
    query_start: Annotated[int, Behind(Column, 1)]
    start: Annotated[int, Behind(Column, 1)]
    draft: Annotated[int, Behind(Column, 1)]
    slots: Annotated[int, Behind(Column, 1)]
    state_table: Annotated[int, Behind(Column, 1)]
    mapping: Annotated[int, Behind(Column, 1)]
    table: Annotated[int, Behind(Column, 1)]
    jobs: Annotated[int, Behind(Job)]
