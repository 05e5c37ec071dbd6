"""Machine code is loaded from nobody's files but one's own: owners, modes, links, names, full disks, no home."""

import errno
import os
from pathlib import Path

import pytest

from kvcondense.backends import private
from kvcondense.backends.cpu import kept
from kvcondense.files.whole import locked

CODE = b"machine code" * 9


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place of one's own, asked for anew."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    private.place.cache_clear()
    yield tmp_path / "cache" / "kvcondense"
    private.place.cache_clear()


def test_code_comes_back_from_a_folder_of_ones_own(folder, capsys):
    assert kept.read("a.o") is None
    assert kept.write("a.o", CODE) == folder
    assert kept.read("a.o") == CODE
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "a.o").stat().st_mode & 0o077 == 0
    assert [p.name for p in folder.iterdir()] == ["a.o"]
    assert capsys.readouterr().err == ""


def others_may_write(folder):
    folder.chmod(0o777)
    return "others may write to"


def a_folder_above_is_open(folder):
    folder.parent.chmod(0o777)
    return "others may write to"


def somebody_elses(folder):
    os.chown(folder, 4321, 4321)
    return "belongs to another user"


@pytest.mark.parametrize("spoil", [others_may_write, a_folder_above_is_open, somebody_elses])
def test_a_folder_that_others_can_fill_is_not_used(spoil, folder, capsys):
    if spoil is somebody_elses and os.getuid() != 0:
        pytest.skip("only root gives folders away")
    assert kept.write("a.o", CODE) == folder
    reason = spoil(folder)
    private.place.cache_clear()
    assert kept.read("a.o") is None
    assert kept.write("b.o", CODE) is None
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1, "said once"
    assert [p.name for p in folder.iterdir()] == ["a.o"]


def test_in_a_folder_like_tmp_nobody_replaces_what_is_mine(folder):
    folder.parent.mkdir()
    folder.parent.chmod(0o1777)
    assert kept.write("a.o", CODE) == folder


def test_a_folder_that_others_may_read_is_closed_to_them(folder):
    folder.mkdir(parents=True, mode=0o755)
    folder.chmod(0o755)
    assert kept.write("a.o", CODE) == folder
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_the_dead_left_goes_and_what_the_living_write_stays(folder):
    kept.write("a.o", CODE)
    (folder / ".99-0.part").write_bytes(b"half of it")
    living = locked(folder / ".98-0.part", os.O_CREAT)
    kept.write("b.o", CODE)
    assert sorted(p.name for p in folder.iterdir()) == [".98-0.part", "a.o", "b.o"]
    os.close(living)


def open_to_others(path):
    path.chmod(0o622)


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def of_another_name(path):
    path.write_bytes(path.with_name("other.o").read_bytes())


def damaged(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("spoil", [open_to_others, linked, of_another_name, damaged, cut, a_folder, a_pipe])
def test_a_file_that_is_not_what_was_written_is_not_loaded(spoil, folder):
    kept.write("other.o", CODE + b"x")
    kept.write("a.o", CODE)
    spoil(folder / "a.o")
    assert kept.read("a.o") is None
    if spoil is not a_folder:
        assert kept.write("a.o", CODE) == folder, "it is replaced"
        assert kept.read("a.o") == CODE


def test_every_flipped_byte_is_noticed(folder):
    kept.write("a.o", CODE[:24])
    data = (folder / "a.o").read_bytes()
    for at in range(len(data)):
        (folder / "a.o").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert kept.read("a.o") is None, at


def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch, capsys):
    private.place()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert kept.write("a.o", CODE) is None
    assert list(folder.iterdir()) == []
    assert "No space left" in capsys.readouterr().err


def test_without_a_home_code_stays_in_memory(monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    private.place.cache_clear()
    assert kept.read("a.o") is None
    assert kept.write("a.o", CODE) is None
    assert capsys.readouterr().err.count("no home folder") == 1
    private.place.cache_clear()
