"""The README tells the truth: its example runs, its commands exist, its table is the one the code prints."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from checkpoints import write
from kvcondense.bench import report
from kvcondense.cli import app
from kvcondense.cli.work.info import HEADINGS, compressors, table
from kvcondense.formats import FORMATS

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = re.findall(r"^kvcondense ((?:verify|info|plan|explain)[^#\n]*)", README, flags=re.MULTILINE)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_runs(capsys):
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert "tensor([448, 449])" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write a file
    words = [str(write(tmp_path)) if word == "DIR" else word for word in shlex.split(command)]
    assert CliRunner().invoke(app, words).exit_code == 0


def test_there_are_commands_to_run():
    assert len(COMMANDS) >= 4


def test_the_table_is_what_info_prints():
    lines = ["| " + " | ".join(HEADINGS.values()) + " |", "|" + "---|" * len(HEADINGS)]
    lines += ["| " + " | ".join(row.values()) + " |" for row in table(compressors())]
    assert "\n".join(lines) in README


def test_the_timings_are_those_of_the_baseline():
    path = Path(__file__).parent.parent / "benchmarks" / "baselines" / "cpu.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert report.markdown(records) in README
    assert report.contexts(records) in README
    assert report.decode_step(records) in README
    design = (Path(__file__).parent.parent / "DESIGN.md").read_text()
    assert report.markdown(records, gemms=True) in design


def test_the_number_of_formats_is_right():
    assert f"{len(FORMATS)} cache formats" in README


def test_targets_of_make_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
