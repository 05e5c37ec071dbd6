"""Hostile memory for every test, and hypothesis settings that are the same on every machine."""

import os
import sys

# Triton decides when kernels are defined: tests/gpu, by itself, has them compiled; no other test needs a GPU.
if not any("tests/gpu" in argument for argument in sys.argv):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

import interpreter

for profile, examples in (("kvcondense", 25), ("exhaustive", 100)):  # make test, make test-all
    settings.register_profile(
        profile,
        deadline=None,
        derandomize=True,
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
settings.load_profile("kvcondense")

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.patch_once()
torch.set_num_threads(1)  # two workers on two cores; thread counts have a test of their own


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Uninitialised memory holds NaN, or an integer that is no legal index."""
    real = torch.empty

    def empty(*args, **kwargs):
        tensor = real(*args, **kwargs)
        if tensor.numel() > 1 << 24 or tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(-(2**40) if tensor.dtype == torch.int64 else 0xAB)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """Lines stay whole, wherever the tests run (pytest-xdist tells its workers the terminal's width)."""
    monkeypatch.delenv("COLUMNS", raising=False)
