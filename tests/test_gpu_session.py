"""Sessions of tests/gpu without a GPU: workers decide as their controller does, no skip passes for a proof."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SEES = """
import os
import pytest
import torch

@pytest.mark.parametrize("i", range(4))
def test_triton_compiles(i, tmp_path):
    open(os.environ["SEEN"] + f"/{i}", "w").write(os.environ.get("TRITON_INTERPRET", "unset"))
"""
FAKE = """
import torch

torch.cuda.is_available = lambda: True
"""


@pytest.fixture
def tree(tmp_path):
    """A project with these conftests, a test that says what Triton will do, and a plugin that feigns a GPU."""
    for name in ("conftest.py", "interpreter.py", "gpu/conftest.py"):
        (tmp_path / "tests" / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(TESTS / name, tmp_path / "tests" / name)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    for name in ("tests/gpu/test_sees.py", "tests/test_other.py"):
        (tmp_path / name).write_text(SEES)
    (tmp_path / "fake_gpu.py").write_text(FAKE)
    (tmp_path / "seen").mkdir()
    return tmp_path


def session(tree, *words, **more):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    paths = os.pathsep.join([str(tree), str(TESTS.parent / "src")])
    environment |= {"SEEN": str(tree / "seen"), "PYTHONPATH": paths, **more}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False)


def seen(tree):
    return {p.read_text() for p in (tree / "seen").iterdir()}


@pytest.mark.parametrize(
    ("workers", "path"), [("2", "tests/gpu"), ("0", "tests/gpu/test_sees.py::test_triton_compiles")]
)
def test_every_worker_has_the_kernels_compiled(tree, workers, path):
    (tree / "tests" / "gpu" / "conftest.py").write_text("")  # nothing is skipped
    result = session(tree, path, "-n", workers)
    assert result.returncode == 0, result.stdout
    assert seen(tree) == {"0"}


def test_beside_others_kernels_are_interpreted_and_a_gpus_tests_stay_out(tree):
    result = session(tree, "-n", "2")
    assert result.returncode == 0, result.stdout
    assert "4 passed" in result.stdout
    assert result.stdout.count("tests/gpu: not collected beside other tests") == 1
    assert seen(tree) == {"1"}


def test_without_a_gpu_the_reason_is_printed_once(tree):
    result = session(tree, "tests/gpu", "-n", "2", "-rs", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout
    assert "tests/gpu: 4 skipped: no GPU" in result.stdout
    assert not seen(tree)


def test_where_there_is_a_gpu_a_skipped_test_fails_the_session(tree):
    result = session(tree, "-p", "fake_gpu", "tests/gpu", "-n", "2", TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "tests/gpu: 4 skipped: kv_score is on cuda, but Triton interprets kernels" in result.stdout
    assert "FAILED: there is a GPU" in result.stdout


def test_where_there_is_a_gpu_a_skipped_module_fails_the_session(tree):
    (tree / "tests" / "gpu" / "test_sees.py").write_text(
        "import pytest\npytest.skip('not today', allow_module_level=True)\n"
    )
    result = session(tree, "-p", "fake_gpu", "tests/gpu", "-n", "0")
    assert result.returncode == 1
    assert "not today" in result.stdout


def test_the_makefile_needs_no_environment_of_its_own(tmp_path):
    """What ``make gpu PY=...`` would run: nothing is installed."""
    words = ["make", "--no-print-directory", "-n", "gpu", "sanitize", "PY=python3", f"VENV={tmp_path}/none"]
    lines = subprocess.run(words, cwd=TESTS.parent, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith("env PYTHONPATH=src python3 -m pytest tests/gpu -n ")
    assert not [line for line in lines if "pip" in line or "venv" in line]
    assert sum("-m sanitizer" in line for line in lines) == 2
