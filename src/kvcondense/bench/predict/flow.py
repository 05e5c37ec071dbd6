"""A kernel's blocks, branches and loops, and how often each of its instructions runs in a launch.

Branches are not followed: a block counts as often as the functions of the source that its instructions came from run,
and a loop's body as often as the function that loops says.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvcondense.bench.predict.listing import Instruction, Label, looping

_SHARE = 0.8
"""Of a loop's instructions: what so many have in common says which function loops. The rest was moved there."""
_PRODUCT = "matrix"


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other. follow: numbers of the blocks that may come next; slow: it calls."""

    code: tuple[Instruction, ...]
    follow: tuple[int, ...]

    @property
    def slow(self) -> bool:
        """True where a subroutine is called, which only divisions and roots of unusual numbers do."""
        return any(i.name.startswith("CALL") for i in self.code)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block, all its blocks, and the functions that all its code is in, the kernel first."""

    head: int
    body: frozenset[int]
    chain: tuple[str, ...]
    polls: bool

    @property
    def function(self) -> str:
        """The one that loops."""
        return self.chain[-1] if self.chain else ""


@dataclass(frozen=True)
class Runs:
    """How often code runs. times: of a function, or of "caller>function", how often for each time that its caller runs;
    trips: of the loop in a function, its turns. What is not named runs once. A second call of it is function#2.

    A program of a launch may run a function or not; times is the mean over programs then. Products that the compiler
    takes out of a loop, to run its loads ahead, count as turns of it.
    """

    times: Mapping[str, float] = field(default_factory=dict)
    trips: Mapping[str, float] = field(default_factory=dict)

    def of(self, chain: Sequence[str]) -> float:
        """Runs of code in these functions, loops aside."""
        found = 1.0
        for caller, name in zip(("", *chain), chain, strict=False):
            keys = (f"{plain(caller)}>{plain(name)}", name, plain(name))
            found *= next((self.times[key] for key in keys if key in self.times), 1.0)
        return found

    def turns(self, function: str) -> float:
        """Of the loop in a function."""
        return self.trips.get(function, self.trips.get(plain(function), 1.0))


def whole(number: float) -> int:
    """The least integer that is not smaller, rounding aside: turns of a loop, or what the fullest place has."""
    return math.ceil(number - 1e-9)


def plain(name: str) -> str:
    """A function's name, whichever of its calls it stands for."""
    return name.partition("#")[0]


class Flow:
    """The graph of a listing's blocks from its first instruction on; what only calls reach is not in it."""

    def __init__(self, listing: Iterable[Instruction | Label]) -> None:
        self.blocks = _blocks(list(listing))
        self.order = _order(self.blocks)
        self.loops = _loops(self.blocks, self.order)

    def inside(self, number: int) -> list[Loop]:
        """The loops that a block is in."""
        return [loop for loop in self.loops if number in loop.body]

    def turns(self, loop: Loop, runs: Runs) -> float:
        """Of a loop, each time that it is reached; a loop that polls runs once."""
        if loop.polls:
            return 1.0
        asked = runs.turns(loop.function)
        return max(asked - self._ahead.get(loop.function, 0.0), 0.0) if asked > 1 else asked

    @functools.cached_property
    def _ahead(self) -> dict[str, float]:
        """By function that loops: copies of the loop's products that stand outside."""
        found = {}
        for name in {loop.function for loop in self.loops}:
            loops = [loop for loop in self.loops if loop.function == name]
            within = frozenset[int]().union(*(loop.body for loop in loops))
            inner = outer = 0
            for number in self.order:
                products = sum(i.kind == _PRODUCT and name in i.chain for i in self.blocks[number].code)
                inner, outer = inner + products * (number in within), outer + products * (number not in within)
            found[name] = outer / inner if inner else 0.0
        return found

    def times(self, runs: Runs) -> dict[int, float]:
        """By block, turns of all loops around it; 0 for blocks that call."""
        return {
            number: 0.0
            if self.blocks[number].slow
            else math.prod(self.turns(loop, runs) for loop in self.inside(number))
            for number in self.order
        }

    def count(self, runs: Runs) -> Counts:
        """Instructions of a program (the mean over programs) by kind, and the bytes of a lane that they move."""
        number, moved, operands, flops = Counter[str](), Counter[str](), 0.0, 0.0
        times = self.times(runs)
        for at in self.order:
            for i in self.blocks[at].code:
                often = times[at] * runs.of(i.chain)
                number[i.kind] += often  # type: ignore[assignment]  # a mean need not be whole
                moved[i.kind] += often * i.width  # type: ignore[assignment]
                operands += often * _shared_operands(i)
                flops += often * _flops(i)
        return Counts(dict(number), dict(moved), operands, flops)


@dataclass(frozen=True)
class Counts:
    """instructions: of a warp, by kind; lane_bytes: of a lane, by kind; operands: bytes that products of a warp read
    from shared memory by themselves (sm_90); flops: of a warp's products, where their names say their shapes
    (not those of sm_100).
    """

    instructions: dict[str, float]
    lane_bytes: dict[str, float]
    operands: float = 0.0
    flops: float = 0.0


def _flops(i: Instruction) -> float:
    """Of a warp: a quarter of what its group of four multiplies, or its own."""
    return 2.0 * math.prod(i.shape) / (4 if i.name.startswith("HGMMA") else 1) if i.shape else 0.0


def _shared_operands(i: Instruction) -> float:
    """Bytes of a warp's share: [64, k] and [k, n] of bf16 for each group of four."""
    if not i.name.startswith("HGMMA") or i.shape is None:
        return 0.0
    m, n, k = i.shape
    return 2 * k * (m + n) / 4


def _blocks(listing: Sequence[Instruction | Label]) -> list[Block]:
    targets = {i.target for i in listing if isinstance(i, Instruction) and i.target}
    parts: list[tuple[str, list[Instruction]]] = [("", [])]
    for item in listing:
        if isinstance(item, Label):
            if item.name in targets:
                parts.append((item.name, []))
            continue
        parts[-1][1].append(item)
        if item.target or _ends(item):
            parts.append(("", []))
    places = {name: number for number, (name, _) in enumerate(parts) if name}
    found = []
    for number, (_, code) in enumerate(parts):
        last = code[-1] if code else None
        follow = [number + 1] if number + 1 < len(parts) and not (last and _leaves(last)) else []
        if last and last.target:
            follow.append(places[last.target])
        found.append(Block(tuple(code), tuple(follow)))
    return found


def _ends(i: Instruction) -> bool:
    return i.name.split(".")[0] in ("EXIT", "RET", "BRA", "s_endpgm", "BREAK")


def _leaves(i: Instruction) -> bool:
    """True if the next instruction never follows: a jump under no condition, or the end."""
    base = i.name.split(".")[0]
    if base in ("BRA", "s_branch"):
        return not i.guard and len(i.operands) == 1
    return base in ("EXIT", "RET", "s_endpgm") and not i.guard


def _order(blocks: Sequence[Block]) -> list[int]:
    """Blocks that are reached, each before those that follow it but for turns of loops (reverse postorder)."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].follow))]
    while stack:
        number, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            done.append(number)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].follow)))
    return done[::-1]


def _loops(blocks: Sequence[Block], order: Sequence[int]) -> list[Loop]:
    """Natural loops: an edge to a block that all ways to the edge pass through, and all from which it is reached."""
    before: dict[int, list[int]] = {number: [] for number in order}
    for number in order:
        for following in blocks[number].follow:
            before[following].append(number)
    passed = {number: set(order) for number in order}
    passed[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            now = {number} | set.intersection(*(passed[b] for b in before[number]))
            changed, passed[number] = changed or now != passed[number], now
    bodies: dict[int, set[int]] = {}
    for number in order:
        for head in (f for f in blocks[number].follow if f in passed[number]):
            body, stack = bodies.setdefault(head, {head}), [number]
            while stack:
                at = stack.pop()
                if at not in body:
                    body.add(at)
                    stack += before[at]
    found: list[Loop] = []
    for head, body in sorted(bodies.items(), key=lambda item: len(item[1])):
        found.append(
            _loop(head, frozenset(body), blocks, [loop.chain for loop in found if loop.body <= body and not loop.polls])
        )
    return found


def _loop(head: int, body: frozenset[int], blocks: Sequence[Block], inner: Sequence[tuple[str, ...]]) -> Loop:
    """The loop of the innermost function that has one, and whose loop is not one of the ``inner`` ones."""
    code = [i for number in body for i in blocks[number].code]
    prefixes = Counter(i.chain[: end + 1] for i in code for end in range(len(i.chain)))
    common = [chain for chain, count in prefixes.items() if count >= _SHARE * len(code)]
    polls = any("TRYWAIT" in i.name for i in code) and not any(i.kind == _PRODUCT for i in code)
    deepest = max(common, key=len, default=())
    while len(deepest) > 1 and not polls and (plain(deepest[-1]) not in looping() or deepest in inner):
        deepest = deepest[:-1]
    return Loop(head, body, deepest, polls)
