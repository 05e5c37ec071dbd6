"""What a GPU's kernels should take, computed from their machine code and a table of machines: nothing is run."""
