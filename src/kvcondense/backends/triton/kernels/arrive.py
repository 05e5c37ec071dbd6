"""Counters by which programs of a launch find one another: who comes last, and a barrier across the grid.

A launch adds a number of its own, (launch << 32) + 1, once for each program, and takes away what it added; of a barrier
it leaves the sign turned. So a counter says how many of *this* launch have arrived, and shows what others have left in
it: an aborted launch, or one that runs beside this one on the same plan. Whoever sees that makes NaN of its rows, and
nobody waits for programs that never come.
"""

from __future__ import annotations

import triton
import triton.language as tl

TURN: tl.constexpr = tl.constexpr(-(2**63))
"""The sign bit, which every barrier of a launch turns."""


@triton.jit
def number_of(launch):
    """What a program of this launch adds to a counter."""
    return (launch.to(tl.int64) << 32) + 1


@triton.jit
def arrived(value, number):
    """How many programs of the launch with this number a counter holds; -1 if it holds anything else."""
    count = value & 0xFFFFFFFF
    return tl.where(value == count * number, count, -1)


@triton.jit
def last_of(counter, launch, PROGRAMS: tl.constexpr):
    """1 in the program that is the last of PROGRAMS to come here, 0 in the others; -1 where the counter is not clean.

    What all of them stored before is visible to the last, past the first cache.
    """
    number = number_of(launch)
    tl.debug_barrier()
    before = arrived(tl.atomic_add(counter, number), number)
    if before == PROGRAMS - 1:
        tl.atomic_add(counter, -PROGRAMS * number, sem="relaxed")
    return tl.where(before < 0, -1, (before == PROGRAMS - 1).to(tl.int64))


@triton.jit
def arrive(counter, launch):
    """Tell a barrier's counter, an int64, that this program is here: what it was, and is.

    Program 0 takes away what the others add, and adds ``TURN``: so together they turn the sign, whichever it was, and
    nobody has to clear anything. Stores of this program are visible to whoever ``wait``s, past the first cache.
    """
    programs = tl.num_programs(0)
    number = number_of(launch)
    mine = tl.where(tl.program_id(0) == 0, TURN - (programs - 1) * number, number)
    tl.debug_barrier()
    before = tl.atomic_add(counter, mine)
    return before, before + mine


@triton.jit
def sign_before(value, number):
    """Of a barrier's counter: what it was before this launch, 0 or ``TURN``; the other one if all have arrived.

    Anything else if the counter is not this launch's alone.
    """
    count = value.to(tl.int32).to(tl.int64)  # those that have come, or, if program 0 has, less those that have not
    rest = value - count * number
    return tl.where(count < 0, rest ^ TURN, rest)


@triton.jit
def wait(counter, arrival, launch):
    """Wait until every program of a cooperative launch has arrived. False, without waiting, where the counter is not
    this launch's alone. arrival: of ``arrive``.
    """
    number = number_of(launch)
    before, now = arrival
    sign = sign_before(before, number)
    clean = (sign == 0) | (sign == TURN)
    while clean & (sign_before(now, number) == sign):  # polls order nothing, so that they cost a load
        now = tl.load(counter, volatile=True)
    # One acquire for all threads, which may have left the loop on different values.
    clean = clean & (tl.atomic_add(counter, 0, sem="acquire") == sign ^ TURN)
    tl.debug_barrier()
    return clean


@triton.jit
def grid_barrier(counter, launch):
    """Arrive and wait."""
    return wait(counter, arrive(counter, launch), launch)
