"""A program of another language behind every door of the kit: the command, replays, vectors, a soak, pytest."""

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvcondense.cli import app
from test_remote import compiled

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("doors"), "driver")


def invoke(*words, status=0):
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def test_the_command_runs_it_and_writes_down_how_again(driver, tmp_path):
    report = tmp_path / "j"
    text = invoke("conformance", "--exec", driver, "--folder", tmp_path / "f", "--json", report)
    assert "FAIL" not in text
    found = json.loads(report.read_text())
    assert found["adapter"] == f"--exec {driver}"
    assert "csa head_dim=512 rope_dim=64" in found["visited"]
    assert not (tmp_path / "f").exists(), "nothing broke"


def test_a_failing_history_is_played_again_on_the_program(driver, tmp_path):
    line = ("conformance", "--adapter", "mutant:eight-drafts-kept-for", "--folder", tmp_path)
    assert "I2-rollback.json" in invoke(*line, status=1)
    text = invoke("conformance", "--exec", driver, "--replay", tmp_path / "I2-rollback.json")
    assert "FAIL" not in text
    assert "eight" in (tmp_path / "summary.md").read_text()


def test_it_soaks(driver):
    assert "PASS  soak, --exec" in invoke("conformance", "--exec", driver, "--soak", 0.02)


def test_it_plays_vectors(driver, tmp_path):
    invoke("vectors", "write", tmp_path / "v")
    invoke("vectors", "play", tmp_path / "v", "--exec", driver, "--out", tmp_path / "o", "--without", "format")
    text = invoke("vectors", "check", tmp_path / "v", "--against", tmp_path / "o", "--without", "format")
    assert re.search(r"(\d{3}) of \1 vectors are right, 35 are left out", text)


def test_pytest_has_a_test_for_each_invariant(driver, tmp_path):
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--kvcondense-exec={driver}"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "15 passed, 2 skipped" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("words", ["--exec false", "--exec nowhere-at-all", "--exec ''", "--exec cat --timeout 0"])
def test_a_program_that_is_none_is_refused(words, tmp_path):
    line = [word.strip("'") for word in words.split()]
    text = invoke("conformance", *line, "--folder", tmp_path / "f", status=2)
    assert "--exec" in text or "--timeout" in text
    assert not (tmp_path / "f").exists()
