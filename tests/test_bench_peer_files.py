"""Peers from files: older and today's interfaces make the reference's rows; what does not fit is refused by name."""

import importlib
import sys
from types import ModuleType

import pytest

import peer_stand_ins as stand_ins
from kvcondense.bench import foreign, peer_files, peers, run
from kvcondense.bench.cases import Case, make_inputs
from kvcondense.bench.runners import Kvcondense
from kvcondense.errors import UnsupportedError

CASES = [
    Case("prefill", "csa", 12, 2, 0),
    Case("decode", "hca", 1, 2, 130),
    Case("chunk", "csa", 9, 1, 6),
    Case("chunks", "csa", 9, 3, 6),
]
KEYS = Case("keys", "indexer", 9, 1, 6)
TODAY = {
    "rtp.py": stand_ins.RTP,
    "save_partial_states.py": stand_ins.SAVE,
    "fused_compress_quant_cache.py": stand_ins.FUSED,
}
OLDER = {
    "rtp.py": stand_ins.RTP_BF16,
    "save_partial_states.py": stand_ins.SAVE_OLD,
    "fused_compress_quant_cache.py": stand_ins.FUSED_OLD,
}


def written(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text)
    return [f"rtp-llm={folder / 'rtp.py'}", f"vllm={folder}"]


@pytest.mark.parametrize("files", [OLDER, TODAY], ids=["older", "today"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_peers_from_files_make_the_same_rows(case, files, tmp_path):
    inputs = make_inputs(case)
    expected = run.rows_of(Kvcondense(inputs, "reference"), inputs)
    for text in written(tmp_path, files):
        peer = peer_files.load(text)
        assert peers.takes(peer, case)
        runner = peer(inputs)
        assert runner.capturable
        assert run.distance(runner, inputs, expected) < run.CLOSE
        state = runner.copy(runner.primed())
        runner.step(state)
        assert state["position"] == case.start + case.tokens


def test_an_installed_engine_is_set_aside_and_comes_back(tmp_path, monkeypatch):
    installed = {name: ModuleType(name) for name in ("vllm", "vllm.platforms", "rtp_llm")}
    for name, module in installed.items():
        monkeypatch.setitem(sys.modules, name, module)
    for text in written(tmp_path, TODAY):
        peer_files.load(text)
    assert {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("vllm", "rtp_llm")} == installed


def test_stubs_do_not_stay(tmp_path):
    for text in written(tmp_path, TODAY):
        peer_files.load(text)
    for name in ("vllm.triton_utils", "rtp_llm.models_py", "kvcondense_peer"):
        assert name not in sys.modules
        with pytest.raises(ImportError):
            importlib.import_module(name)


@pytest.mark.parametrize("text", ["sglang=x", "rtp-llm", "rtp-llm=missing.py", "vllm=."])
def test_peer_files_are_checked(text):
    with pytest.raises(UnsupportedError, match="--peer-file"):
        peer_files.load(text)


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        ("rtp.py", "def run_fused_compress_kv_write(", "def write(", ["run_fused_compress_kv_write", "without it"]),
        ("rtp.py", "def run_save_partial_states(", "def save_states(", ["run_save_partial_states", "without it"]),
        (
            "rtp.py",
            "state_tokens_per_block",
            "state_block_tokens",
            ["lacks state_tokens_per_block", "them state_block"],
        ),
        ("rtp.py", "state_tokens_per_block):", "state_tokens_per_block, n):", ["lacks none; beside them n"]),
        ("rtp.py", "from rtp_llm", "import rtp_llm.x\nrtp_llm.x.setup()\nfrom rtp_llm", ["rtp_llm.x.setup"]),
        ("save_partial_states.py", "ape_stride", "ape_step", ["kernel(kv_ptr", "lacks ape_stride", "them ape_step"]),
        ("save_partial_states.py", "kv_stride, score_ptr", "score_ptr, kv_stride", ["kernel(kv_ptr, kv_stride, score"]),
        ("save_partial_states.py", "kernel = Kernel()", "k = Kernel()", ["kernel", "without it"]),
        (
            "save_partial_states.py",
            "import torch",
            "import torch, nowhere_installed",
            ["ModuleNotFoundError", "nowhere"],
        ),
        ("save_partial_states.py", "import torch", "import torch; (", ["Python source"]),
        ("fused_compress_quant_cache.py", "rms_norm_eps", "epsilon", ["lacks rms_norm_eps", "beside them epsilon"]),
        ("fused_compress_quant_cache.py", "triton(state", "tri(state", ["compress_norm_rope_store_triton", "without"]),
        ("fused_compress_quant_cache.py", "assert round_up", "if envs.X: pass\nassert round_up", ["vllm.envs.X"]),
        ("fused_compress_quant_cache.py", "assert round_up", "helper()\nassert round_up", ["one.level.up.helper"]),
        ("fused_compress_quant_cache.py", "is_rocm()", "is_new()", ["AttributeError", "is_new"]),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_loaded(file, before, after, words, tmp_path):
    assert before in TODAY[file]
    texts = written(tmp_path, {**TODAY, file: TODAY[file].replace(before, after)})
    with pytest.raises(UnsupportedError) as caught:
        peer_files.load(texts[file != "rtp.py"])
    for word in ("--peer-file", str(tmp_path / file), foreign.KNOWN, *words):
        assert word in str(caught.value) or (word == foreign.KNOWN and "Python source" in words)


def test_an_older_file_is_asked_for_what_it_is_called_with(tmp_path):
    changed = {**OLDER, "rtp.py": stand_ins.RTP_BF16.replace("boundary_token_indices", "boundaries")}
    with pytest.raises(UnsupportedError, match="run_fused_compress_kv_write_bf16.*lacks boundary_token_indices"):
        peer_files.load(written(tmp_path, changed)[0])


def test_peers_are_not_asked_for_what_they_lack(tmp_path):
    for text in written(tmp_path, TODAY):
        peer = peer_files.load(text)
        assert not peers.takes(peer, KEYS)
        assert not peers.takes(peer, Case("", "csa", 4, 1, 0, hidden=True))
    assert peers.takes(peers.Nano, Case("", "csa", 4, 1, 0, hidden=True))
    assert not peers.takes(peers.Nano, Case("", "csa", 4, 1, 0, format="bf16"))
