"""Programs of Triton launches that run side by side under its interpreter, with a memory that is as weak as a GPU's.

Programs are greenlets that take turns at their loads, stores and atomics, as a seed decides. A store waits in its
program's buffer and reaches memory in pieces and out of order, unless an atomic that releases comes before; a load may
find its cache line in the program's first cache, as it once was, unless it goes past that cache (.cg, volatile) or an
atomic that acquires has come between. Atomics act on memory itself. What the model leaves out: loads that run ahead of
earlier ones, threads of one program, and first caches that programs share.
"""

import ctypes
import inspect
import random
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from greenlet import greenlet
from triton.runtime import interpreter

LINE = 128
_MOST_TURNS = 200_000


class HangError(Exception):
    """Programs that wait for one another without end."""


class _Program:
    """One program: its greenlet, its number in its grid, stores that are under way, lines that it has cached."""

    def __init__(self, run, number, programs):
        self.greenlet, self.number, self.programs = greenlet(run), number, programs
        self.stores, self.lines = [], {}

    def forwarded(self, pointers, values):
        """``values`` at ``pointers``, with what this program itself has stored there and nobody else sees yet."""
        for where, what in self.stores:
            mine = np.isin(pointers, where)
            if mine.any():
                order = np.argsort(where)
                values[mine] = what[order[np.searchsorted(where[order], pointers[mine])]]
        return values


class Model:
    """Runs what is launched within ``side_by_side``; another seed is another order of everything."""

    def __init__(self, seed, switch=0.3, drain=0.15):
        self.random, self.switch, self.drain_chance = random.Random(seed), switch, drain
        self.programs, self.current, self.turns = [], None, 0

    # What programs do -----------------------------------------------------------------------------------------------

    def load(self, pointers, mask, other, dtype, past_cache):
        self._turn(eager=past_cache and pointers.size == 1)  # whoever polls lets others go on
        values = interpreter._interpreter.load(pointers, mask, other, dtype)
        program = self.current
        if program is None:
            return values
        flat, live = values.reshape(-1), mask.reshape(-1)
        where = pointers.reshape(-1)[live]
        got = flat[live]
        if not past_cache:
            got = self._cached(program, where, got)
        flat[live] = program.forwarded(where, got)
        return flat.reshape(values.shape)

    def store(self, pointers, values, mask):
        self._turn()
        where = pointers.reshape(-1)[mask.reshape(-1)]
        what = np.broadcast_to(values, pointers.shape).reshape(-1)[mask.reshape(-1)].copy()
        if self.current is None:
            _write(where, what)
        elif where.size:
            pieces = self.random.randint(1, min(4, where.size))
            for part in np.array_split(self._shuffled(where.size), pieces):
                self.current.stores.append((where[part], what[part]))

    def atomic(self, run, sem):
        self._turn()
        if self.current is not None and sem in ("RELEASE", "ACQUIRE_RELEASE"):
            self._drain(self.current)
        value = run()
        if self.current is not None and sem in ("ACQUIRE", "ACQUIRE_RELEASE"):
            self.current.lines.clear()
        return value

    # What memory does -----------------------------------------------------------------------------------------------

    def _cached(self, program, where, got):
        got = got.copy()
        size = got.dtype.itemsize
        for line in np.unique(where // LINE):
            held = program.lines.get(int(line))
            if held is None:
                held = program.lines[int(line)] = ctypes.string_at(int(line) * LINE, LINE)
            inside = where // LINE == line
            at = (where[inside] % LINE).astype(np.int64)
            bytes_ = np.frombuffer(held, np.uint8)[at[:, None] + np.arange(size)]
            got[inside] = np.ascontiguousarray(bytes_).view(got.dtype)[:, 0]
        return got

    def _drain_one(self, program):
        """One of its stores, and those before it to the same places, reach memory."""
        index = self.random.randrange(len(program.stores))
        where, _ = program.stores[index]
        first = [s for s in program.stores[:index] if np.isin(s[0], where).any()]
        for entry in [*first, program.stores[index]]:
            _write(*entry)
        gone = {id(e) for e in (*first, program.stores[index])}
        program.stores = [s for s in program.stores if id(s) not in gone]

    def _drain(self, program):
        while program.stores:
            self._drain_one(program)

    def _turn(self, eager=False):
        """Stores reach memory, lines leave caches, and somebody else goes on: now and then."""
        if self.current is None:
            return
        self.turns += 1
        if self.turns > _MOST_TURNS:
            raise HangError(f"{sum(not p.greenlet.dead for p in self.programs)} programs still run")
        for program in self.programs:
            if program.stores and self.random.random() < self.drain_chance:
                self._drain_one(program)
            if program.lines and self.random.random() < 0.02:
                program.lines.popitem()
        if eager or self.random.random() < self.switch:
            self._resume_any()

    # Who runs -------------------------------------------------------------------------------------------------------

    def add(self, run, programs):
        self.programs += [_Program(run, number, programs) for number in range(programs)]

    def _resume_any(self):
        """From a program: back to the loop of ``run``, which chooses; comes back when this one is chosen again."""
        self.loop.switch()

    def run(self):
        """All programs to their ends; what they stored is in memory afterwards."""
        self.loop = greenlet.getcurrent()
        alive = list(self.programs)
        try:
            while alive:
                program = self.random.choice(alive)
                self.current = program
                interpreter.interpreter_builder.set_grid_dim(program.programs, 1, 1)
                interpreter.interpreter_builder.set_grid_idx(program.number, 0, 0)
                program.greenlet.switch()
                alive = [p for p in alive if not p.greenlet.dead]
            for program in self.programs:
                self._drain(program)
        finally:
            self.current, self.programs = None, []

    def _shuffled(self, size):
        order = list(range(size))
        self.random.shuffle(order)
        return np.array(order)


def _write(where, what):
    interpreter._interpreter.store(where, np.ascontiguousarray(what), np.ones(where.shape, bool))


@contextmanager
def side_by_side(model, monkeypatch, *, together=False):
    """Launches within run in the model: each by itself, or, ``together``, all at once at the end."""
    builder = interpreter.InterpreterBuilder

    def load(self, pointers, mask, other, *policy):
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        filler = np.zeros(pointers.data.shape, dtype) if other is None else other.data
        past = bool(policy[-1]) or "cg" in str(policy[0]).lower()
        got = model.load(pointers.data, mask.data, filler, dtype, past)
        return interpreter.TensorHandle(got, pointers.get_element_ty())

    def store(self, pointers, value, mask, *policy):
        model.store(pointers.data, value.data, mask.data)

    real, real_scope, patched = builder.create_atomic_rmw, interpreter._patch_lang, set()
    held = []

    def patch_once(function):
        """Triton's language becomes the interpreter's, for all: programs would not undo it in order."""
        modules = frozenset(m.__name__ for m in function.__globals__.values() if m is tl or m is tl.core)
        if modules not in patched:
            patched.add(modules)
            scopes.callback(real_scope(function).restore)
        return SimpleNamespace(restore=lambda: None)

    def atomic(self, op, pointer, value, mask, sem, scope):
        return model.atomic(lambda: real(self, op, pointer, value, mask, sem, scope), sem.name)

    def call(executor, *args, **kwargs):
        names = inspect.getfullargspec(executor.fn)
        kwargs = {k: v for k, v in kwargs.items() if k in names.args or k in names.kwonlyargs}
        patch_once(executor.fn)
        given = inspect.getcallargs(executor.fn, *args, **kwargs)
        given = {k: v if k in executor.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
        held.append(args)  # what a launch reads outlives it on a GPU, too: memory comes back in the stream's order
        model.add(lambda: executor.fn(**given), executor.grid[0])
        if not together:
            model.run()

    with monkeypatch.context() as patch, ExitStack() as scopes:
        # Triton 3.9's interpreter forgets which caches a load is for.
        patch.setattr(builder, "get_cache_policy", lambda _, modifier, eviction: modifier, raising=False)
        patch.setattr(builder, "create_masked_load", load)
        patch.setattr(builder, "create_masked_store", store)
        patch.setattr(builder, "create_atomic_rmw", atomic)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        yield
        if together:
            model.run()
