"""The block of the kernel that reads and writes the tags of state rows; host and kernel share its names."""

from __future__ import annotations

from kvcondense.backends.cpu.blocks import Block, Table

CHECK, BEGIN, NAME = range(3)


class Marks(Block):
    """Tags of a pool, and the rows that a step reads and keeps."""

    what: int  # CHECK, BEGIN or NAME
    wrong: int  # 1: a row that is read holds another position
    tags: Table
    reads: int
    read_row: Table
    read_position: Table
    keeps: int
    keep_row: Table
    keep_position: Table
    requests: int  # that bring tokens
    slots: Table
    starts: Table
    ring_rows: int  # 0: not a ring
    unknown: int  # what a row's tag is while it is written
