"""Hostile memory for every test, hypothesis settings that are the same on every machine, and tests of a GPU or none."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import interpreter

GPU_TESTS = Path(__file__).parent / "gpu"
_SKIPPED: list[str] = []
"""Reasons why tests of a GPU were skipped, one of each."""


def pytest_configure(config):
    """Triton decides when kernels are defined: tests/gpu, by itself, has them compiled; no other test needs a GPU.

    Workers of pytest-xdist have the arguments of the process that starts them, and decide alike.
    """
    if os.environ.setdefault("TRITON_INTERPRET", "0" if _gpu_tests_alone(config) else "1") == "1":
        interpreter.patch_once()


def _asked(config):
    return [(config.invocation_params.dir / str(a).partition("::")[0]).resolve() for a in config.args]


def _gpu_tests_alone(config):
    return all(path.is_relative_to(GPU_TESTS) for path in _asked(config))


def pytest_ignore_collect(collection_path, config):
    """Beside other tests, whose kernels are interpreted, those of a GPU cannot run."""
    return True if collection_path == GPU_TESTS and not _gpu_tests_alone(config) else None


def pytest_runtest_logreport(report):
    if report.skipped and report.nodeid.startswith("tests/gpu/"):
        _SKIPPED.append(report.longrepr[2].removeprefix("Skipped: "))


pytest_collectreport = pytest_runtest_logreport


def pytest_sessionfinish(session):
    """A test of the GPU that is skipped where there is one has shown nothing: the session fails."""
    if _SKIPPED and torch.cuda.is_available():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    write = terminalreporter.write_line
    if _SKIPPED:
        write(f"tests/gpu: {len(_SKIPPED)} skipped: {'; '.join(sorted(set(_SKIPPED)))}")
        if torch.cuda.is_available():
            write("FAILED: there is a GPU, and tests of it were skipped", red=True)
    elif GPU_TESTS.parent in _asked(config):
        write("tests/gpu: not collected beside other tests; make gpu runs it")


for profile, examples in (("kvcondense", 25), ("exhaustive", 100)):  # make test, make test-all
    settings.register_profile(
        profile,
        deadline=None,
        derandomize=True,
        max_examples=examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
settings.load_profile("kvcondense")

torch.set_num_threads(1)  # two workers on two cores; thread counts have a test of their own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start


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
        return tensor.fill_({torch.int64: -(2**40), torch.int8: 0xAB - 256}.get(tensor.dtype, 0xAB))

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """Lines stay whole, wherever the tests run (pytest-xdist tells its workers the terminal's width)."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def no_gradients():
    """Inference: nothing of a test is recorded."""
    with torch.no_grad():
        yield
