"""Counters by which programs of a launch find one another: who comes last, and a barrier across the grid.

A launch adds a number of its own, (launch << 16) + 1, once for each program, and takes away what it added; in a barrier
it leaves one generation more. So a counter says how many of *this* launch have arrived, and shows what others have left
in it: an aborted launch, or one that runs beside this one on the same plan. Whoever sees that makes NaN of its rows,
and nobody waits for programs that never come.
"""

from __future__ import annotations

import triton
import triton.language as tl

GENERATION: tl.constexpr = tl.constexpr(2**48)
"""What passing a barrier leaves in its counter. There are 2^16, then the first again."""


@triton.jit
def number_of(launch):
    """What a program of this launch adds to a counter."""
    return (launch.to(tl.int64) << 16) + 1


@triton.jit
def arrived(value, number):
    """How many programs of the launch with this number a counter holds; -1 if it holds anything else."""
    count = value & 0xFFFF
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

    Program 0 takes away what the others add, and adds a generation: so that is what all of them together leave, and
    nobody has to clear anything. Stores of this program are visible to whoever ``wait``s, past the first cache.
    """
    programs = tl.num_programs(0)
    number = number_of(launch)
    mine = tl.where(tl.program_id(0) == 0, GENERATION - (programs - 1) * number, number)
    tl.debug_barrier()
    before = tl.atomic_add(counter, mine)
    return before, before + mine


@triton.jit
def generation(value, number):
    """That a barrier's counter was in before this launch came; the next one if all of it have arrived.

    No multiple of ``GENERATION`` if the counter is not this launch's alone.
    """
    count = value.to(tl.int16).to(tl.int64)  # those that have come, or, if program 0 has, less those that have not
    rest = value - count * number
    return tl.where(count < 0, rest - GENERATION, rest)


@triton.jit
def wait(counter, arrival, launch):
    """Wait until every program of a cooperative launch has arrived. False, without waiting, where the counter is not
    this launch's alone. arrival: of ``arrive``.
    """
    number = number_of(launch)
    before, now = arrival
    began = generation(before, number)
    clean = (began & (GENERATION - 1)) == 0
    while clean & (generation(now, number) == began):  # polls order nothing, so that they cost a load
        now = tl.load(counter, volatile=True)
    # One acquire for all threads, which may have left the loop on different values.
    clean = clean & (tl.atomic_add(counter, 0, sem="acquire") == began + GENERATION)
    tl.debug_barrier()
    return clean


@triton.jit
def grid_barrier(counter, launch):
    """Arrive and wait."""
    return wait(counter, arrive(counter, launch), launch)
