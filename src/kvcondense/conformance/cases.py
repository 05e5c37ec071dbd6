"""Cases: small serving histories as plain data. They can be generated, shrunk, written to a file and replayed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kvcondense.conformance.compressors import Compressor, compressor
from kvcondense.errors import CheckpointError, KvCondenseError
from kvcondense.files.reading import parsed
from kvcondense.files.schema import known, typed

JUNK = {"": None, "nan": float("nan"), "inf": float("inf"), "1e4": 1e4}
_MAX_INT = 1 << 21
_MAX_BYTES = 1 << 28
"""Of tokens, of states, and of block tables."""
_ENTRY = 8
"""Bytes of an entry of a block table."""


@dataclass(frozen=True)
class Op:
    """One thing that happens.

    ``step``: counts[q] tokens of every request, the last ``drafts`` of which may be rejected. All but ``accepted`` of
    them are ``junk`` (if given) and are rejected, so that only the rest is committed; ``padding`` spare tokens follow;
    requests stand in ``order`` in the batch. ``inert``: tokens of NaN of one more request, whose state slot is -1.
    ``unmapped``: rows are mapped token by token, and the first window that each request completes has cache slot -1.
    ``recycle`` (the slot starts over, reset first if ``junk`` is given),
    ``move`` (exported and loaded into another slot) and ``fork`` (into request ``to``, which starts as a copy) concern
    request ``q``.
    """

    kind: str
    counts: tuple[int, ...] = ()
    drafts: int = 0
    junk: str = ""
    accepted: int = 0
    padding: int = 0
    order: tuple[int, ...] = ()
    inert: int = 0
    unmapped: bool = False
    q: int = 0
    to: int = 0


@dataclass(frozen=True)
class Case:
    """Requests of one compressor and what happens to them, in order.

    spec: the compressor, a line as ``compressors.compressor`` reads it. first: position of their first token (a window
    boundary). scale: of kv and scores. far: their cache pages lie beyond element 2^31, the last page among them.
    pattern: tokens and weights of ``patterns``, so that the bytes of first rows are certain.
    """

    spec: str
    requests: int
    ops: tuple[Op, ...]
    seed: int = 0
    scale: float = 1.0
    first: int = 0
    far: bool = False
    pattern: bool = False

    @property
    def compressor(self) -> Compressor:
        """What ``spec`` says."""
        return compressor(self.spec)

    @property
    def max_draft(self) -> int:
        return max((op.drafts for op in self.ops), default=0)

    @property
    def size(self) -> int:
        """How much there is to read: what shrinking makes smaller."""
        return (
            (self.first > 0)
            + self.far
            + sum(
                1 + sum(op.counts) + 4 * len(op.counts) + op.drafts + op.padding + op.accepted + op.inert + op.unmapped
                for op in self.ops
            )
        )

    def to_json(self) -> str:
        """One line, without what has its default."""
        return json.dumps(_without_defaults(self, {"ops": [_without_defaults(op) for op in self.ops]}), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case of ``to_json``; raises CheckpointError for anything else."""
        data = parsed(text, "case")
        known(data, cls, "case")
        for i, op in enumerate(typed(data, _Ops, "case").ops):
            known(op, Op, f"case ops[{i}]")
        case = typed(data, cls, "case")
        case._check()
        return case

    def _check(self) -> None:
        def good(value: object, low: int, high: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        try:
            what = self.compressor
        except KvCondenseError as error:
            raise CheckpointError("case spec", error.expected, error.got) from error
        right = good(self.requests, 1, 1024) and good(self.seed, 0, 1 << 62)
        right = (
            right and good(self.first, 0, _MAX_INT) and isinstance(self.far, bool) and isinstance(self.pattern, bool)
        )
        right = right and isinstance(self.scale, (int, float)) and 0 < self.scale < 1e6
        for op in self.ops:
            right = right and op.kind in ("step", "recycle", "move", "fork") and op.junk in JUNK
            right = right and all(
                good(v, 0, _MAX_INT) for v in (*op.counts, op.drafts, op.padding, op.accepted, op.inert)
            )
            right = right and good(op.q, 0, self.requests - 1) and good(op.to, 0, self.requests - 1)
            if right and op.kind == "step":
                right = len(op.counts) == self.requests
                right = right and (not op.order or sorted(op.order) == list(range(self.requests)))
            else:
                right = right and not (op.counts or op.order or op.drafts or op.padding or op.inert or op.unmapped)
        if not right:
            raise CheckpointError("case", "operations that fit", self.to_json()[:200])
        if (most := self._bytes(what)) > _MAX_BYTES:
            needs = f"tokens, requests, positions and drafts that need {_MAX_BYTES} bytes at most"
            raise CheckpointError("case", needs, most)

    def _bytes(self, what: Compressor) -> int:
        """Of the largest thing that is made to play the case."""
        spec = what.spec
        steps = [op for op in self.ops if op.kind == "step"]
        tokens = 1 + sum(sum(op.counts) + op.padding + op.inert for op in steps)
        taken = tokens * (self.requests + len(self.ops) - len(steps))
        rows = max(taken, (self.max_draft + spec.window) * (2 * self.requests + 3))
        rope = (self.first + tokens) * max(spec.rope_dim, 2) * 4
        table = self.requests * (self.first + tokens) // spec.ratio // what.page_rows * _ENTRY
        cache = (taken // spec.ratio // what.page_rows + self.requests) * what.page_bytes
        return max(rows * 4 * spec.projected, rope, table, cache)


@dataclass
class _Ops:
    ops: list[Any]


def shrink(case: Case, fails: Callable[[Case], bool], budget: int = 150) -> Case:
    """The smallest case found that still fails, by leaving things out one after the other, greedily."""
    improved = True
    while improved and budget > 0:
        improved = False
        for smaller in _smaller(case):
            if smaller.size >= case.size and smaller.requests >= case.requests:
                continue
            budget -= 1
            if fails(smaller):
                case, improved = smaller, True
                break
            if budget <= 0:
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Simpler cases: without a request, without an operation, with fewer tokens, drafts and padding."""
    if case.first or case.far:
        yield replace(case, first=0, far=False)
    for q in range(case.requests if case.requests > 1 else 0):
        if any(op.kind == "fork" and q in (op.q, op.to) for op in case.ops):
            continue
        kept = [op for op in case.ops if op.kind == "step" or op.q != q]
        yield replace(case, requests=case.requests - 1, ops=tuple(_without_request(op, q) for op in kept))
    block = len(case.ops) // 2
    while block:  # large pieces first
        for i in range(0, len(case.ops), block):
            yield replace(case, ops=case.ops[:i] + case.ops[i + block :])
        block //= 2
    for i, op in enumerate(case.ops):
        for changed in _smaller_ops(op):
            yield replace(case, ops=(*case.ops[:i], changed, *case.ops[i + 1 :]))


def _smaller_ops(op: Op) -> Iterator[Op]:
    if op.accepted:
        yield replace(op, accepted=0)
    if op.padding:
        yield replace(op, padding=0)
    if op.inert:
        yield replace(op, inert=op.inert // 2)
    if op.unmapped:
        yield replace(op, unmapped=False)
    if op.drafts:
        yield replace(op, drafts=0, junk="", accepted=0)
        yield replace(op, drafts=op.drafts // 2, junk=op.junk if op.drafts > 1 else "")
    for q, n in enumerate(op.counts):
        for fewer in {0, n // 2, n - 1} - {n}:
            if fewer >= 0:
                yield replace(op, counts=(*op.counts[:q], fewer, *op.counts[q + 1 :]))


def _without_request(op: Op, q: int) -> Op:
    return replace(
        op,
        counts=op.counts[:q] + op.counts[q + 1 :],
        order=tuple(i - (i > q) for i in op.order if i != q),
        q=op.q - (op.q > q),
        to=op.to - (op.to > q),
    )


def _without_defaults(item: Case | Op, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    values = {**asdict(item), **(changes or {})}
    return {f.name: values[f.name] for f in fields(item) if values[f.name] != f.default}
