"""Runs a script's ``start`` in as many processes as there are ranks, which meet over gloo; returns what each said.

A process for each script imports torch and the script once, and forks the ranks: python over_ranks.py SCRIPT.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
LIMIT_S = 150


def play(script, ranks, tmp_path, *words):
    """(output, exit status) by rank of SCRIPT.start(RANK, RANKS, FILE, *WORDS)."""
    tmp_path.mkdir(exist_ok=True)
    server = forks(script)
    server.stdin.write(json.dumps([ranks, str(tmp_path), words]) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    return [((tmp_path / f"{rank}.txt").read_text(errors="replace"), code) for rank, code in enumerate(codes)]


@functools.cache
def forks(script):
    """The process that forks a script's ranks; it ends with the tests, when its standard input does."""
    line = [sys.executable, __file__, script]
    return subprocess.Popen(line, env=ENVIRONMENT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def serve(script):
    """Answer each line, [RANKS, FOLDER, WORDS], with exit statuses by rank; what ranks print is in FOLDER/RANK.txt."""
    module = importlib.import_module(script.removesuffix(".py"))
    for line in sys.stdin:
        ranks, folder, words = json.loads(line)
        pids = [fork(module.start, Path(folder), rank, ranks, words) for rank in range(ranks)]
        sys.stdout.write(json.dumps(ended(pids)) + "\n")
        sys.stdout.flush()


def fork(start, folder, rank, ranks, words):
    """The process id of a rank."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        said = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        start(rank, ranks, folder / "store", *words)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pids):
    """Exit statuses; a rank that is late is killed, and its status is that of the signal."""
    codes, limit = {}, time.monotonic() + LIMIT_S
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > limit:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve(sys.argv[1])
