"""Every property is asked of the reference alone, and of what ``impl="auto"`` picks on this machine."""

import pytest

from kvcondense import backends


@pytest.fixture(autouse=True, params=["auto", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        only = {"reference": backends._MODULES["reference"]}
        monkeypatch.setattr(backends, "_MODULES", only)
    backends._candidates.cache_clear()
    yield request.param
    backends._candidates.cache_clear()
