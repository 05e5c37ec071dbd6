"""Starting the command: what it imports, how soon it speaks, what its declarations promise, how it is broken off."""

import functools
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest

from kvcondense.backends import backend_names
from kvcondense.backends.triton import aot
from kvcondense.bench.cases import CASES
from kvcondense.cachefile import PAGE_TOKENS
from kvcondense.capacity import STATES
from kvcondense.cli import app, command, names, paths, warm
from kvcondense.config import PRESETS
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.own import KINDS as ADAPTER_STATES
from kvcondense.files import replacing
from kvcondense.formats import FORMATS, describe
from kvcondense.golden.inputs import KINDS
from kvcondense.spec import Rounding

COMMANDS = {one.name: one.callback for one in app.registered_commands}
HEAVY = ("torch", "numpy", "numba", "llvmlite", "triton", "rich", "matplotlib", "transformers", "safetensors")
LINES = [
    "--help", "--version", "", "veriyf", *(f"{name} --help" for name in COMMANDS), "plan --modle x",
    "plan --model flsh", "plan --batch x", "verify --scale nan", "verify --format fp8_mode", "compress --layer 1",
    "convert nowhere.st --out x", "plan --json /nowhere/x", "bench --plot x.txt", "explain --trace -",
]  # fmt: skip
PROGRAM = """
import io, json, sys, contextlib
from kvcondense.cli import main
for line in json.loads(sys.argv[1]):
    sys.argv = ["kvcondense", *line.split()]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            main()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def python(*words, **environment):
    return subprocess.run(
        [sys.executable, *words], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_what_needs_no_work_imports_nothing_heavy():
    done = python("-c", PROGRAM, json.dumps(LINES))
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & set(HEAVY)


@pytest.mark.parametrize("typed", ["kvcondense pl", "kvcondense plan --model f", "kvcondense verify --mutant ape"])
def test_completion_imports_nothing_heavy(typed):
    code = "import atexit, sys; from kvcondense.cli import main; sys.argv[0] = 'kvcondense'; atexit.register("
    code += f"lambda: print(*{{n for n in {HEAVY} if n in sys.modules}}, file=sys.stderr)); main()"
    last = str(len(typed.split()) - 1)
    done = python("-c", code, _KVCONDENSE_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=last)
    assert done.stdout.split()
    assert done.stderr.strip() == ""


def test_the_library_imports_torch_when_a_name_is_asked_for_and_nothing_optional():
    code = "import sys, kvcondense; print('torch' in sys.modules); kvcondense.compress; print(*sys.modules)"
    before, loaded = python("-c", code).stdout.splitlines()
    assert before == "False"
    loaded = set(loaded.split())
    assert "torch" in loaded
    assert not {"numba", "llvmlite", "triton", "typer", "rich", "transformers", "safetensors"} & loaded
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        import_module("kvcondense").compres  # noqa: B018


@pytest.mark.parametrize("words", ["--help", "plan --help", "veriyf", "plan --model flsh"])
def test_the_command_speaks_at_once(words):
    """In less than half of what importing torch takes, in time of the processor, since others may use it."""

    def seconds(*words):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds("-m", "kvcondense", *words.split()) for _ in range(3)) < seconds("-c", "import torch") / 2


def test_names_are_those_of_the_tables():
    assert tuple(PRESETS) == names.MODELS
    assert names.KINDS == KINDS
    assert backend_names() == names.BACKENDS
    assert tuple(FORMATS) == names.FORMATS
    assert tuple(r.value for r in Rounding) == names.ROUNDINGS
    assert names.STATES == STATES
    assert names.ADAPTER_STATES == ADAPTER_STATES
    assert tuple(MUTANTS) == names.MUTANTS
    assert tuple(CASES) == names.CASES
    assert aot.ARCHITECTURES == names.ARCHITECTURES
    assert (PAGE_TOKENS, describe.EXAMPLE_DIM) == (names.PAGE_TOKENS, names.EXAMPLE_DIM)
    assert set(warm.BACKENDS) < set(names.BACKENDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_declaration_and_work_agree(name):
    declared, run = COMMANDS[name], import_module(f"kvcondense.cli.work.{name}").run
    offered = [p for p in inspect.signature(declared).parameters if p not in ("quiet", "json_file")]
    output, *taken = inspect.signature(run).parameters
    assert (output, taken) == ("output", offered)
    assert set(inspect.signature(declared).parameters) == set(command.options_of(declared)) >= {"quiet", "json_file"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_examples_exit_statuses_and_options(name):
    text = " ".join(python("-m", "kvcondense", name, "--help", COLUMNS="200").stdout.split())
    assert f"Example: kvcondense {name}" in text
    assert "Exit status 0: " in text
    assert "2: it could not be asked; 130: interrupted" in text
    for option in command.options_of(COMMANDS[name]).values():
        assert option in text


def test_every_path_is_known_as_read_or_written():
    known = {*paths.WRITTEN, *paths.READ, *paths.FOLDERS, *paths.PLACES}
    for name, declared in COMMANDS.items():
        for parameter in inspect.signature(declared, eval_str=True).parameters.values():
            if "Path" in str(parameter.annotation):
                assert parameter.name in known, (name, parameter.name)


def test_summaries_are_whole():
    text = " ".join(python("-m", "kvcondense", "--help", COLUMNS="80").stdout.replace("-\n", "-").split())
    assert "..." not in text.replace("[ARGS]...", "")
    for declared in COMMANDS.values():
        first = " ".join(inspect.getdoc(declared).split("\n\n")[0].split())
        assert command.summary(declared) == first
        assert first.replace("- ", "-") in text.replace("- ", "-")


def start(*words, **options):
    line = [sys.executable, "-m", "kvcondense", *words]
    # A shell that runs these tests behind its back has Ctrl-C ignored, and children inherit that.
    usual = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, preexec_fn=usual, **pipes, **options)


def test_ctrl_c_ends_in_one_line_and_leaves_old_files(tmp_path):
    report = tmp_path / "r.json"
    report.write_text("old")
    with start("conformance", "--soak", "5", "--json", str(report), cwd=tmp_path) as child:
        time.sleep(5)
        child.send_signal(signal.SIGINT)
        output, error = child.communicate(timeout=30)
    assert (child.returncode, output, error.splitlines()[-1]) == (130, "", "interrupted")
    assert "Traceback" not in error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("r.json", "old")]


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    with start("explain", "--steps", "3000") as child:
        child.stdout.readline()
        child.stdout.close()
        assert "Traceback" not in child.stderr.read()
    assert child.returncode == 141


def test_a_full_disk_behind_standard_output_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvcondense", "info"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


def test_names_that_are_no_text_and_closed_streams():
    done = subprocess.run(
        [sys.executable, "-m", "kvcondense", "plan", "--model", b"\xff\xfe/x.json"], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    closed = ["sh", "-c", f"{sys.executable} -m kvcondense plan >&- 2>&-"]
    assert subprocess.run(closed, check=False).returncode in (0, 2)


def test_a_fault_is_told_whole_and_is_no_verdict(monkeypatch, capsys):
    from kvcondense.cli import main
    from kvcondense.cli.work import plan

    monkeypatch.setattr(plan, "run", lambda output, **options: [][0])
    monkeypatch.setattr(sys, "argv", ["kvcondense", "plan"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert "IndexError" in text
    assert "please report it" in text


def test_a_file_takes_the_place_of_another_whole_or_not_at_all(tmp_path):
    old = tmp_path / "old.json"
    old.write_text("old")
    old.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(old)

    def interrupted():
        with replacing(link) as made:
            made.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert old.read_text() == "old"
    with replacing(link) as made:
        made.write_text("new")
        assert old.read_text() == "old"
    assert (old.read_text(), link.is_symlink(), old.stat().st_mode & 0o777) == ("new", True, 0o640)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "old.json"]


def test_what_is_no_file_gets_the_bytes_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as made:
        made.write_text("new")
    assert os.read(reader, 9) == b"new"
    os.close(reader)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()


def test_old_timings_stay_beside_new_ones(tmp_path):
    from kvcondense.bench.records import Log

    path = tmp_path / "t.jsonl"
    path.write_text("old\n")
    Log(path, {"machine": {}}, keep_old=True).add({"us": 1})
    assert path.read_text() == '{"machine": {}}\n{"us": 1}\n'
    assert (tmp_path / "t.jsonl~").read_text() == "old\n"
