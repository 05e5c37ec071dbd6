"""Which vectors there are: every history of every invariant, refusals, and every cache format to the byte."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from kvcondense.conformance import stored
from kvcondense.conformance.adapter import Capabilities
from kvcondense.conformance.cases import Case
from kvcondense.conformance.compressors import SMALL, compressor
from kvcondense.conformance.histories import fair, step
from kvcondense.conformance.invariants import INVARIANTS, Invariant, unwritten
from kvcondense.conformance.judge import MIN_EQUAL, certain_cache, quantisation, reference_rows
from kvcondense.conformance.mutants import mutant
from kvcondense.conformance.play import raw
from kvcondense.conformance.script import Begin, Copy, Reset, Script, Step
from kvcondense.conformance.vectors.schema import JUNK, Op, Vector
from kvcondense.formats import FORMATS, CacheFormat
from kvcondense.golden.compare import bounds_of_rows
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec, Rounding

Made = tuple[Vector, dict[str, torch.Tensor]]

CLASSES = {
    "I6 emission": mutant.CHUNKS,
    "I9 numerics": mutant.NUMERICS,
    "I9 bytes": mutant.NUMERICS,
    "I1 composition": mutant.CHUNKS,
    "I5 only-written reads": mutant.ALIASING,
    "I2 rollback": mutant.SPECULATION,
    "I3 isolation": mutant.BATCH,
    "I4 inertness": mutant.PADDING,
    "I4 inert request": mutant.PADDING,
    "I4 slot -1": mutant.PADDING,
    "I7 position": mutant.ROPE,
    "I7 address": mutant.BOUNDS,
    "I8 portability": mutant.TRANSFER,
    "I8 fork": mutant.PREFIX,
    "I10 determinism": mutant.RACES,
    "I12 fail closed": mutant.BOUNDS,
}
"""The class of bugs that an invariant's vectors catch."""
_SEED = 7
_REPEAT = 4
_SAFE = str.maketrans({" ": "-", "=": "-", "!": "", ",": ""})


def vectors() -> Iterator[Made]:
    """All of them, with what must come out: ``expected`` and ``bound`` fp32 [n, head_dim], or ``rows``, bytes.

    ``positions`` [n] of the windows that are read, ``cos`` and ``sin`` [n, rope_dim / 2] are beside them, for who has
    no table of angles.
    """
    able = Capabilities(specs=SMALL)
    for invariant in INVARIANTS:
        if invariant.cases is None:
            continue
        count: dict[str, int] = {}
        for case in invariant.cases(random.Random(f"{invariant.name} {_SEED}"), able):
            number = count[case.spec] = count.get(case.spec, -1) + 1
            yield _of_case(invariant, replace(case, seed=case.seed % (1 << 31)), number)
    for spec in SMALL:
        yield _refusals(spec)
    for form in FORMATS.values():
        yield _of_format(form)


def _of_case(invariant: Invariant, case: Case, number: int) -> Made:
    """A history and, where any split must give the same bits, each request once more, alone and in one step."""
    again = "exact" in invariant.needs
    script = Script(case, twins=again)
    vector = _vector(f"{invariant.name} {case.spec} {number}", invariant.name, invariant.promise, script)
    vector.needs = [need for need in invariant.needs if need not in ("formats", "returns_state")]
    vector.needs += [f"compressor {case.spec}"] + ["mixed"] * (not fair(case, Capabilities(mixed=False)))
    vector.needs += ["begins"] * bool(case.first) + ["huge_cache"] * case.far
    vector.repeat = _REPEAT if invariant.name == "I10 determinism" else 1
    return vector, _expect(script, vector)


def _vector(name: str, invariant: str, promise: str, script: Script) -> Vector:
    spec, setup, form = script.spec, script.setup, script.what.format
    return Vector(
        name=name.translate(_SAFE),
        invariant=invariant,
        promise=promise,
        bug_class=CLASSES[invariant],
        needs=[],
        compressor=spec.as_dict(),
        format=form.name,
        page_rows=setup.page_rows,
        num_pages=setup.num_pages,
        num_slots=setup.num_slots,
        max_draft=setup.max_draft,
        max_positions=setup.max_positions,
        seed=script.case.seed,
        scale=script.case.scale,
        ops=[_op(op, script) for op in script.ops],
        read=[],
    )


def _expect(script: Script, vector: Vector) -> dict[str, torch.Tensor]:
    """Fill in what is read, and compute what must be there."""
    spec, form, frame = script.spec, script.what.format, script.frame
    rows, positions = [], []
    for request in script.live:
        own = script.own_rows(request)
        slots = frame.slots(request, own).tolist()
        twin = script.twins.get(request)
        rows.append(reference_rows(script, request, spec.rounding))
        positions += (own * spec.ratio).tolist()
        vector.read += slots
        if twin is not None:
            begin = len(vector.read)
            vector.equal += [[begin - len(slots) + i, begin + i] for i in range(len(slots))]
            vector.read += frame.slots(twin, own).tolist()
            rows.append(rows[-1])
            positions += (own * spec.ratio).tolist()
    if not script.case.far:
        written = {s for request in script.all for s in frame.slots(request, _sorted(request.touched)).tolist()}
        vector.untouched = [s for s in range(vector.num_pages * vector.page_rows) if s not in written]
    vector.min_equal = (
        MIN_EQUAL if spec.rounding is Rounding.REFERENCE and form.name == "bf16" and not spec.rotate else 0.0
    )
    expected = torch.cat([*rows, torch.zeros(0, spec.head_dim)])
    if form.plain is None:
        bound = bounds_of_rows(spec, expected, quantisation(form, not spec.rounding.row))
    else:
        expected = expected.bfloat16().float()
        bound = bounds_of_rows(spec, expected)
    at = torch.tensor(positions, dtype=torch.int64)
    cos, sin = script.setup.rope.rows(at)
    up = (bound * (1 + 2.0**-20)).float()  # to fp32, and never down
    return {"expected": expected, "bound": up, "positions": at, "cos": cos, "sin": sin}


def _sorted(rows: set[int]) -> torch.Tensor:
    return torch.tensor(sorted(rows), dtype=torch.int64)


def _op(op: Step | Begin | Copy | Reset, script: Script) -> Op:
    if isinstance(op, Begin):
        return Op("begin", slot=op.slot, position=op.position)
    if isinstance(op, Copy):
        return Op("copy", slot=op.source, to=op.target, position=op.position)
    if isinstance(op, Reset):
        return Op("reset", slot=op.slot)
    return _step(op, script)


def _step(op: Step, script: Script) -> Op:
    batch, spec = op.batch, script.spec
    assert batch.state_slots is not None
    found = Op(
        "step",
        pieces=[[p.stream, p.first, p.count, JUNK.index(p.junk)] for p in op.pieces],
        query_start_loc=batch.query_start_loc.tolist(),
        start_positions=batch.start_positions.tolist(),
        draft_rows=batch.draft_rows.tolist(),
        state_slots=batch.state_slots.tolist(),
        slot_mapping=slot_mapping(batch, spec.ratio, script.setup.page_rows),
    )
    assert found.slot_mapping is not None
    found.slot_mapping += [-1] * (sum(p.count for p in op.pieces) - len(found.slot_mapping))  # of nobody's tokens
    if batch.block_table is not None:
        found.first_page = script.case.first // spec.ratio // script.setup.page_rows
        found.block_table = batch.block_table[:, found.first_page :].tolist()
    return found


def slot_mapping(batch: RaggedBatch, ratio: int, page_rows: int) -> list[int]:
    """The cache row of the window that each token completes; legal ones for a request of nobody, too."""
    if batch.slot_mapping is not None:
        return batch.slot_mapping.tolist()
    assert batch.block_table is not None
    found = [-1] * int(batch.query_start_loc[-1])
    for q, (start, count) in enumerate(zip(batch.start_positions.tolist(), batch.lengths.tolist(), strict=True)):
        begin, start = int(batch.query_start_loc[q]), max(start, 0)
        for t in range(count):
            if (start + t + 1) % ratio == 0:
                window = (start + t) // ratio
                found[begin + t] = int(batch.block_table[q, window // page_rows]) * page_rows + window % page_rows
    return found


def _refusals(words: str) -> Made:
    """A request that goes on as if the steps that must be refused had never been."""
    spec = compressor(words).spec
    script = Script(Case(words, 1, (step(9), step(spec.window), step(spec.ratio)), seed=_SEED), twins=True)
    name, promise = "I12 fail closed", "bad metadata raises before any write"
    vector = _vector(f"{name} {words}", name, promise, script)
    vector.needs = ["refuses", "exact", "chunks", f"compressor {words}"]
    good, rest = vector.ops[1], vector.ops[1:]
    vector.ops = [vector.ops[0], *_wrongs(good, vector, spec), *rest]
    return vector, _expect(script, vector)


def _wrongs(good: Op, vector: Vector, spec: CompressorSpec) -> Iterator[Op]:
    assert good.slot_mapping is not None
    assert good.start_positions is not None
    assert good.query_start_loc is not None
    beyond = [vector.num_pages * vector.page_rows if s >= 0 else -1 for s in good.slot_mapping]
    far = [(1 << 40) if s >= 0 else -1 for s in good.slot_mapping]
    position = unwritten(spec, good.start_positions[0])
    assert position is not None
    changes: dict[str, dict[str, list[int]]] = {
        "a position that nobody wrote up to": {"start_positions": [position]},
        "a state slot beyond the last one": {"state_slots": [vector.num_slots]},
        "more drafts than tokens": {"draft_rows": [good.query_start_loc[-1] + 1]},
        "a cache row beyond the last one": {"slot_mapping": beyond},
        "a cache row beyond all memory": {"slot_mapping": far},
        "fewer tokens than query_start_loc says": {"query_start_loc": [0, good.query_start_loc[-1] + 1]},
    }
    for why, change in changes.items():
        yield replace(good, op="refuse", why=why, first_page=None, block_table=None, **change)


def _of_format(form: CacheFormat) -> Made:
    """Rows that are certain, in every page of a cache: ``rows`` and ``pages`` have its bytes, untouched ones too."""
    d = form.head_dim or 64
    sizes = f"head_dim={d} rope_dim={form.rope_dim or 16} page_rows={max(3, form.tile)}"
    words = f"{'indexer' if d == 128 else 'csa'} {sizes} rotate=false has_ape=false format={form.name}"
    n, ratio = 6, compressor(words).spec.ratio
    script = Script(Case(words, n, (step(*(ratio,) * n),), seed=_SEED, pattern=True))
    patterns = script.inputs.patterns
    assert patterns is not None
    vector = _vector(f"I9 bytes {form.name}", "I9 bytes", "every byte of every cache format", script)
    vector.needs, vector.pattern, vector.exact = ["ragged", f"format {form.name}"], True, True
    vector.tensor_scale = stored.TENSOR_SCALE if form.tensor_scale else None
    every, cache = torch.arange(vector.num_pages * vector.page_rows), certain_cache(script)
    vector.read = every.tolist()
    inputs = {"pattern": patterns, "norm": script.setup.weights.norm}
    at = torch.zeros(1, dtype=torch.int64)
    cos, sin = script.setup.rope.rows(at)
    rows = {"rows": raw(stored.stored(cache, every)), "pages": cache.data}
    return vector, {**inputs, **rows, "positions": at, "cos": cos, "sin": sin}
