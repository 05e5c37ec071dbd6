"""Programmatic dependent launch: a kernel whose programs start while the one before it on the stream still runs.

``earlier_done`` stands before all that an earlier kernel may have written or may still read, in every program, also in
those with nothing to do: a kernel that has ended says by that that all before it have. What stands before it may ask
for memory, but not look at it.
"""

from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # builds for other devices, where PDL is never set
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def earlier_done(PDL: tl.constexpr):
    """Wait until all kernels before this one have ended, and what they stored is visible."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel's programs may start once every program of this one has come here, or has ended.

    So none of them takes the place of one of ours that has not started.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def in_turn(PDL: tl.constexpr):
    """What a kernel begins with that has nothing to ask for ahead."""
    earlier_done(PDL)
    let_next_start(PDL)


@triton.jit
def prefetch(pointers):
    """Ask the last cache for the lines at these addresses.

    That is no look at them: whatever is stored there before they are loaded is stored in that cache.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )
