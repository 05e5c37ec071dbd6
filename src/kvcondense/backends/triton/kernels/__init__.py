"""Triton kernels: pool, row (norm, RoPE, Hadamard), encode, keep; condense and online run them."""
