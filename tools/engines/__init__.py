"""Bytes of state and cache beside engines' own kernels, on the CPU: what ``tools/engines.py`` runs."""
