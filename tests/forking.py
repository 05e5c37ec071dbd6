"""Forks of a process that has used several threads; a program of its own, since pytest's process has threads of others.

    python tests/forking.py BACKEND

Every child does a step that is large enough for several threads, and compares it with its parent's. One that does not
end in a minute is killed, and the program says so and exits with 1.
"""

import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch

from kvcondense import PagedCache, RaggedBatch, StatePool, compress, condense, forks, training
from kvcondense.backends.cpu import native
from kvcondense.backends.cpu import threads as launches
from kvcondense.weights import CompressorWeights
from machine import SPECS, rope, weights

SPEC, TOKENS, SECONDS = SPECS["csa"], 16384, 60
IMPL = sys.argv[1]


class Layer:
    def __init__(self):
        w = weights(SPEC, hidden=256)
        self.weights = CompressorWeights(norm=w.norm, ape=w.ape, w=w.w.bfloat16())
        self.rope = rope(SPEC, TOKENS)
        self.x = torch.randn(TOKENS, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
        self.kv = torch.randn(TOKENS, SPEC.projected, generator=torch.Generator().manual_seed(2))

    def step(self):
        """Digest of what a large step of each kind leaves."""
        found = hashlib.sha256()
        for run, tokens in ((condense, self.kv), (compress, self.x)):
            state, cache = StatePool.ring(SPEC, 1), PagedCache.allocate(16, TOKENS // 4, 1)
            state.data.zero_()
            slots = torch.arange(TOKENS) // 4
            batch = RaggedBatch.build([0, TOKENS], start_positions=[0], state_slots=[0], slot_mapping=slots)
            rows = run(SPEC, tokens, self.weights, self.rope, batch, state=state, cache=cache, impl=IMPL).values
            for t in (cache.data, state.data, rows):
                found.update(t.contiguous().numpy().tobytes())
        found.update(self.gradient().numpy().tobytes())
        return found.digest()

    def gradient(self):
        """Of kv_score, in a training step."""
        kv = self.kv.clone().requires_grad_()
        batch = RaggedBatch.build([0, TOKENS], start_positions=[0])
        training.condense(SPEC, kv, self.weights, self.rope, batch).values.square().sum().backward()
        return kv.grad


def forked(work):
    """Exit status of a child that does ``work``: 0 if it is true; None if the child did not end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def multiprocessed(work):
    child = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(0 if work() else 2))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        return None
    return child.exitcode


def main():
    torch.set_num_threads(2)
    layer = Layer()
    right = layer.step()

    def same():
        return layer.step() == right

    def serial():
        return torch.get_num_threads() == 1 and same()

    def kernels_beside():
        """Compiled kernels find threads where the child asks for them, whatever its parent did."""
        assert forks.came_through()
        torch.set_num_threads(2)
        seen = set()

        def enter(_):
            seen.add(threading.get_native_id())
            time.sleep(0.1)  # Python's own pool hands a job to a thread that is idle

        callback = ctypes.CFUNCTYPE(None, ctypes.c_int64)(enter)
        launches.launch(ctypes.cast(callback, ctypes.c_void_p).value, 1, 2)
        return len(seen) == 2

    def other_thread():
        found = []
        one = threading.Thread(target=lambda: found.append(same()))
        one.start()
        one.join()
        return found == [True]

    def from_a_thread(work):
        found = []
        one = threading.Thread(target=lambda: (layer.step(), found.append(forked(work))))
        one.start()
        one.join()
        return found[0]

    def while_others_step(work):
        stop = threading.Event()
        others = [threading.Thread(target=lambda: [layer.step() for _ in iter(stop.is_set, True)]) for _ in range(2)]
        for other in others:
            other.start()
        try:
            return next((status for status in (forked(work) for _ in range(5)) if status != 0), 0)
        finally:
            stop.set()
            for other in others:
                other.join()

    def while_another_compiles(work):
        """The lock is held, and what it guards is not as it should be, until the compiler is done."""
        inside, addresses = threading.Event(), dict(native._addresses)

        def slow(code, symbol):
            inside.set()
            time.sleep(1)
            return link(code, symbol)

        link, native._link = native._link, slow
        native._addresses.clear()
        other = threading.Thread(target=lambda: native.address("condense"))
        other.start()
        inside.wait()
        try:
            return forked(lambda: native.address("condense") and work())
        finally:
            other.join()
            native._link = link
            native._addresses.update(addresses)

    def without_openmp(work):
        real, launches._openmp = launches._openmp, lambda: None
        try:
            assert layer.step() == right
            return forked(work)
        finally:
            launches._openmp = real

    cases = {
        "os.fork": lambda: forked(serial),
        "multiprocessing": lambda: multiprocessed(serial),
        "a child's child": lambda: forked(lambda: same() and forked(same) == 0),
        "a thread of a child": lambda: forked(other_thread),
        "a fork by another thread": lambda: from_a_thread(same),
        "a fork while others step": lambda: while_others_step(same),
        "a fork while another compiles": lambda: while_another_compiles(same),
        "threads again": lambda: forked(kernels_beside),
        "without OpenMP": lambda: without_openmp(lambda: same() and kernels_beside()),
    }
    wrong = 0
    for name, case in cases.items():
        status = case()
        wrong += status != 0
        sys.stdout.write(f"{name}: {'never ended' if status is None else status}\n")
        sys.stdout.flush()
        assert layer.step() == right, "the parent goes on"
        assert torch.get_num_threads() == 2
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
