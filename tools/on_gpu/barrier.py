"""The grid barrier alone: programs of a cooperative launch that wait for one another and look whether all were there.

They are launched as steps are, on sm_90 and later while earlier kernels still run.

All that knows how a barrier is called is in ``barrier_kernel`` and ``counters_for``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.kernels.arrive import grid_barrier
from kvcondense.backends.triton.kernels.dependent import in_turn
from kvcondense.backends.triton.runtime import next_launch

WARPS = 4


@triton.jit(do_not_specialize=["launch"])
def barrier_kernel(counters, launch, seen, late, ROUNDS: tl.constexpr, PDL: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Adds to ``late`` how often a program passed a barrier before its neighbour's store of that round was visible, or
    found a barrier's counters unclean.

    Two barriers a round, with counters of their own: nobody begins a round while another still looks at the last one.
    """
    in_turn(PDL)
    program = tl.program_id(0)
    neighbour = (program + 1) % tl.num_programs(0)
    missing = 0
    for i in range(ROUNDS):
        tl.store(seen + program, i + 1)
        clean = grid_barrier(counters + 2 * i, launch)
        missing += (clean == 0).to(tl.int32) + (tl.load(seen + neighbour, cache_modifier=".cg") != i + 1).to(tl.int32)
        clean = grid_barrier(counters + 2 * i + 1, launch)
        missing += (clean == 0).to(tl.int32)
    tl.atomic_add(late, missing)


def counters_for(rounds: int, device: str) -> torch.Tensor:
    """What the barriers of ``rounds`` count with; a launch leaves a generation more in each."""
    return torch.zeros(2 * rounds, dtype=torch.int64, device=device)


def launcher(programs: int, rounds: int, device: str) -> tuple[Any, torch.Tensor]:
    """(a function that launches this many programs once, how often one was late)."""
    counters, late = counters_for(rounds, device), torch.zeros(1, dtype=torch.int32, device=device)
    seen = torch.zeros(programs, dtype=torch.int32, device=device)
    options: dict[str, Any] = {"PDL": False, "num_warps": WARPS, **tuning.launch_options(torch.device(device))}
    if device != "cpu":
        options["launch_cooperative_grid"] = True
    kernel: Any = barrier_kernel
    return lambda: kernel[(programs,)](counters, next_launch(), seen, late, ROUNDS=rounds, **options), late
