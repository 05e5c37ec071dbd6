"""A Triton kernel without work: the least that a launch takes."""

from __future__ import annotations

import triton


@triton.jit
def empty_kernel(operand):
    """Nothing."""
