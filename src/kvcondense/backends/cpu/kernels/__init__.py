"""Numba kernels: project, window, pool, row (norm, RoPE, Hadamard), encode (scales, elements); condense runs them."""
