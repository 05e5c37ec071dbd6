"""Numba kernels in the order of the data: project, window, pool, row (norm, RoPE, Hadamard), encode; condense runs all."""
