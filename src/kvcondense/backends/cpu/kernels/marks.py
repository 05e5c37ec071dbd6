"""What the tags of state rows say, in Numba: whether a step may go on from them, that it has begun, that it is done."""

from __future__ import annotations

from kvcondense.backends.cpu import mark_params as params
from kvcondense.backends.cpu.kernels import fields, functions
from kvcondense.backends.cpu.kernels.functions import kernel

_marks_at = fields.view(params.Marks)


@kernel
def _check(marks):
    """Whether every row that is read holds the position that it should."""
    tags, row, position = marks.tags, marks.read_row, marks.read_position
    for i in range(marks.reads):
        if tags[row[i]] != position[i]:
            return False
    return True


@kernel
def _begin(marks):
    """Forget what rings hold from their requests' start on; nobody knows what the rows to be written hold."""
    tags, slots, starts, rows = marks.tags, marks.slots, marks.starts, marks.ring_rows
    if rows:
        for i in range(marks.requests):
            start, first = starts[i], slots[i] * rows
            for row in range(first, first + rows):
                if tags[row] >= start:
                    tags[row] = -1
    for i in range(marks.keeps):
        tags[marks.keep_row[i]] = marks.unknown


@kernel
def _name(marks):
    """The rows that were written hold their positions."""
    for i in range(marks.keeps):
        marks.tags[marks.keep_row[i]] = marks.keep_position[i]


@functions.entry
def entry(p):
    """Do one of the three."""
    marks = _marks_at(p)
    if marks.what == params.CHECK:
        marks.wrong = 0 if _check(marks) else 1
    elif marks.what == params.BEGIN:
        _begin(marks)
    else:
        _name(marks)
