"""Commands and their files when things go wrong: kill -9 at any moment, a full disk, one to read only, two writers."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import sealing
from bundles import Small
from checkpoints import HIDDEN, write
from kvcondense.bundle import Bundle
from kvcondense.cachefile import CacheFile
from kvcondense.cli import app
from kvcondense.errors import IntegrityWarning
from kvcondense.files import replacing, sealed

TOKENS = 1500
UNSHARED = (
    shutil.which("unshare")
    and not subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    ).returncode
)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model's folder, hidden states, and what compressing them in one go gives."""
    folder = tmp_path_factory.mktemp("given")
    model = write(folder / "model")
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"hidden_states": x}, folder / "h.safetensors")
    invoke(*words(model, folder / "h.safetensors", folder / "whole"))
    return model, folder / "h.safetensors", (folder / "whole").read_bytes()


def words(model, hidden, out, *more):
    return ["compress", "--checkpoint", model, "--layer", 1, "--hidden", hidden, "--out", out, "--quiet", *more]


def invoke(*typed, status=0):
    result = CliRunner().invoke(app, [str(w) for w in typed])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def run(*typed, before="", **options):
    """The command in a process of its own, behind a line of shell."""
    line = [sys.executable, "-m", "kvcondense", *map(str, typed)]
    if before:
        line = ["unshare", "-rm", "sh", "-c", f'{before} && exec "$0" "$@"', *line]
    return subprocess.run(line, capture_output=True, text=True, check=False, **options)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_killed_at_random_and_resumed_the_file_is_that_of_one_go(given, tmp_path):
    model, hidden, whole = given
    out, chance, killed, seen = tmp_path / "out", random.Random(1), 0, set()
    typed = words(model, hidden, out, "--chunk", 2, "--save-every", 1e-6)
    for _ in range(6):
        before = out.stat().st_ino if out.exists() else 0
        line = [sys.executable, "-m", "kvcondense", *map(str, typed), *(["--resume"] if before else [])]
        with subprocess.Popen(line, stderr=subprocess.DEVNULL) as child:
            while child.poll() is None and (not out.exists() or out.stat().st_ino == before):
                time.sleep(0.001)
            time.sleep(chance.uniform(0.0, 0.15))
            child.send_signal(signal.SIGKILL)
        killed += child.returncode == -signal.SIGKILL
        seen.add(CacheFile.load(out).position)  # whole, whenever it was killed
    assert killed >= 3
    assert len(seen) > 3
    invoke(*words(model, hidden, out, "--resume"))  # what is left, without a file after every other token
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(not UNSHARED, reason="no mounts of one's own here")
@pytest.mark.parametrize("what", ["full", "read only"])
def test_on_a_disk_that_takes_no_more_the_old_file_stays(what, given, tmp_path):
    model, hidden, whole = given
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.write_bytes(whole)
    before = f"mount -t tmpfs -o size=1M none {disk} && cp {kept} {disk}/out && "
    if what == "full":
        before += f"(dd if=/dev/zero of={disk}/filler bs=1024 2>/dev/null; true)"
    else:
        before += f"mount -o remount,ro none {disk}"
    after = f"cmp {kept} {disk}/out && ls -A {disk}"
    typed = " ".join(map(str, words(model, hidden, disk / "out", "--limit", 1400)))
    script = f"{before} && ({sys.executable} -m kvcondense {typed}; echo status $?; {after})"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    lines = done.stdout.split("\n")
    assert lines[0] == "status 2", done
    assert [line for line in lines[1:] if line] == (["filler", "out"] if what == "full" else ["out"])
    (message,) = done.stderr.strip().split("\n")
    assert str(disk / "out") in message


def test_a_limit_of_a_files_size_is_one_clear_error(given, tmp_path):
    model, hidden, _ = given
    (tmp_path / "out").write_text("old")
    typed = [sys.executable, "-m", "kvcondense", *map(str, words(model, hidden, tmp_path / "out"))]
    line = ["sh", "-c", 'ulimit -f 8; trap "" XFSZ; exec "$0" "$@"', *typed]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": "/tmp"})
    assert (done.returncode, (tmp_path / "out").read_text()) == (2, "old"), done
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert names(tmp_path) == ["out"]


def test_a_second_writer_is_told(given, tmp_path):
    model, hidden, whole = given
    out = tmp_path / "out"
    with replacing(out):
        message = invoke(*words(model, hidden, out), status=2)
        assert "a file that nobody else writes" in message
    invoke(*words(model, hidden, out))
    assert out.read_bytes() == whole


def test_files_of_the_schema_before_are_read_with_a_notice(given, tmp_path):
    model, hidden, whole = given
    (tmp_path / "whole").write_bytes(whole)
    invoke(*words(model, hidden, tmp_path / "new", "--limit", 700))
    header, tensors = sealing.parts(tmp_path / "new")
    from kvcondense.stream import Sequence, _digest, _tensors

    header["schema"] = 2
    for name, c in Sequence.start(model, 1).parts.items():
        header["parts"][name]["weights_sha256"] = _digest(*_tensors(c.weights).values())
    save_file(tensors, tmp_path / "old", metadata={"kvcondense": json.dumps(header)})
    with pytest.warns(IntegrityWarning, match="without digests"):
        CacheFile.load(tmp_path / "old")
    done = run(*words(model, hidden, tmp_path / "old", "--resume"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("note: ")
    assert "schema 2, without digests" in done.stderr
    assert (tmp_path / "old").read_bytes() == whole
    done = run("convert", tmp_path / "whole", "--out", tmp_path / "c", "--format", "fp32", "--no-verify")
    assert (done.returncode, "are not checked" in done.stderr) == (0, True)
    header["parts"]["main"]["weights_sha256"] = "0" * 64
    save_file(tensors, tmp_path / "other", metadata={"kvcondense": json.dumps(header)})
    assert "weights_sha256" in invoke(*words(model, hidden, tmp_path / "other", "--resume"), status=2)


def test_weights_that_have_changed_are_named(given, tmp_path):
    model, hidden, _ = given
    invoke(*words(model, hidden, tmp_path / "out", "--limit", 700))
    other = write(
        tmp_path / "model", change=lambda t: {k: v * 2 if k.endswith("norm.weight") else v for k, v in t.items()}
    )
    message = invoke(*words(other, hidden, tmp_path / "out", "--resume"), status=2)
    assert "parts.indexer.weights_sha256.norm" in message or "parts.main.weights_sha256.norm" in message


def test_a_header_of_another_file_does_not_fit(given, tmp_path):
    (tmp_path / "a").write_bytes(given[2])
    header, tensors = sealing.parts(tmp_path / "a")
    tensors["main.state"] += 1
    sealed.save(tmp_path / "b", header, tensors)
    from safetensors import safe_open

    with safe_open(tmp_path / "b", "pt") as handle:
        metadata = handle.metadata()
    _, original = sealing.parts(tmp_path / "a")
    save_file(original, tmp_path / "c", metadata=metadata)
    with pytest.raises(Exception, match=r"main\.state: expected the bytes that its digest was made of"):
        CacheFile.load(tmp_path / "c")


def test_bundle_from_the_command_line(tmp_path):
    path, facts = Small(tmp_path).path, tmp_path / "facts.json"
    assert "a request of 9 tokens, 1 compressors" in invoke("bundle", "info", path, "--json", facts)
    assert json.loads(facts.read_text())["commits"] == [6, 9]
    assert invoke("bundle", "check", path).startswith("PASS")
    invoke("bundle", "cut", path, "--position", 6, "--out", tmp_path / "cut", "--format", "fp32")
    with Bundle(tmp_path / "cut") as cut:
        assert (cut.position, cut.about["stop"]) == (6, "6")
        assert cut.member(0, "main").converted_from == ("bf16",)
    assert "lost bits in" in invoke("bundle", "info", tmp_path / "cut")
    assert "(6 is)" in invoke("bundle", "cut", path, "--position", 7, "--out", tmp_path / "x", status=2)
    for words_ in (("cut", path), ("info", path, "--out", tmp_path / "x"), ("check", path, "--no-verify"),
                   ("check", tmp_path / "none")):  # fmt: skip
        invoke("bundle", *words_, status=2)
    assert not (tmp_path / "x").exists()
    data = bytearray(path.read_bytes())
    data[1030] ^= 1
    path.write_bytes(data)
    assert "layer 0 main rows" in invoke("bundle", "check", path, status=1)
    data[40] ^= 1
    path.write_bytes(data)
    assert "two whole marks" in invoke("bundle", "check", path, status=1)
    assert invoke("bundle", "check", "/etc/hostname", status=1).startswith("FAIL")
