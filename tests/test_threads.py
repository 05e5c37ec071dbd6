"""Several threads at once: one pool and one cache, slots and rows apart, and the bits of one thread in turn."""

import itertools
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from kvcondense import OnlineState, PagedCache, RaggedBatch, StatePool, compress, condense
from kvcondense.backends.cpu import kept, native, threads
from kvcondense.backends.pypto import worker
from kvcondense.bound import bind
from kvcondense.errors import UnsupportedError
from kvcondense.formats import FORMATS
from kvcondense.weights import CompressorWeights
from machine import SPECS, rope, weights

THREADS, PAGE = 4, 16
STEPS = (300, 1, 3, 2048, 1, 7, 64, 2)
"""Tokens of a thread's steps: with eight candidates of 16 channels a window, 2048 of them are work for several."""
SHORT = (40, 1, 3, 9)


@pytest.fixture(autouse=True)
def _eager():
    """Threads change places at every turn."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*jobs):
    """Run jobs in a thread each, from one moment on; raises what one of them raises."""
    start, errors = threading.Barrier(len(jobs)), []

    def run(job):
        try:
            start.wait()
            job()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(300)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


class Shared:
    """One layer for all threads: weights, table, pool, cache; request t has slot t and every THREADS-th cache row."""

    def __init__(self, spec, kind="ring", impl="cpu", format="bf16", steps=STEPS, threads=THREADS):
        self.spec, self.impl, self.steps, self.threads = spec, impl, steps, threads
        total = sum(steps)
        w = weights(spec, hidden=32)
        self.weights = CompressorWeights(norm=w.norm, ape=w.ape, w=w.w.bfloat16())
        self.rope, self.pages = rope(spec, total), -(-total // 8)
        self.state = {
            "ring": lambda: StatePool.ring(spec, threads),
            "paged": lambda: StatePool.paged(spec, threads * self.pages, 8),
            "online": lambda: OnlineState.allocate(spec, threads),
        }[kind]()
        for t in self.state.tensors.values():
            t.zero_()
        self.kind = kind
        rows = threads * (total // spec.ratio)
        scale = 0.5 if FORMATS[format].tensor_scale else None
        self.cache = PagedCache.allocate(spec.head_dim, -(-rows // PAGE), PAGE, format=format, tensor_scale=scale)
        self.x = [torch.randn(total, 32, generator=torch.Generator().manual_seed(t)).bfloat16() for t in range(threads)]
        self.kv = [
            torch.randn(total, spec.projected, generator=torch.Generator().manual_seed(9 + t)) for t in range(threads)
        ]

    def batch(self, t, start, count):
        """The step of request t; cache row of window w: every THREADS-th, so that threads share all pages."""
        slots = torch.arange(start, start + count) // self.spec.ratio * self.threads + t
        state = {"state_slots": [t]}
        if self.kind == "paged":
            state = {"state_block_table": (torch.arange(self.pages) * self.threads + t)[None]}
        return RaggedBatch.build([0, count], start_positions=[start], slot_mapping=slots, **state)

    def condense(self, t, start, count):
        return condense(
            self.spec, self.kv[t][start : start + count], self.weights, self.rope, self.batch(t, start, count),
            state=self.state, cache=self.cache, impl=self.impl,
        )  # fmt: skip

    def compress(self, t, start, count):
        return compress(
            self.spec, self.x[t][start : start + count], self.weights, self.rope, self.batch(t, start, count),
            state=self.state, cache=self.cache, impl=self.impl,
        )  # fmt: skip

    def bound(self, t, start, count):
        """A step of one bound compressor for all."""
        made = self.__dict__.setdefault("one", None) or bind(
            self.spec, self.weights, self.rope, state=self.state, cache=self.cache, impl=self.impl
        )
        self.one = made
        return made.condense(self.kv[t][start : start + count], made.plan(self.batch(t, start, count)))

    def job(self, t, door):
        """All steps of request t; its rows."""

        def run():
            for start, count in zip(itertools.accumulate(self.steps, initial=0), self.steps, strict=False):
                self.rows[t].append(getattr(self, door)(t, start, count).values)

        return run

    def play(self, door, side_by_side):
        self.rows = [[] for _ in range(self.threads)]
        jobs = [self.job(t, door) for t in range(self.threads)]
        if side_by_side:
            together(*jobs)
        else:
            for job in jobs:
                job()
        held = [*self.state.tensors.values(), *self.cache.tensors.values(), *map(torch.cat, self.rows)]
        tags = getattr(self.state, "tags", None)
        return [*held, *([] if tags is None else [tags])]


def check(door, **of):
    alone, beside = (Shared(**of).play(door, side_by_side) for side_by_side in (False, True))
    for one, other in zip(alone, beside, strict=True):
        bits = (t.reshape(-1).contiguous().view(torch.uint8) for t in (one, other))
        assert torch.equal(*bits)


@pytest.mark.parametrize("door", ["condense", "compress", "bound"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_threads_with_slots_of_their_own_have_the_bits_of_one(impl, door):
    for _ in range(3):
        check(door, spec=SPECS["csa"], impl=impl)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "kind"), [("csa", "paged"), ("r8", "online"), ("r8", "paged")])
def test_every_kind_of_state(impl, name, kind):
    check("condense", spec=SPECS[name], kind=kind, impl=impl)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_of_one_page_are_written_by_several(format):
    """Bytes of neighbouring rows, of scales, of tiles and of second buffers are nobody else's."""
    d = FORMATS[format].head_dim or 128
    spec = replace(SPECS["csa"], head_dim=d, rope_dim=64 if d == 512 else 8)
    for impl in ("cpu", "reference"):
        try:
            check("condense", spec=spec, impl=impl, format=format, steps=SHORT)
        except UnsupportedError:
            assert impl == "cpu"


def test_kernels_under_the_interpreter_take_turns():
    check("condense", spec=SPECS["csa"], impl="triton", steps=(11, 1, 6), threads=2)


def test_layers_in_threads_share_a_plan():
    spec, steps = SPECS["csa"], (2048,)
    layers = [Shared(spec, steps=steps, threads=1) for _ in range(2 * THREADS)]
    plan = bind(spec, layers[0].weights, layers[0].rope, state=layers[0].state, cache=layers[0].cache).plan(
        layers[0].batch(0, 0, 2048)
    )

    def step(layer):
        one = bind(spec, layer.weights, layer.rope, state=layer.state, cache=layer.cache, impl="cpu")
        one.condense(layer.kv[0], plan)

    step(layers[0])
    together(*(lambda layer=layer: step(layer) for layer in layers[1:]))
    assert all(torch.equal(layer.cache.data, layers[0].cache.data) for layer in layers)
    assert all(torch.equal(layer.state.data, layers[0].state.data) for layer in layers)


def test_of_threads_that_want_one_kernel_one_compiles(monkeypatch):
    compiled = []

    def compile_(kernel):
        time.sleep(0.05)
        compiled.append(kernel)
        return b"code"

    monkeypatch.setattr(native, "_addresses", {})
    monkeypatch.setattr(native, "_compile", compile_)
    monkeypatch.setattr(native, "_link", lambda code, symbol: 7)
    monkeypatch.setattr(kept, "read", lambda name: None)
    found = []
    together(*[lambda: found.append(native.address("marks"))] * 6)
    assert found == [7] * 6
    assert compiled == ["marks"]


def test_operators_that_are_bound_at_once_are_told_apart(monkeypatch):
    from kvcondense import ops

    class Slow(dict):
        def __len__(self):
            size = super().__len__()
            time.sleep(0.01)
            return size

    monkeypatch.setattr(ops, "_keys", Slow())
    found = []

    def make(spec):
        found.append((spec, ops.bind(spec, weights(spec), rope(spec, 64)).key))

    together(*(lambda spec=spec: make(spec) for spec in SPECS.values()))
    assert len({key for _, key in found}) == len(SPECS)
    assert all(ops._statics[key].spec == spec for spec, key in found)


def test_a_plan_remembers_the_least_sizes_of_all_threads():
    shared = Shared(SPECS["csa"], steps=(64,), threads=1)
    plan = bind(SPECS["csa"], shared.weights, shared.rope, state=shared.state, cache=shared.cache).plan(
        shared.batch(0, 0, 64)
    )
    together(*(lambda n=n: plan.admitted_to(n, 1000 - n, None) for n in range(100, 164)))
    assert len(plan._admitted) == 64
    with pytest.raises(Exception, match="at most 100"):
        plan.check_admitted(replace(plan.extremes, tokens=101))
    with pytest.raises(Exception, match="at most 837"):
        plan.check_admitted(replace(plan.extremes, positions=838))


def test_python_threads_have_ended_when_a_launch_is_interrupted(monkeypatch):
    """Without OpenMP: what they write to is the caller's, and goes with it."""
    ended = []

    def slow(block):
        time.sleep(0.2)
        ended.append(block)

    def first(block):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        slow(block)

    monkeypatch.setattr(threads, "_openmp", lambda: None)
    monkeypatch.setattr(threads, "entry", lambda address: first)
    with pytest.raises(KeyboardInterrupt):
        threads.launch(0, 5, 3)
    assert ended == [5, 5]


def test_answers_of_a_simulator_go_to_the_thread_that_asked(monkeypatch):
    """And after one that did not wait for its answer, nobody takes it for another's."""
    simulator = worker._Simulator()

    class Pipe:
        """A process that answers with what it was sent."""

        def __init__(self):
            self.waiting = []

        def send(self, what):
            self.waiting.append(what[2])

        def poll(self, _):
            time.sleep(0.001)
            return True

        def recv(self):
            return self.waiting.pop(0)

        def close(self):
            self.waiting.clear()

    def start():
        simulator.pipe, simulator.calls = Pipe(), 0
        simulator.process = type("P", (), {"is_alive": lambda _: True, "kill": int, "join": int})()
        simulator.process.kill = simulator.process.join = lambda: None

    monkeypatch.setattr(simulator, "_start", start)
    monkeypatch.setattr(worker, "asdict", lambda form: form)

    def ask(n):
        for i in range(20):
            sent = torch.tensor([n, i])
            assert torch.equal(simulator.run(None, [sent])[0], sent)

    together(*(lambda n=n: ask(n) for n in range(5)))
    with monkeypatch.context() as patch:
        patch.setattr(Pipe, "poll", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            simulator.run(None, [torch.tensor([1])])
    ask(7)


def test_a_fence_stays_until_the_last_thread_is_out(monkeypatch):
    """Threads that launch at once, in any order of leaving: the knob is ours meanwhile, and then what it was."""
    from triton import knobs

    from kvcondense.backends.triton import fences

    monkeypatch.setattr(fences, "omitted", lambda: True)
    before = knobs.runtime.add_stages_inspection_hook
    one, other = fences.proxy_fence(), fences.proxy_fence()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert knobs.runtime.add_stages_inspection_hook is fences._hook
    other.__exit__(None, None, None)
    assert knobs.runtime.add_stages_inspection_hook is before
