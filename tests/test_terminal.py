"""What a person sees: 80 columns, no colour, errors that say what to do next, and names completed by the shell."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from kvcondense import CompressorSpec, CompressorWeights, ModelConfig, RaggedBatch, RopeTable, StatePool, condense
from kvcondense.cli import app, main
from kvcondense.cli.output import Output, fit
from kvcondense.errors import KvCondenseError, StateMismatchError, require_known

COMMANDS = [
    "info", "info --formats", "info --format fp8_model1 --error", "bench --list", "bench --from BASELINE",
    "conformance --adapter cpu", "verify --kind csa --history 40", "verify --mutant overlap-ignored --kind csa",
    "explain --kind hca --prompt 130 --chunk 65", "plan --memory 80GiB --batch 64 --context 128k", "aot --list",
]  # fmt: skip
NAMES = [one.name for one in app.registered_commands]
BASELINE = os.path.join(os.path.dirname(__file__), "..", "benchmarks", "baselines", "cpu.jsonl")


@pytest.mark.parametrize("command", [*COMMANDS, *(f"{name} --help" for name in NAMES)])
def test_lines_fit_and_have_no_colour(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(app, command.replace("BASELINE", BASELINE).split()).output
    assert text.strip()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "\x1b" not in text


def test_in_a_pipe_lines_stay_whole(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "transformers | nano-deepseek-v4 |" in CliRunner().invoke(app, ["bench", "--from", BASELINE]).output
    assert fit("x " * 100, None) == "x " * 100


def test_tables_wrap_between_words_or_become_paragraphs(monkeypatch, capsys):
    rows = [("a_long_identifier", "prose that goes on for rather a long while"), ("b", "short")]
    for columns, expected in (
        ("45", "name               what\na_long_identifier  prose that goes on for\n"
               "                   rather a long while\nb                  short\n"),
        ("200", "name               what\na_long_identifier  prose that goes on for rather a long while\n"
                "b                  short\n"),
    ):  # fmt: skip
        monkeypatch.setenv("COLUMNS", columns)
        Output(None).table(("name", "what"), rows)
        assert capsys.readouterr().out == expected
    monkeypatch.setenv("COLUMNS", "40")
    Output(None).table(("name", "what"), [("x" * 30, "y" * 20)])
    assert capsys.readouterr().out == f"{'x' * 30}\n  what {'y' * 20}\n"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("info --format fp8_mode", "did you mean fp8_model1?; kvcondense info --formats"),
        ("plan --model flsh", "did you mean flash?; or name a model's folder or config.json"),
        ("verify --kind cs", "did you mean csa?"),
        ("verify --backend cuda", "kvcondense info says"),
        ("verify --mutant ape-droped", "did you mean ape-dropped?"),
        ("explain --kind hcaa", "did you mean hca?"),
        ("conformance --adapter nowhere:make", "PYTHONPATH"),
        ("conformance --adapter mutant:rope", "mutant:NAME"),
    ],
)
def test_a_wrong_name_gets_a_suggestion(command, hint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvcondense", *command.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


def test_errors_say_what_to_do_next():
    spec, config = CompressorSpec.csa(ModelConfig.FLASH), ModelConfig.FLASH
    weights = CompressorWeights(norm=torch.ones(512), ape=torch.zeros(4, 1024))
    rope, state = RopeTable.build(config, 64), StatePool.ring(spec, 1)
    late = RaggedBatch.build([0, 1], start_positions=[9], state_slots=[0])
    with pytest.raises(StateMismatchError, match="snapshot.load_live"):
        condense(spec, torch.zeros(1, spec.projected), weights, rope, late, state=state)
    with pytest.raises(StateMismatchError, match="pass state="):
        condense(spec, torch.zeros(1, spec.projected), weights, rope, late)
    drafts = RaggedBatch.build([0, 4], start_positions=[0], state_slots=[0], draft_rows=3)
    with pytest.raises(KvCondenseError, match=r"required_ring_rows\(draft_rows\)") as found:
        condense(spec, torch.zeros(4, spec.projected), weights, rope, drafts, state=state)
    assert found.value.hint in str(found.value)
    with pytest.raises(KvCondenseError, match=r"got 'zzz'$"):
        require_known("name", "zzz", ["abc"])


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("kvcondense pl", {"plan"}),
        ("kvcondense plan --model f", {"flash"}),
        ("kvcondense plan --format fp8_model1,mx", {"fp8_model1,mxfp4_indexer", "fp8_model1,mxfp4_indexer_ties_down"}),
        ("kvcondense verify --kind ", {"hca", "csa", "indexer"}),
        ("kvcondense verify --mutant ape", {"ape-dropped", "ape-shifted"}),
        ("kvcondense conformance --adapter reference:", {"reference:ring", "reference:paged", "reference:online"}),
    ],
)
def test_the_shell_completes_names(line, offered):
    words = line.split(" ")
    environment = {**os.environ, "_KVCONDENSE_COMPLETE": "complete_bash", "COMP_WORDS": line,
                   "COMP_CWORD": str(len(words) - 1)}  # fmt: skip
    command = [sys.executable, "-c", "from kvcondense.cli import main; import sys; sys.argv[0] = 'kvcondense'; main()"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert offered <= set(found.stdout.split()), found.stdout + found.stderr
    assert all(word.startswith(words[-1]) for word in found.stdout.split())


def test_json_to_standard_output_is_alone_whatever_the_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    result = CliRunner().invoke(app, ["info", "--json", "-"])
    assert json.loads(result.stdout)["versions"]
