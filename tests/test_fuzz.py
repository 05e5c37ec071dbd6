"""Twenty thousand calls of every door with hostile metadata: errors, or what the reference does, and no crash."""

import pytest

import fuzz


@pytest.mark.parametrize(("backend", "calls", "seed"), [("cpu", 12_000, 1), ("cpu", 4_000, 2), ("reference", 4_000, 3)])
def test_doors_under_hostile_metadata(backend, calls, seed):
    done, raised, compared = fuzz.run(calls, seed, backend=backend)
    assert done == calls
    assert raised > calls / 4, "what is hostile is refused"
    assert compared > calls / 20, "what is not, is done"
