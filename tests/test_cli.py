"""The command line: exit statuses, what is printed, JSON, and that every mutant makes ``verify`` fail."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from checkpoints import HIDDEN, write
from kvcondense.backends.cpu import native
from kvcondense.cli import app, main
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.formats import FORMATS, describe
from kvcondense.golden.calibrated import kinds_of
from kvcondense.stream import Sequence

OUTPUTS = ["kv", "kv_state", "score_state", "kv_cache", "kv_bytes"]


def invoke(*words, status=0):
    """Run the command in this process."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def stdout_json(*words):
    """What ``--json -`` leaves on standard output: JSON and nothing else."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    assert result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("rotate", ["--rotate", "--no-rotate"])
@pytest.mark.parametrize("history", [0, 1000])
@pytest.mark.parametrize("kind", ["hca", "csa", "indexer"])
def test_verify_passes(kind, history, rotate):
    text = invoke("verify", "--kind", kind, "--preset", "demo", "--history", history, rotate, "--batch", 2)
    lines = [line.split() for line in text.splitlines()]
    assert [line[0] for line in lines if "PASS" in line] == OUTPUTS
    assert "FAIL" not in text


@pytest.mark.parametrize("start", ["127", "128", "1000", "511,1003"])
def test_verify_takes_start_positions(start):
    text = invoke("verify", "--kind", "hca", "--start-pos", start, "--batch", 2, "--history", 200)
    assert text.count("PASS") == 5


@pytest.mark.parametrize(
    ("words", "title"), [(["--ratio", 4], "csa:"), (["--ratio", 4, "--kind", "indexer"], "indexer:")]
)
def test_verify_takes_a_ratio(words, title):
    assert invoke("verify", *words, "--history", 30, "--batch", 1).startswith(title)


def test_verify_flash_with_yarn():
    assert invoke("verify", "--preset", "flash", "--kind", "csa", "--history", 100, "--batch", 1).count("PASS") == 5


@pytest.mark.parametrize(("name", "by"), [("ape-dropped", "this case"), ("stale-draft-row", "I")])
def test_a_mutant_fails_even_where_the_case_is_blind(name, by, tmp_path):
    """``test_conformance.py::test_every_mutant_is_killed_by_a_wrong_answer`` asks for all of them."""
    report = tmp_path / "r.json"
    text = invoke("verify", "--kind", "hca", "--history", 0, "--batch", 1, "--mutant", name, "--json", report, status=1)
    assert f"CAUGHT by {by}" in text
    assert json.loads(report.read_text())["caught_by"].startswith(by)


def test_list_mutants_prints_names_alone():
    assert invoke("verify", "--list-mutants").split("\n") == [*MUTANTS, ""]


def test_verify_json_says_what_was_printed():
    report = stdout_json("verify", "--kind", "csa", "--history", 20, "--batch", 2, "--json", "-")
    assert list(report["outputs"]) == OUTPUTS
    assert all(o["passed"] and o["worst"] < 0.1 for o in report["outputs"].values())
    assert report["case"]["history"] == 20


@pytest.mark.parametrize(
    "words",
    [
        "--kind mla",
        "--ratio 8",
        "--ratio 4 --kind hca",
        "--preset x",
        "--backend cuda",
        "--mutant none",
        "--start-pos a",
        "--start-pos 99999999",
        "--history -1",
        "--batch 0",
        "--no-such-option",
    ],
)
def test_verify_refuses_with_status_2(words):
    invoke("verify", *words.split(), status=2)


FITTING = [(kind, name) for name, fmt in FORMATS.items() for kind in kinds_of(fmt)]
REFUSED = [("hca", "mxfp4_indexer"), ("csa", "int8_indexer"), ("indexer", "fp8_model1")]


@pytest.mark.parametrize(("kind", "name"), FITTING)
def test_verify_passes_in_every_format_that_fits(kind, name):
    report = stdout_json("verify", "--kind", kind, "--format", name, "--history", 1000, "--batch", 2, "--json", "-")
    assert list(report["outputs"]) == OUTPUTS
    assert report["case"]["format"] == name
    assert report["outputs"]["kv_bytes"]["worst"] == 0.0
    quantised = name not in ("bf16", "fp32")
    assert (report["outputs"]["kv_cache"]["worst"] > 0.02) == quantised


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_verify_refuses_formats_that_do_not_fit_with_the_reason(kind, name):
    result = CliRunner().invoke(app, ["verify", "--kind", kind, "--format", name])
    assert result.exit_code == 2
    assert f"head_dim {FORMATS[name].head_dim} for {name} ({FORMATS[name].summary})" in result.output


@pytest.mark.parametrize("name", ["scale-floor-on-scale", "pad-unwritten", "scales-inline"])
def test_wrong_bytes_are_caught_in_the_formats_own_case(name):
    text = invoke("verify", "--kind", "hca", "--format", "fp8_model1", "--history", 300, "--mutant", name, status=1)
    blind = name == "scale-floor-on-scale"  # rows of unit RMS are far above the floor
    assert ("CAUGHT by I9 bytes" if blind else "CAUGHT by this case") in text
    assert "kv_bytes     PASS" in text if blind else "kv_bytes     FAIL" in text


def test_info_lists_formats():
    assert invoke("info", "--formats", "--names").split("\n") == [*FORMATS, ""]
    assert all(name in invoke("info", "--formats") for name in FORMATS)
    assert invoke("info", "--formats", "--markdown") == describe.markdown()
    report = stdout_json("info", "--formats", "--json", "-")
    assert [row["format"] for row in report["formats"]] == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_info_shows_a_format(name):
    text = invoke("info", "--format", name, "--head-dim", 64)
    fmt = FORMATS[name]
    for f in fmt.fields(fmt.head_dim or 64):
        assert f"| {f.name} 0" in text
    assert ("| tail |" in text) == (fmt.align > 1)


def test_info_measures_the_error():
    text = invoke("info", "--format", "fp8_model1", "--error")
    assert "cosine 0.999" in text
    report = stdout_json("info", "--format", "mxfp4_indexer", "--error", "--json", "-")
    assert list(report["error"]) == report["kinds"] == ["indexer"]
    assert 0 < report["error"]["indexer"]["mean"] < report["error"]["indexer"]["max"] < 1
    assert "holds" in report["bytes"][0]


@pytest.mark.parametrize("words", ["--names", "--markdown", "--error", "--format x", "--format bf16 --head-dim 0"])
def test_info_refuses_with_status_2(words):
    invoke("info", *words.split(), status=2)


def test_plan_prints_the_published_sizes():
    text = invoke("plan", "--model", "flash")
    assert "  state         12206080 B (11.64 MiB)" in text
    assert "  state         1843200 B (1.76 MiB)" in invoke("plan", "--state", "online")
    report = stdout_json("plan", "--context", "4k", "--json", "-")
    table = {x["compressor"]: x for x in report["compressors"]}
    assert table["flash HCA"]["ring"] == 85 * table["flash HCA"]["online"] + 2048 == 524_288
    assert table["flash CSA"]["cache"] == 16 * 37440
    assert table["flash HCA"]["cache"] == 16 * 1728
    assert table["flash indexer"]["cache"] == 16 * 64 * 68
    assert table["flash CSA"]["per_token"] == 37440 / 256
    assert report["totals"]["uncompressed"] == 41 * 16 * -(-584 * 256 // 576) * 576
    exported = {x["compressor"]: x for x in report["exported"]}
    assert exported["flash CSA"]["first_window"] == [0, 8192, 16384, 24576]
    assert exported["flash CSA"]["later"] == [32768, 40960, 49152, 57344]
    assert exported["flash HCA"]["later"] == [4096 * p for p in range(128)]


def test_plan_says_how_many_requests_fit(tmp_path):
    picture = tmp_path / "memory.png"
    report = stdout_json("plan", "--memory", "80GiB", "--json", "-", "--plot", picture)
    one = report["totals"]["state"] + report["totals"]["cache"]
    assert report["fits"] == {"memory": 80 << 30, "requests": (80 << 30) // one}
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert stdout_json("plan", "--memory", "141GB", "--json", "-")["fits"]["memory"] == 141 * 10**9


def test_plan_reads_a_config(tmp_path):
    directory = write(tmp_path)
    report = stdout_json(
        "plan", "--model", directory / "config.json", "--context", 64, "--format", "fp32,bf16", "--json", "-"
    )
    assert {x["format"] for x in report["compressors"]} <= {"fp32", "bf16"}
    assert report["totals"]["uncompressed"] > 0


def test_a_longer_request_costs_what_its_tokens_cost():
    one, two = (stdout_json("plan", "--context", n, "--json", "-")["totals"] for n in ("256k", "512k"))
    assert two["cache"] - one["cache"] == one["per_token"] * (1 << 18)
    assert two["state"] == one["state"]


@pytest.mark.parametrize(
    "words",
    [
        "--model x",
        "--context 1048577",
        "--context -1",
        "--context 1q",
        "--batch 0",
        "--draft -1",
        "--format mxfp4_indexer",
        "--page-tokens 0",
        "--state paged",
        "--memory much",
        "--plot memory.txt",
    ],
)
def test_plan_refuses_with_status_2(words):
    invoke("plan", *words.split(), status=2)


@pytest.mark.parametrize("model", ["demo", "flash", "pro", "v41"])
def test_plan_knows_every_model(model):
    context = "4k" if model == "demo" else "1M"
    text = invoke("plan", "--model", model, "--context", context, "--batch", 3, "--draft", 7)
    assert "3 requests" in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("command", ["verify", "conformance", "compress", "convert", "plan", "info"])
def test_every_command_has_help_with_an_example_and_json(command):
    text = invoke(command, "--help")
    assert f"Example: kvcondense {command}" in text
    assert "--json" in text


def test_info_says_what_can_run():
    report = stdout_json("info", "--json", "-")
    assert "pypto" in report["backends"].pop("pypto"), "which package is missing, or which form"
    assert report["backends"] == {"cpu": None, "triton": None, "reference": None}
    assert {k["name"] for k in report["kernels"]} == set(native.KERNELS)
    assert report["versions"]["torch"] == torch.__version__
    table = {row["compressor"]: row for row in report["compressors"]}
    assert table["flash HCA"]["state_bytes"] == 512 * 1024
    assert [table[name]["layers"] for name in ("flash CSA", "pro HCA", "v41 ratio 2")] == [21, 31, 3]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model")
    x = torch.randn(150, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"hidden_states": x}, tmp_path / "h.safetensors")
    return tmp_path


def compress(folder, out, *words, status=0):
    base = ["--checkpoint", folder / "model", "--hidden", folder / "h.safetensors", "--layer", 1]
    return invoke("compress", *base, "--out", folder / out, *words, status=status)


def test_compress_chunked_resumed_and_one_go_are_byte_equal(folder):
    text = compress(folder, "whole")
    assert "150 tokens" in text
    compress(folder, "chunked", "--chunk", 7)
    compress(folder, "resumed", "--limit", 61, "--chunk", 10)
    compress(folder, "resumed", "--resume")
    whole, chunked, resumed = ((folder / n).read_bytes() for n in ("whole", "chunked", "resumed"))
    assert whole == chunked == resumed
    got = load_file(folder / "whole")
    assert got["main.rows"].shape == (37, 16)
    assert got["indexer.rows"].shape == (37, 8)
    assert got["main.state"].shape == (6, 64)


def test_ctrl_c_saves_the_chunks_that_are_done(folder, monkeypatch):
    compress(folder, "whole")
    feed = Sequence.feed

    def interrupted(self, hidden, *, progress, **options):
        def once(tokens):
            signal.raise_signal(signal.SIGINT)
            progress(tokens)

        return feed(self, hidden, progress=once, **options)

    monkeypatch.setattr(Sequence, "feed", interrupted)
    assert "interrupted" in compress(folder, "out", "--chunk", 40, status=130)
    monkeypatch.undo()
    assert "resumed at 40" in compress(folder, "out", "--resume")
    assert (folder / "out").read_bytes() == (folder / "whole").read_bytes()


def test_compress_options_reach_the_rows(folder):
    compress(folder, "a")
    compress(folder, "b", "--no-rotate")
    compress(folder, "c", "--rounding", "fused", "--format", "fp32", "--json", folder / "c.json")
    a, b, c = (load_file(folder / n) for n in "abc")
    assert torch.equal(a["main.rows"], b["main.rows"])
    assert not torch.equal(a["indexer.rows"], b["indexer.rows"])
    assert c["main.rows"].dtype == torch.float32
    assert (c["main.rows"] - a["main.rows"].float()).abs().max() < 0.1
    assert json.loads((folder / "c.json").read_text())["parts"]["main"]["spec"]["rounding"] == "fused"


@pytest.mark.parametrize(
    "words",
    [
        "--layer 0",
        "--layer 77",
        "--rounding none",
        "--format fp8",
        "--chunk 0",
        "--resume",
        "--backend cpu",
        "--tensor x",
        "--first-position -1",
        "--checkpoint nowhere",
        "--hidden nowhere",
    ],
)
def test_compress_refuses_with_status_2_and_writes_nothing(folder, words):
    compress(folder, "out", *words.split(), status=2)
    assert not (folder / "out").exists()


def test_module_and_script_end_with_the_option_that_was_typed_and_status_2(monkeypatch, capsys):
    run = subprocess.run(
        [sys.executable, "-m", "kvcondense", "verify", "--kind", "x"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stderr.endswith("Invalid value for '--kind': expected one of hca, csa, indexer, got 'x'.\n")
    for words, message in (
        (["verify", "--backend", "x"], "Invalid value for '--backend': expected"),
        (["verify", "--start-pos", "x"], "error: --start-pos: expected"),
        (
            ["info", "--json", "/nowhere/at/all.json"],
            "error: --json: expected a file that can be written, got /nowhere/at/all.json",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["kvcondense", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
