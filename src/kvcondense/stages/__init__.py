"""The algorithm in the order of the data: project, window, pool, norm, rope, hadamard, store. Pure torch functions."""
