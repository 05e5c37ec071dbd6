"""Files that take the place of others: whole or not at all, one writer at a time, nothing left, kill -9 included."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from kvcondense.errors import CheckpointError
from kvcondense.files import replacing, sealed, whole, why_not_written, write

ENDLESS = """
import sys
from kvcondense.files import replacing
number = 0
while True:
    with replacing(sys.argv[1]) as made:
        made.write_text(str(number) * 20000)
    number = (number + 1) % 10
    print(number, flush=True)
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["cache.safetensors", "cache", ".cache", "a.b"])
def test_the_second_writer_is_told_and_the_first_goes_on(name, tmp_path):
    target = tmp_path / name
    target.write_text("old")
    with replacing(target) as made:
        made.write_text("new")
        for other in (target, tmp_path / "elsewhere" / ".." / target.name):
            (tmp_path / "elsewhere").mkdir(exist_ok=True)
            with pytest.raises(CheckpointError, match="a file that nobody else writes"), replacing(other):
                pytest.fail("a second writer got in")
        told = []

        def thread():
            try:
                write(target, "third")
            except CheckpointError as error:
                told.append(str(error))

        one = threading.Thread(target=thread)
        one.start()
        one.join()
        assert "being written" in told[0]
        assert why_not_written(target) is None
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    (tmp_path / "elsewhere").rmdir()
    assert names(tmp_path) == [name]


def test_files_whose_names_begin_alike_are_not_in_each_others_way(tmp_path):
    with replacing(tmp_path / "a.b.json") as one, replacing(tmp_path / "a.json") as other:
        one.write_text("1")
        other.write_text("2")
        write(tmp_path / "a.txt", "3")
        write(tmp_path / "a.12.json", "4")
    assert names(tmp_path) == ["a.12.json", "a.b.json", "a.json", "a.txt"]


def test_what_a_dead_process_left_goes_with_the_next_file(tmp_path):
    for name in (".a.99-0.part.json", ".a.4194303.part.json"):
        (tmp_path / name).write_text("half of it")
    (tmp_path / ".a.b.99-0.part.json").write_text("another file's")
    (tmp_path / ".a.99-0.part").write_text("of a file without a suffix")
    write(tmp_path / "a.json", "whole")
    write(tmp_path / "a", "whole")
    (tmp_path / "a").unlink()
    assert names(tmp_path) == [".a.b.99-0.part.json", "a.json"]


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    target, old = tmp_path / "a.txt", "x"
    target.write_text(old)
    for delay in (0.0, 0.003, 0.01, 0.02, 0.05):
        with subprocess.Popen([sys.executable, "-c", ENDLESS, str(target)], stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
        text = target.read_text()
        assert len(text) == 20000
        assert len(set(text)) == 1
        write(target, text)  # and the next writer is not in its way
        assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["replace", "fsync", "copymode"])
def test_a_full_disk_keeps_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "copymode":
        monkeypatch.setattr("kvcondense.files.whole.shutil.copymode", full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(target, "new")
    assert caught.value.filename == str(target)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(whole.fcntl is None, reason="locks of POSIX")
def test_a_sealed_file_is_the_locked_one_until_it_takes_its_place(tmp_path, monkeypatch):
    """safetensors.save_file puts a file of its own there, which nobody has locked, and a killed process leaves."""
    seen, replace = [], os.replace

    def watched(made, target):
        seen.append((whole.locked(made), names(tmp_path)))
        replace(made, target)

    monkeypatch.setattr(os, "replace", watched)
    sealed.save(tmp_path / "out", {"kind": "test"}, {"x": torch.arange(4)})
    ((lock, inside),) = seen
    assert lock is None
    assert len(inside) == 1
    assert names(tmp_path) == ["out"]
