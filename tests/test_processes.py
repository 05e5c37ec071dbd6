"""Processes: children that are forked after use, and several that compile the first kernel at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcondense.backends import private
from kvcondense.backends.cpu import kept, native
from kvcondense.backends.pypto import worker

HERE = Path(__file__).parent
FIRST = """
import sys
from kvcondense.backends.cpu import native
native.address("marks")
print("numba" in sys.modules)
"""


def started(*words, **variables):
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(process, seconds):
    try:
        said, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f"did not end in {seconds} s")
    assert process.returncode == 0, said + complaints
    return said, complaints


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_forked_child_works_and_ends(impl):
    """tests/forking.py: by os.fork and multiprocessing, from threads, while others step or compile, without OpenMP."""
    said, _ = ended(started(str(HERE / "forking.py"), impl), 400)
    assert said.count(": 0\n") == 9


def test_processes_that_find_no_kernel_both_compile_it(tmp_path, monkeypatch):
    variables = {"NUMBA_CACHE_DIR": str(tmp_path)}
    for said, complaints in [ended(p, 200) for p in [started("-c", FIRST, **variables) for _ in range(2)]]:
        assert said == "True\n"
        assert complaints.count("compiling the CPU kernel 'marks'") == 1
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    private.place.cache_clear()
    try:
        folder, name = private.place(), native._name("marks")
        assert [p.name for p in folder.iterdir()] == [name], "no part of a file is left behind"
        assert kept.read(name) is not None, "whole, and of this name"
    finally:
        private.place.cache_clear()
    assert ended(started("-c", FIRST, **variables), 60) == ("False\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_child_leaves_its_parents_simulator_alone():
    simulator = worker._simulator
    assert simulator.process is None
    simulator.process, simulator.pipe = sentinel = (object(), object())
    simulator.lock.acquire()  # as by another thread
    try:
        child = os.fork()
        if child == 0:
            fresh = simulator.process is None and simulator.pipe is None and simulator.lock.acquire(timeout=1)
            os._exit(0 if fresh else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (simulator.process, simulator.pipe) == sentinel
    finally:
        simulator.process = simulator.pipe = None
        simulator.lock.release()
