"""Numba kernels: project, window, pool, row (norm, RoPE, Hadamard), encode; condense runs them."""
