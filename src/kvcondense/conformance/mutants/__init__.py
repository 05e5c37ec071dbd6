"""Wrong compressors on purpose: bugs that engines shipped, each as a backend that the scenarios must catch.

A mutant is the reference backend with one stage swapped, or with its step altered first. They are tests of the tests:
``kvcondense verify --mutant NAME`` must fail for every one. One module for each part of the work that can go wrong.
"""

from __future__ import annotations

from kvcondense.conformance.mutants import addresses, batches, bytes, numerics, state, windows
from kvcondense.conformance.mutants.mutant import Mutant

MUTANTS: dict[str, Mutant] = {
    m.name: m for part in (windows, numerics, addresses, state, batches, bytes) for m in part.MUTANTS
}

__all__ = ["MUTANTS", "Mutant"]
