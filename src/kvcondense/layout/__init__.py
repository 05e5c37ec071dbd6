"""Index arithmetic: which token, which state row, which cache row. No kernels."""
