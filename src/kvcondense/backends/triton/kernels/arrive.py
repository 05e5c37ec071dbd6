"""Counters by which programs of a launch find one another: who comes last, and a barrier across the grid.

A launch adds a number of its own, (launch << 32) + 1, once for each program, and takes away what it added. So a counter
says how many of *this* launch have arrived, and shows what others have left in it: an aborted launch, or one that runs
beside this one on the same plan. Whoever sees that makes NaN of its rows; nobody waits for programs that never come.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def grid_barrier(counters, launch):
    """Wait until every program of a cooperative launch is here; what they stored before is visible after.

    Visible past the first cache, that is. counters [2] int64: arrivals, departures. False, without waiting for anybody,
    where they are not clean.
    """
    programs = tl.num_programs(0)
    number = number_of(launch)
    tl.debug_barrier()
    here = arrived(tl.atomic_add(counters, number), number) + 1
    while (here > 0) & (here < programs):  # polls order nothing, so that they cost a load
        here = arrived(tl.load(counters, volatile=True), number)
    # One acquire for all threads, which may have left the loop on different values.
    clean = arrived(tl.atomic_add(counters, 0, sem="acquire"), number) == programs
    tl.debug_barrier()
    if clean:
        if arrived(tl.atomic_add(counters + 1, number, sem="relaxed"), number) == programs - 1:
            # All have seen it.
            tl.atomic_add(counters + 1, -programs * number, sem="relaxed")
            tl.atomic_add(counters, -programs * number, sem="relaxed")
    return clean
