"""Some 300 command lines, right and wrong: how they end, in whose words, that no traceback is seen and no file harmed.

A line stands with its exit status and words that must be in what it prints; {name}: a file of ``folder``.
"""

import hashlib
import itertools
import json
import os
import pickle
import resource
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from checkpoints import HIDDEN, WIDE, write
from kvcondense import cli
from kvcondense.cli import app
from kvcondense.stream import Sequence

BASELINE = Path(__file__).parent.parent / "benchmarks" / "baselines" / "cpu.jsonl"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
COMPRESS = "compress --checkpoint model --layer 1 --hidden h.safetensors"

RIGHT = [
    ("--version", 0, "kvcondense 0.1.0"),
    ("--help", 0, "Compare a backend with the original kernel's golden reference: ¦ 2: it could not"),
    ("verify --kind csa --history 20 --batch 1", 0, "kv_bytes     PASS ¦ kv, kv_cache may differ in bits: ¦ 1e-3"),
    ("verify --kind csa --history 20 --batch 1 --quiet", 0, ""),
    ("verify --kind csa --history 20 --batch 1 --mutant ape-dropped", 1, "CAUGHT by this case"),
    ("verify --kind csa --history 20 --batch 1 --mutant ape-dropped --quiet", 1, ""),
    ("verify --list-mutants", 0, "ape-dropped"),
    ("verify --history 20 --batch 1 --json -", 0, '"passed": true'),
    ("verify --history 20 --batch 1 --json v.json --report v.html", 0, "written to v.html"),
    (f"{COMPRESS} --out new.st", 0, "150 tokens"),
    (f"{COMPRESS} --out cache.st --resume", 0, "resumed at 61"),
    (f"{COMPRESS} --out link.st --quiet", 0, ""),
    (f"{COMPRESS} --out né/ü.st --format fp8_tensor --tensor-scale 0.05", 0, "-> né/ü.st"),
    ("compress --checkpoint né --layer 1 --hidden né/日.safetensors --out new.st --json -", 0, '"tokens": 150'),
    (f"{COMPRESS} --out new.st --chunk 1000000000000000 --limit 1000000000000000000000000000000", 0, "150 tokens"),
    ("convert cache.st --out new.st --format fp32", 0, "bf16, ¦ -> main"),
    ("convert cache.st --out cache2.st --format fp32 --json new.json", 0, "cache.st -> cache2.st"),
    ("plan", 0, "not counted: weights, sliding windows ¦ a token costs"),
    ("plan --memory 80GiB", 0, "22 such requests, of what is counted here ¦ not counted: weights"),
    ("plan --time", 0, "planning a decode step of 1024 requests"),
    ("plan --model model --context 64 --format fp32,bf16", 0, "model CSA: 2 layers"),
    ("plan --model model/config.json --context 64 --format fp32,bf16", 0, "state per layer"),
    ("plan --model né --context 64 --format fp32,bf16", 0, "né"),
    ("plan --json - --context 4k", 0, '"planning_seconds": null'),
    ("plan --json new.json --plot new.svg --quiet", 0, ""),
    ("plan --batch 1000000000000000000000000000000", 0, "1000000000000000000000000000000 requests"),
    ("plan --memory 999999999999999999999999", 0, "such requests"),
    ("explain --kind hca --prompt 130 --chunk 65", 0, "step 1: positions 0..64"),
    ("explain --trace t.json --page t.html --tour tour.html --quiet", 0, ""),
    ("explain --model v41 --kind 'ratio 2'", 0, "step 1"),
    ("bench --list", 0, "prefill 8192, ratio 128"),
    ("bench --list --swap", 0, "swap 8 requests, live rows"),
    ("bench --from {baseline} --json new.jsonl --plot new.png --report new.html", 0, "drawn to new.png"),
    ("bench --list --json -", 0, '"flops": 0'),
    ("aot --list", 0, "hca-ring"),
    ("aot --list --json -", 0, '"hca-ring'),
    ("info", 0, "backend cpu"),
    ("info --quiet", 0, ""),
    ("info --json -", 0, '"state_bytes": 524288'),
    ("info --json - --quiet", 0, '"layers": 21'),
    ("info --formats --names", 0, "mxfp4_indexer"),
    ("info --format fp8_model1 --json -", 0, '"bytes": 448'),
    ("info --checkpoint model", 0, "compressors, ¦ bytes"),
    ("info --checkpoint né", 0, "compressors, "),
    ("conformance --adapter mutant:ape-shifted --replay case.json --quiet", 1, ""),
    ("conformance --adapter reference --replay case.json", 0, "PASS"),
]  # fmt: skip

TYPOS = [
    ("veriyf", 2, "'veriyf' ¦ 'verify'"),
    ("convrt a --out b", 2, "'convrt' ¦ 'convert'"),
    ("", 2, "Usage ¦ Compile the Triton kernels ahead of time, without a GPU"),
    ("--verison", 2, "--verison ¦ --version"),
    ("plan --modle x", 2, "--modle ¦ --model"),
    ("verify --histroy 3", 2, "--histroy ¦ --history"),
    ("plan --context", 2, "--context"),
    ("plan surplus", 2, "surplus"),
    ("compress --layer 1", 2, "--checkpoint"),
    ("convert", 2, "SOURCE"),
    ("verify --kind cs", 2, "--kind ¦ 'cs' ¦ did you mean csa?"),
    ("verify --preset flsh", 2, "--preset ¦ did you mean flash?"),
    ("verify --preset v41", 2, "--preset: ¦ v41"),
    ("verify --backend cuda", 2, "--backend ¦ 'cuda' ¦ kvcondense info"),
    ("verify --format fp8_mode", 2, "--format ¦ did you mean fp8_model1?"),
    ("verify --kind csa --format mxfp4_indexer", 2, "--format: expected head_dim 128 ¦ head_dim 512"),
    ("verify --mutant ape-droped", 2, "--mutant ¦ did you mean ape-dropped?"),
    ("verify --ratio 4 --kind hca", 2, "--ratio ¦ 4 with --kind hca"),
    ("verify --start-pos a", 2, "--start-pos ¦ 'a'"),
    ("verify --start-pos 1,,2", 2, "--start-pos ¦ '1,,2'"),
    ("plan --model flsh", 2, "--model ¦ 'flsh' ¦ did you mean flash?"),
    ("plan --format fp8_mode", 2, "--format ¦ did you mean fp8_model1?"),
    ("plan --format fp8_model1,bf61", 2, "--format ¦ 'bf61' ¦ did you mean bf16?"),
    ("plan --format bf16,bf16,bf16", 2, "--format ¦ 'bf16,bf16,bf16'"),
    ("plan --format mxfp4_indexer", 2, "--format: expected head_dim 128"),
    ("plan --format fp8_model1,fp8_model1", 2, "--format: expected head_dim 512"),
    ("plan --state paged", 2, "--state ¦ 'paged'"),
    ("plan --memory much", 2, "--memory ¦ 'much'"),
    ("plan --context 1q", 2, "--context ¦ '1q'"),
    ("explain --kind hcaa", 2, "--kind ¦ did you mean hca?"),
    ("explain --model v41 --kind csa", 2, "--kind ¦ v41's"),
    ("explain --ring-rows 1 --state-page 2", 2, "--ring-rows"),
    ("explain --ring-rows 1", 2, "rows"),
    ("explain --kind indexer --format fp8_model1", 2, "--format"),
    ("bench --backend nobody", 2, "--backend ¦ 'nobody'"),
    ("bench --case nothing", 2, "--case ¦ nothing"),
    ("bench --fused", 2, "--fused: expected --backend triton"),
    ("bench --training --context-parallel", 2, "--training"),
    ("bench --swap --bundle", 2, "--fused: expected one of ¦ --swap"),
    ("bench --swap --backend triton", 2, "--swap: expected a backend of the CPU"),
    ("bench --resume", 2, "--resume: expected --json FILE"),
    ("bench --peer-file vllm=.", 2, "--peer-file"),
    ("tune --kind hac", 2, "--kind ¦ 'hac' ¦ did you mean hca?"),
    ("aot --variant nothing", 2, "--variant ¦ nothing"),
    ("warm --backend reference", 2, "--backend ¦ 'reference'"),
    ("warm --state rnig", 2, "--state ¦ did you mean ring?"),
    ("info --names", 2, "--names ¦ --formats"),
    ("info --error", 2, "--error ¦ --format NAME"),
    ("info --format fp8_mode", 2, "--format ¦ did you mean fp8_model1?"),
    ("conformance --adapter nowhere:make", 2, "--adapter ¦ nowhere:make ¦ PYTHONPATH"),
    ("conformance --adapter mutant:rope", 2, "mutant:NAME"),
    ("conformance --adapter reference:rnig", 2, "--adapter ¦ reference:rnig"),
    ("conformance --adapter ''", 2, "--adapter"),
    ("conformance --adapter os:getcwd", 2, "--adapter ¦ Adapter"),
    ("conformance --adapter broken:make", 2, "--adapter ¦ broken:make ¦ ZeroDivisionError"),
    ("conformance --adapter fails:make", 2, "--adapter ¦ fails:make ¦ no engine here"),
    (f"{COMPRESS} --out new.st --layer 0", 2, "--layer ¦ 0"),
    (f"{COMPRESS} --out new.st --layer 77", 2, "--layer ¦ 77"),
    (f"{COMPRESS} --out new.st --rounding none", 2, "--rounding ¦ 'none'"),
    (f"{COMPRESS} --out new.st --backend cuda", 2, "--backend ¦ 'cuda'"),
    (f"{COMPRESS} --out new.st --format fp8_fit", 2, "--format"),
    (f"{COMPRESS} --out new.st --format fp8_tensor", 2, "--tensor-scale"),
    (f"{COMPRESS} --out new.st --tensor-scale 1", 2, "--tensor-scale"),
    (f"{COMPRESS} --out new.st --tensor nothing", 2, "h.safetensors ¦ nothing"),
    ("convert cache.st --out new.st", 2, "--format ¦ --indexer-format"),
    ("convert cache.st --out new.st --format fp8_tensor", 2, "--tensor-scale"),
]  # fmt: skip

HUGE = ("1000000000000000", "1" + "0" * 30, "9" * 5000)
NUMBERS = [
    (f"{command} {option} {value}", 2, f"{option} ¦ {value[:50]}")
    for command, option, values in (
        ("verify", "--history", ("-1", "x", "1.5", *HUGE)),
        ("verify", "--batch", ("0", "x", *HUGE)),
        ("verify", "--ratio", ("8", "0", *HUGE)),
        ("verify", "--scale", ("nan", "inf", "-1", "0", "x", "1e999")),
        ("verify", "--seed", ("-1", *HUGE)),
        ("verify", "--start-pos", ("99999999", *HUGE[:2])),
        ("conformance", "--soak", ("nan", "-1", "inf")),
        ("conformance", "--rounds", ("0", *HUGE)),
        (f"{COMPRESS} --out new.st", "--chunk", ("0", "x")),
        (f"{COMPRESS} --out new.st", "--first-position", ("-1", HUGE[1])),
        (f"{COMPRESS} --out new.st", "--page-tokens", ("0", *HUGE)),
        (f"{COMPRESS} --out new.st --format fp8_tensor", "--tensor-scale", ("nan", "0", "-1", "inf")),
        (f"{COMPRESS} --out new.st", "--layer", HUGE[:2]),
        ("convert cache.st --out new.st --format fp4_v41", "--page-tokens", HUGE),
        ("plan", "--batch", ("0", "-1", "x")),
        ("plan", "--draft", ("-1",)),
        ("plan", "--context", ("-1", "1048577", *HUGE[:2])),
        ("plan", "--memory", ("nan", "1e9")),
        ("plan", "--page-tokens", ("0", *HUGE)),
        ("explain", "--steps", HUGE),
        ("explain", "--page-rows", ("0", *HUGE)),
        ("tune", "--budget", ("nan", "0")),
        ("aot", "--jobs", ("0", *HUGE)),
        ("warm", "--drafts", HUGE),
        ("info --format bf16", "--head-dim", ("0", *HUGE)),
    )
    for value in values
]

FOREIGN = ("missing", "pickle.bin", "picture.png", "list.json", "cut.st", "empty.st", "random.st", "deep.json", "model")
READERS = {
    "convert {} --out new.st --format fp32": "",
    f"{COMPRESS.replace('h.safetensors', '{}')} --out new.st": "",
    "plan --model ./{}": "",
    "conformance --replay {}": "",
    "bench --from {}": "",
    "info --checkpoint {}": "model",
    "compress --checkpoint {} --layer 1 --hidden h.safetensors --out new.st": "model",
}
INPUTS = [
    (line.format(file), 2, file)
    for (line, fits), file in itertools.product(READERS.items(), FOREIGN)
    if file != fits and not ("--model" in line and file == "model")
] + [
    ("plan --model broken-model", 2, "broken-model/config.json ¦ compress_rates"),
    ("plan --model empty-folder", 2, "--model ¦ empty-folder"),
    ("info --checkpoint empty-folder", 2, "empty-folder ¦ config.json"),
    ("info --checkpoint no-tensors", 2, "no-tensors ¦ 0 files"),
    ("info --checkpoint model/config.json", 2, "--checkpoint ¦ model/config.json ¦ model has it"),
    (f"{COMPRESS} --out link.st --hidden none.safetensors", 2, "--hidden ¦ none.safetensors"),
    ("compress --checkpoint model --layer 1 --hidden narrow.safetensors --out new.st", 2, "channels"),
    ("compress --checkpoint fit-model --layer 1 --hidden h.safetensors --out new.st --format fp8_model1", 2,
     "--indexer-format ¦ fp8_model1 ¦ mxfp4_indexer"),
    (f"{COMPRESS} --out other.st --resume", 2, "other.st"),
    (f"{COMPRESS} --out absent.st --resume", 2, "absent.st ¦ no such file"),
    ("bench --from heads.jsonl --json new.jsonl", 2, "--from ¦ heads.jsonl, which has none"),
    ("bench --resume --json list.json", 2, "--resume ¦ list.json"),
    ("convert nothing.st --out cache.st --format fp32", 2, "nothing.st, of none"),
]  # fmt: skip

WRITERS = {
    "verify --history 20": ("--json", "--report"),
    "plan": ("--json", "--plot"),
    "explain": ("--json", "--trace", "--page", "--tour"),
    "bench --list": ("--json", "--plot", "--report"),
    "conformance": ("--json", "--report", "--folder"),
    "vectors mutants model": ("--json",),
    COMPRESS: ("--out",),
    "convert cache.st --format fp32": ("--out",),
    "tune": ("--json", "--out"),
    "aot --list": ("--json",),
    "warm --backend cpu": ("--json",),
    "info": ("--json",),
}
SUFFIXES = {"--report": ".html", "--plot": ".png"}
OUTPUTS = [
    (f"{line} {option} {place}{SUFFIXES.get(option, '')}", 2, f"{option}: ¦ {place}")
    for line, options in WRITERS.items()
    for option in options
    for place in ("nowhere/at/all", "list.json/within", "/proc/new")
] + [
    (f"{line} {option} {place}", 2, f"{option}: ¦ {place}")
    for line, option, place in (
        ("plan", "--json", "model"), (COMPRESS, "--out", "model"), ("plan", "--plot", "new.txt"),
        ("plan", "--plot", "-"), ("verify", "--report", "new.pdf"), ("explain", "--trace", "-"),
        (COMPRESS, "--out", "loop.st"), ("bench --from {baseline}", "--json", "n" * 300),
    )
] + [
    ("plan --json /dev/full", 2, "/dev/full ¦ No space left"),
    (f"{COMPRESS} --out /dev/full", 2, "/dev/full ¦ No space left"),
    ("explain --trace /dev/full", 2, "/dev/full ¦ No space left"),
    ("bench --from {baseline} --json /dev/full", 2, "/dev/full ¦ No space left"),
    (f"{COMPRESS} --out h.safetensors", 2, "--out ¦ --hidden reads ¦ h.safetensors"),
    (f"{COMPRESS} --out ./model/../h.safetensors", 2, "--out ¦ --hidden reads"),
    (f"{COMPRESS} --out new.st --json link-to-h", 2, "--json ¦ --hidden reads ¦ link-to-h"),
    (f"{COMPRESS} --out model/model.safetensors", 2, "--out ¦ --checkpoint reads"),
    (f"{COMPRESS} --out new.st --json model/config.json", 2, "--json ¦ --checkpoint reads"),
    (f"{COMPRESS} --out same.st --json ./same.st", 2, "--out ¦ --json writes"),
    ("convert cache.st --out cache.st --format fp32", 2, "--out ¦ SOURCE reads"),
    ("convert link.st --out cache.st --format fp32", 2, "--out ¦ SOURCE reads"),
    ("convert hard.st --out other.st --format fp32", 2, "--out ¦ SOURCE reads"),
    ("plan --model model --context 64 --json model/config.json", 2, "--json ¦ --model reads"),
    ("plan --model model/config.json --context 64 --json model/config.json", 2, "--json ¦ --model reads"),
    ("bench --from {baseline} --json {baseline}", 2, "--json ¦ --from reads"),
    ("explain --trace a.x --page a.x", 2, "--page ¦ --trace writes"),
    ("conformance --replay case.json --junit case.xml", 2, "--junit ¦ --replay"),
    ("conformance --folder list.json", 2, "--folder ¦ list.json, which is a file"),
    ("vectors write list.json", 2, "FOLDER ¦ list.json, which is a file"),
    ("vectors write model", 2, "FOLDER ¦ an empty folder, or one of test vectors ¦ model"),
    ("vectors check model --against model", 2, "index.json"),
    ("vectors play model --adapter reference", 2, "--out ¦ none"),
]  # fmt: skip

VOID = [
    (line, 2, f"{option}: expected {words}")
    for line, option, words in (
        ("conformance --mutants --soak 1", "--soak", "to be left out with --mutants ¦ got --soak 1"),
        ("conformance --mutants --adapter reference", "--adapter", "to be left out with --mutants"),
        ("conformance --mutants --exec ./driver", "--exec", "to be left out with --mutants"),
        ("conformance --mutants --folder model", "--folder", "to be left out with --mutants"),
        ("conformance --soak 1 --replay case.json", "--soak", "to be left out with --replay"),
        ("conformance --replay case.json --seed 0", "--seed", "to be left out with --replay"),
        ("conformance --soak 1 --rounds 2", "--rounds", "to be left out with --soak"),
        ("conformance --adapter cpu --exec ./driver", "--adapter", "to be left out with --exec"),
        ("conformance --timeout 5", "--timeout", "--exec beside it"),
        ("vectors write new-folder --adapter cpu", "--adapter", "to be left out with vectors write"),
        ("vectors write new-folder --without csa --without hca", "--without", "to be ¦ --without csa --without hca"),
        ("vectors mutants model --without exact", "--without", "to be left out with vectors mutants"),
        ("vectors check model --against model --out model", "--out", "to be left out with vectors check"),
        ("vectors play model --out new-folder --against model", "--against", "to be left out with vectors play"),
    )
]

MISSING = [  # package, line, words
    ("matplotlib", "plan --plot new.png", "--plot ¦ matplotlib (pip install 'kvcondense[bench]')"),
    ("matplotlib", "verify --report new.html", "--report ¦ matplotlib"),
    ("matplotlib", "bench --plot new.svg --json new.jsonl", "--plot ¦ matplotlib"),
    ("matplotlib", "conformance --soak 5 --report new.html", "--report ¦ matplotlib"),
    ("triton", "aot --jobs 1", "triton (pip install 'kvcondense[triton]')"),
    ("triton", "warm --arch sm_90", "triton (pip install 'kvcondense[triton]')"),
    ("triton", "tune --dry-run", "triton"),
    ("safetensors", f"{COMPRESS} --out new.st", "safetensors ¦ installed"),
    ("transformers", "conformance --adapter kvcondense.conformance.transformers_adapter:make", "transformers"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files, good and bad; lines run in it. A number that is not refused must not take the machine's memory."""
    assert Path(cli.__file__).is_relative_to(Path(__file__).parent.parent), "these lines are for the code beside them"
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, limits[1]))
    root = tmp_path_factory.mktemp("lines")
    here = Path.cwd()
    os.chdir(root)
    gen = torch.Generator().manual_seed(0)
    write(root / "model")
    write(root / "né")
    x = torch.randn(150, HIDDEN, generator=gen).bfloat16()
    for name in ("h.safetensors", "né/日.safetensors"):
        save_file({"hidden_states": x}, root / name)
    save_file({"hidden_states": x[:0]}, root / "none.safetensors")
    save_file({"hidden_states": x[:, :8].contiguous()}, root / "narrow.safetensors")
    write(root / "fit-model", model=WIDE)
    for out, more in (("cache.st", "--limit 61"), ("other.st", "--no-rotate")):
        assert run(f"{COMPRESS} --out {out} {more}").exit_code == 0
    Sequence.start(root / "model", 1).save(root / "nothing.st")
    data = (root / "cache.st").read_bytes()
    (root / "cut.st").write_bytes(data[: len(data) // 2])
    (root / "random.st").write_bytes(bytes(range(256)) * 40)
    (root / "empty.st").touch()
    (root / "pickle.bin").write_bytes(pickle.dumps({"weights": [1, 2]}))
    (root / "picture.png").write_bytes(PNG)
    (root / "list.json").write_text("[1, 2]\n")
    (root / "deep.json").write_text("[" * 100_000)
    (root / "heads.jsonl").write_text('{"machine": {}, "rates": {}}\n')
    (root / "case.json").write_text('{"spec": "csa", "requests": 1, "ops": [{"kind": "step", "counts": [9]}]}')
    (root / "broken.py").write_text("1 / 0\n")
    (root / "fails.py").write_text("def make():\n    raise ValueError('no engine here')\n")
    broken = {**json.loads((root / "model" / "config.json").read_text()), "layer_types": ["x"], "compress_rates": [4]}
    for name in ("broken-model", "empty-folder", "no-tensors"):
        (root / name).mkdir()
    (root / "broken-model" / "config.json").write_text(json.dumps(broken))
    (root / "no-tensors" / "config.json").write_bytes((root / "model" / "config.json").read_bytes())
    for link, target in (("link.st", "cache.st"), ("link-to-h", "h.safetensors"), ("loop.st", "loop.st")):
        (root / link).symlink_to(target)
    os.link(root / "other.st", root / "hard.st")
    sys.path.insert(0, str(root))
    yield root
    resource.setrlimit(resource.RLIMIT_DATA, limits)
    sys.path.remove(str(root))
    os.chdir(here)


def run(line, **environment):
    return CliRunner(env=environment).invoke(app, shlex.split(line.replace("{baseline}", str(BASELINE))))


def contents(folder):
    """What every file holds; a fresh file beside the others is nobody's loss, but a temporary one stays behind."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def judge(line, result, status, words):
    assert result.exception is None or isinstance(result.exception, SystemExit), (line, repr(result.exception))
    assert result.exit_code == status, (line, result.exit_code, result.output)
    assert "Traceback" not in result.output, (line, result.output)
    for word in filter(None, words.split(" ¦ ")):
        assert word in result.output, (line, word, result.output)
    if "--quiet" in line and "--json -" not in line:
        assert result.output == "", line


def lines(*tables):
    found = [one for table in tables for one in table]
    return pytest.mark.parametrize(("line", "status", "words"), found, ids=[one[0][:70] for one in found])


@lines(RIGHT)
def test_right(folder, line, status, words):
    judge(line, run(line), status, words)
    assert not list(folder.glob(".*.part*"))


@lines(TYPOS, NUMBERS, INPUTS, OUTPUTS, VOID)
def test_wrong_lines_end_with_2_in_the_words_that_were_typed_and_change_no_file(folder, line, status, words):
    before = contents(folder)
    judge(line, run(line), status, words)
    assert contents(folder) == before


@pytest.mark.parametrize(("package", "line", "words"), MISSING, ids=[f"{p}: {line[:50]}" for p, line, _ in MISSING])
def test_a_missing_package_is_named_before_any_work(folder, monkeypatch, package, line, words):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    before = contents(folder)
    judge(line, run(line), 2, words)
    assert contents(folder) == before


@pytest.mark.usefixtures("folder")
@lines([one for one in (*RIGHT[2:9], *TYPOS, *OUTPUTS[:9]) if "--help" not in one[0]])
def test_on_a_narrow_terminal_words_are_wrapped_and_stay_whole(line, status, words):
    del words
    result = run(line, COLUMNS="40")
    judge(line, result, status, "")
    assert all(len(one) <= 40 or " " not in one.strip() for one in result.stdout.splitlines() if "--json -" not in line)


@pytest.mark.usefixtures("folder")
@lines([one for one in RIGHT if "--json -" in one[0]])
def test_json_on_standard_output_is_alone(line, status, words):
    del status, words
    found = json.loads(run(line).stdout)
    assert isinstance(found, dict)
    assert not [v for v in leaves(found) if isinstance(v, str) and v.replace(".", "", 1).isdigit()]


def leaves(value):
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "holds":  # "0" is what a byte of a pad holds
                yield from leaves(one)
    else:
        yield value
