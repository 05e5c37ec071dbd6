"""How long a program takes that is alone on its processor: its warps in step, each instruction in its order.

An instruction begins when the one before has been issued by all warps and its operands are there; nothing else is
waited for. Of branches, the slower way is taken among those that run at all; of a loop, six turns are followed, and
the others take as long as the last one.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from kvcondense.bench.predict.flow import Flow, Loop, Runs, whole
from kvcondense.bench.predict.listing import Instruction
from kvcondense.bench.predict.machines import Machine

_FOLLOWED = 6
_NO_RESULT = {"store", "shared_store", "barrier", "other"}
_REGISTER = re.compile(r"(?<![\w.])(-?[|~!]?)(UR|R|UP|P|v|s|a)(?:(\d+)|\[(\d+):(\d+)\])(\.64)?|\b(vcc|exec|scc)\b")
_WIDE = {"64": 2, "128": 4}


@dataclass
class _State:
    """time: cycles; ready: when registers have their values; copies: when those that were asked for so far are there,
    in order; stored: when stores are.
    """

    time: float = 0.0
    ready: dict[str, float] = field(default_factory=dict)
    copies: list[float] = field(default_factory=list)
    open: float = 0.0
    stored: float = 0.0

    def copy(self) -> _State:
        return _State(self.time, dict(self.ready), list(self.copies), self.open, self.stored)

    def later(self, cycles: float) -> _State:
        """Everything by so much."""
        ready = {name: at + cycles for name, at in self.ready.items()}
        copies = [at + cycles for at in self.copies]
        return _State(self.time + cycles, ready, copies, self.open + cycles, self.stored + cycles)


def alone(flow: Flow, runs: Runs, machine: Machine, warps: int, most: int | None = None) -> float:
    """Cycles of a program of so many warps; of a loop at ``most`` so many turns."""
    return _Walk(flow, runs, machine, warps, most).cycles()


class _Walk:
    def __init__(self, flow: Flow, runs: Runs, machine: Machine, warps: int, most: int | None) -> None:
        self.flow, self.runs, self.machine, self.warps, self.most = flow, runs, machine, warps, most
        self.times = flow.times(runs)

    def cycles(self) -> float:
        self.last = 0.0
        self._region(frozenset(self.flow.order), self.flow.order[0], _State(), None)
        return self.last

    def _region(self, blocks: frozenset[int], head: int, state: _State, around: Loop | None) -> dict[int, _State]:
        """States in which blocks are left, by where to; to ``head``, another turn of the loop ``around``."""
        waiting, left = {head: state}, dict[int, _State]()
        for number in self.flow.order:
            if number not in blocks or number not in waiting:
                continue
            inner = [
                loop for loop in self.flow.loops if loop.head == number and loop is not around and loop.body <= blocks
            ]
            if inner:
                outs = self._loop(max(inner, key=lambda loop: len(loop.body)), waiting[number])
            else:
                after = self._block(number, waiting[number].copy())
                outs = dict.fromkeys(self.flow.blocks[number].follow, after)
            for target, out in outs.items():
                place = waiting if target in blocks and target != head else left
                place[target] = _merged(place[target], out) if target in place else out
        return left

    def _loop(self, loop: Loop, state: _State) -> dict[int, _State]:
        turns = whole(self.flow.turns(loop, self.runs))
        turns = turns if self.most is None else min(turns, self.most)
        if turns == 0:
            exits = {f for number in loop.body for f in self.flow.blocks[number].follow if f not in loop.body}
            return dict.fromkeys(exits, state)
        followed = min(turns, _FOLLOWED)
        outs, cycles = dict[int, _State](), 0.0
        for _ in range(followed):
            before = state.time
            outs = self._region(loop.body, loop.head, state, loop)
            state = outs.pop(loop.head, state)
            cycles = state.time - before
        more = (turns - followed) * cycles
        self.last = max(self.last, state.time + more)
        return {target: out.later(more) for target, out in outs.items()}

    def _block(self, number: int, state: _State) -> _State:
        if self.times[number] == 0:
            return state
        for i in self.flow.blocks[number].code:
            if self.runs.of(i.chain) > 0:
                self._step(i, state)
        self.last = max(self.last, state.time)
        return state

    def _step(self, i: Instruction, state: _State) -> None:
        results, operands = registers(i)
        start = max([state.time, *(state.ready[name] for name in operands if name in state.ready)])
        start = max(start, _waited(i, state))
        state.time = start + max(self.machine.issue, self.warps * self.machine.cycles(i.kind, i.width))
        latency = self.machine.latency(i.kind, i.width)
        there = start + latency
        if i.kind == "load":
            if i.name.startswith("LDGSTS"):
                state.open = max(state.open, there)
            elif not i.name.startswith(("LDG", "LD")):
                state.copies.append(there)
        elif i.name == "LDGDEPBAR":
            state.copies.append(state.open)
        elif i.kind == "store":
            state.stored = max(state.stored, there)
        elif i.kind == "barrier":
            state.time += latency
        for name in results:
            state.ready[name] = max(there, state.time)


def _waited(i: Instruction, state: _State) -> float:
    """When what an instruction waits for by name is there: all copies but the latest few, or stores."""
    if i.name.startswith("MEMBAR") and "CTA" not in i.name:
        return state.stored
    few = None
    if i.name.startswith("DEPBAR"):
        found = re.search(r"SB0, 0x(\w+)", ", ".join(i.operands))
        few = int(found[1], 16) if found else None
    elif i.name == "s_waitcnt":
        found = re.search(r"vmcnt\((\d+)\)", " ".join(i.operands))
        few = int(found[1]) if found else None
    if few is None:
        return 0.0
    done = max(state.copies[: len(state.copies) - few], default=0.0)
    return max(done, state.stored) if i.name == "s_waitcnt" and few == 0 else done


def _merged(a: _State, b: _State) -> _State:
    ready = {name: max(a.ready.get(name, 0.0), b.ready.get(name, 0.0)) for name in {**a.ready, **b.ready}}
    late, other = (a, b) if a.time >= b.time else (b, a)
    copies = late.copies if len(late.copies) >= len(other.copies) else other.copies
    return _State(late.time, ready, list(copies), max(a.open, b.open), max(a.stored, b.stored))


@functools.lru_cache(maxsize=1 << 16)
def registers(i: Instruction) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Registers that an instruction writes and reads; a condition that it runs under is read."""
    operands = list(i.operands)
    results: list[str] = []
    if (i.kind not in _NO_RESULT or i.name.startswith(("LDC", "S2R", "LDTM"))) and not _tells_nothing(i):
        results = [operands.pop(0)] if operands else []
        while operands and results and re.fullmatch(r"U?P[\dT]+|vcc", operands[0]):
            results.append(operands.pop(0))
        if i.name.startswith(("SHFL", "ATOM", "VOTE")) and operands and results[0].startswith("P"):
            results.append(operands.pop(0))
    wide = re.search(r"\.(64|128)\b", i.name)
    count = max(_WIDE[wide[1]] if wide else 2 if "WIDE" in i.name or i.name == "CS2R" else 1, _product_size(i))
    written = [name for text in results for name in _names(text, count if text.startswith(("R", "UR")) else 1)]
    data = i.kind.endswith("store")  # an address has the width that it is written with
    read = [name for text in operands for name in _names(text, count if data and "[" not in text else 1)]
    return tuple(written), (*read, *_names(i.guard, 1), *_condition(i))


def _tells_nothing(i: Instruction) -> bool:
    """Of loads to shared memory and of atomics that nobody asked for the old value: all operands are read."""
    amd = i.kind == "atomic" and i.name[0].islower()
    silent = amd and not re.search(r"\b(sc0|glc)\b", " ".join(i.operands))
    return silent or re.match(r"LDGSTS|REDG?(\.|$)", i.name) is not None


def _product_size(i: Instruction) -> int:
    """32-bit registers of a lane that a product's result takes, where its name says it (GCN names all registers)."""
    return i.shape[0] * i.shape[1] // (128 if i.name.startswith("HGMMA") else 32) if i.shape else 1


def _condition(i: Instruction) -> list[str]:
    """Of GCN: what a branch looks at, which its name says."""
    return [word for word in ("vcc", "scc", "exec") if i.name.startswith(f"s_cbranch_{word}")]


def _names(text: str, count: int) -> list[str]:
    found = []
    for _, file, one, first, last, pair, word in _REGISTER.findall(text):
        if word:
            found.append(word)
            continue
        begin = int(one or first)
        end = int(last) if last else begin + max(count if file in ("R", "UR") else 1, 2 if pair else 1) - 1
        found += [f"{file}{n}" for n in range(begin, end + 1)]
    return found
