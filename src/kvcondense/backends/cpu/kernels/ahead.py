"""Rows that will be read next, asked for meanwhile: by a pool's loop over vectors, and by the loops that finish a row.

A core has few lines on their way from memory at once, and drops what it is asked for beyond. So lines are asked for all
the time, some with each vector that is worked on.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from kvcondense.backends.cpu.blocks import LINE
from kvcondense.backends.cpu.kernels import fields, simd
from kvcondense.backends.cpu.kernels.functions import inlined, kernel
from kvcondense.backends.cpu.kernels.simd import prefetch
from kvcondense.backends.cpu.params import ENTRY, Candidate

table_at = fields.view(Candidate)


class Coming:
    """The rows that a table lists, asked for one after the other, ``bytes_of`` of them for each vector; half: kv alone.

    Whole rows, not a column of lines: memory and its own prefetchers read on best where they are.
    """

    def __init__(self, b: Any, table: Any, begin: Any, end: Any, bytes_of: int, size: int, *, half: bool) -> None:
        self.b, self.table, self.size, self.kind, self.half = b, table, size, begin.type, half
        self.first = self._scaled(begin)
        self.length = self._scaled(b.sub(end, begin))
        self.bytes = bytes_of

    def _scaled(self, at: Any) -> Any:
        return at if self.size == 4 else self.b.lshr(at, self._number(1))

    def _number(self, n: int) -> ir.Constant:
        return ir.Constant(self.kind, n)

    def begin(self, before: Any) -> None:
        """Where the loop over vectors begins, whose counters these are."""
        self.counters = [self.b.phi(self.kind, name) for name in ("row", "offset")]
        for counter in self.counters:
            counter.add_incoming(self._number(0), before)
        self.row, self.offset = self.counters

    def _entry(self) -> Any:
        """Where the address of the next row is. Rows are kv and score of the first entry, of the second .."""
        b = self.b
        kv, score = (self._number(Candidate.offsets[f]) for f in ("kv", "score"))
        if self.half:
            return b.add(self.table, b.add(b.mul(self.row, self._number(ENTRY)), kv))
        field = b.select(b.trunc(self.row, ir.IntType(1)), score, kv)
        return b.add(b.add(self.table, field), b.mul(b.lshr(self.row, self._number(1)), self._number(ENTRY)))

    def ask(self, parts: int) -> None:
        """For the next of ``parts`` of a vector's."""
        b, many = self.b, self.bytes // parts
        address = b.add(b.add(simd.read(b, self._entry(), self.kind, 8), self.first), self.offset)
        for i in range(0, many, LINE):
            simd.emit_prefetch(b, b.add(address, self._number(i)))
        beyond = b.add(self.offset, self._number(many))
        done = b.icmp_signed(">=", beyond, self.length)
        self.offset = b.select(done, self._number(0), beyond)
        self.row = b.add(self.row, b.zext(done, self.kind))

    def go_on(self, end: Any) -> None:
        """Where the loop ends."""
        for counter, value in zip(self.counters, (self.row, self.offset), strict=True):
            counter.add_incoming(value, end)


@inlined
def wanted(room, first):
    """Whether there is an entry ``first`` of what the room has for later."""
    return first < room.later_rows


@inlined
def ask(room, first, at):
    """For the lines at ``at``, an offset in a row of fp32, of the scores of two entries, ``first`` and the next."""
    entries, at = table_at(room.later), at >> room.later_halved
    prefetch(entries[first].score + at)
    prefetch(entries[first + 1].score + at)


@kernel
def ask_rest(room, size):
    """For rows of ``size`` bytes of fp32: those that the encoder asks for where there is one."""
    for entry in range(4, room.later_rows, 2):
        for at in range(0, size, LINE):
            ask(room, entry, at)
