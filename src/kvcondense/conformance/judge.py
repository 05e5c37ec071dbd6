"""What a played case must have left: the golden reference's rows, and what the same implementation gives it alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvcondense.conformance import stored
from kvcondense.conformance.generator import TOKENS
from kvcondense.conformance.play import Player, at, begin, raw
from kvcondense.conformance.script import Request, Script
from kvcondense.formats import CacheFormat
from kvcondense.golden.compare import Comparator, Quantisation, ratio_allclose, row_bounds
from kvcondense.golden.decode import DecodeCompressor, sylvester
from kvcondense.golden.run import golden_bytes
from kvcondense.layout.cache import PagedCache
from kvcondense.numerics import ulp_distance
from kvcondense.spec import Rounding

MIN_EQUAL = 0.99
"""Of a bf16 cache's elements, to the bit; a rounding that is missing changes a quarter of them."""
FLIPS = 4
"""Elements that may differ whatever their share: a flip of a rounding before RoPE changes a pair."""


def _rounding(player: Player) -> Rounding:
    """The profile that the adapter's rows follow."""
    own = player.adapter.capabilities.rounding
    return player.spec.rounding if own is None else Rounding(own)


def golden_rows(player: Player, request: Request) -> torch.Tensor:
    """The request's own rows, token by token in the golden reference: [n, head_dim] fp32."""
    able = player.adapter.capabilities
    prefix = player.case.first > 0 and not (able.exports or able.offsets)
    return reference_rows(player.script, request, _rounding(player), prefix=prefix)


def reference_rows(script: Script, request: Request, rounding: Rounding, *, prefix: bool = False) -> torch.Tensor:
    """The rows of a request of a script; ``prefix``: tokens of zeros came before its first one."""
    first, spec, setup = script.case.first, replace(script.spec, rounding=rounding), script.setup
    hadamard = sylvester(spec.head_dim) if spec.rotate else None
    decode = DecodeCompressor(spec, setup.weights.ape, setup.weights.norm, setup.rope.cos, setup.rope.sin, hadamard)
    for position in range(max(0, first - spec.window) if prefix else first, first):
        decode.step(torch.zeros(spec.width), torch.zeros(spec.width), position)
    rows = {}
    for i, token in enumerate(script.tokens_of(request)):
        kv, score = token.split(spec.width)
        row = decode.step(kv, score, first + i)
        if row is not None:
            rows[(first + i) // spec.ratio] = row
    wanted = [rows[c] for c in script.own_rows(request).tolist()]
    return torch.stack(wanted) if wanted else torch.zeros(0, spec.head_dim)


def against_golden(player: Player, request: Request) -> str | None:
    """Compare a request's rows with the golden reference, within the bounds of bf16 rows and of the cache's format."""
    spec, form, close = player.spec, player.what.format, player.adapter.capabilities.close
    actual = player.rows(player.frame.slots(request, player.own_rows(request)))
    expected = golden_rows(player, request)
    if form.plain is None:
        wrong_pad = (stored.pad_of(form, spec.head_dim, actual) != 0).any(-1).nonzero()[:, 0]
        if wrong_pad.shape[0]:
            return f"{_name(player, request, int(wrong_pad[0]))}: pad bytes that are not 0"
        bounds = row_bounds(spec, quantisation=quantisation(form, not _rounding(player).row))
        return _beyond(player, request, stored.values(form, spec.head_dim, actual), expected, bounds)
    expected = expected.to(actual.dtype)
    if close is not None:
        return _beyond(player, request, actual, expected, ratio_allclose(close, close, 0.0))
    if found := _beyond(player, request, actual, expected, row_bounds(spec)):
        return found
    return None if spec.rounding is not Rounding.REFERENCE else too_few_equal(spec.rotate, actual, expected)


def too_few_equal(rotated: bool, actual: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Why a rounding must be missing. Behind a Hadamard nothing is said: it spreads a flip over the row."""
    differ, count = int((actual != expected).sum()), actual.numel()
    if rotated or differ <= max(FLIPS, (1 - MIN_EQUAL) * count):
        return None
    return f"{differ} of {count} elements differ from the reference's bf16, at most 1 in 100 may"


def quantisation(form: CacheFormat, exact: bool) -> Quantisation:
    """What a format may add to the bounds of rows: twice half a step, since a flip of a rounding can double a scale."""
    scale = torch.tensor(stored.TENSOR_SCALE) if form.tensor_scale else None

    def step(rows: torch.Tensor) -> torch.Tensor:
        return 2 * form.error_bound(rows, form.encode(rows, scale, exact), scale, exact)

    return step


def _beyond(
    player: Player, request: Request, actual: torch.Tensor, expected: torch.Tensor, bounds: Comparator
) -> str | None:
    """The first element beyond its bounds, in a sentence."""
    if bounds(actual, expected).passed:  # bounds are of elements and of rows: all rows at once say the same
        return None
    rows = [bounds(a[None], e[None]) for a, e in zip(actual, expected, strict=True)]
    failed = [i for i, c in enumerate(rows) if not c.passed]
    row, found = failed[0], rows[failed[0]]
    if found.first is None:
        return f"{_name(player, request, row)}: {found.detail}"
    a, e = actual[row, found.first], expected[row, found.first]
    told = _pair(a, e) if actual.dtype != torch.float32 else f"{a.item():.6g} instead of {e.item():.6g}"
    return (
        f"{_name(player, request, row)}, channel {found.first}: {told}, beyond the bounds in {found.count} of "
        f"{actual.shape[1]} channels and {len(failed)} of {len(rows)} rows"
    )


def against_codes(player: Player) -> str | None:
    """Compare first rows of patterns with the golden encoder's bytes: every one is certain. Of others none is."""
    if player.script.inputs.patterns is None:
        return None
    wanted = certain_cache(player.script)
    for request, slot in certain_slots(player.script).items():
        at = torch.tensor([slot])
        actual, expected = player.rows(at), stored.stored(wanted, at)
        if not torch.equal(raw(actual), raw(expected)):
            return _first_wrong(player, request, actual, expected, torch.ones(1, dtype=torch.bool))
    return player.guard()


def certain_slots(script: Script) -> dict[Request, int]:
    """Where the first row of each request lies that has one."""
    finished = [request for request in script.live if 0 in script.own_rows(request)]
    return {request: int(script.frame.slots(request, torch.tensor([0]))) for request in finished}


def certain_cache(script: Script) -> PagedCache:
    """The whole cache of a script of patterns, as the golden encoder writes it."""
    patterns = script.inputs.patterns
    assert patterns is not None
    cache, norm = script.setup.new_cache(), script.setup.weights.norm
    rows = {slot: patterns[q.parts[0][0] - TOKENS].float() for q, slot in certain_slots(script).items()}
    data = golden_bytes(cache, {slot: row * norm for slot, row in rows.items()})
    for t, part in zip(cache.memory, data.split([t.numel() * t.element_size() for t in cache.memory]), strict=True):
        t.flatten().view(torch.uint8).copy_(part)
    return cache


def against_itself(player: Player, request: Request) -> str | None:
    """Compare rows and state, bit by bit, with the same implementation fed this request alone in one call."""
    own = player.own_rows(request)
    if request.done == player.case.first:
        return None
    frame, setup = player.frame, player.setup
    alone = player.make()
    alone_setup = replace(setup, num_slots=3, max_draft=0, num_pages=frame.pages + 1)
    alone.init(alone_setup)
    twin = Request(request.parts, 1, torch.arange(frame.pages) + 1, player.case.first)
    if player.case.first:
        begin(alone, alone_setup, twin.slot, twin.done, twin.pages)
    tokens = player.script.tokens_of(request)
    alone.step(tokens, frame.batch([twin], [tokens.shape[0]], [0]))
    twin.done = request.done
    actual = player.rows(frame.slots(request, own))
    expected = alone.rows(frame.slots(twin, own))
    stored.check(player.what.format, player.spec.head_dim, expected, own.shape[0])
    wrong = (raw(actual) != raw(expected)).any(-1)
    if bool(wrong.any()):
        return _first_wrong(player, request, actual, expected, wrong)
    if player.adapter.capabilities.returns_state:
        here, there = player.adapter.state(at(request)), alone.state(at(twin))
        if here is not None and there is not None:
            if here.shape != there.shape:
                return f"live state has shape {list(here.shape)} instead of {list(there.shape)}"
            wrong = (bits(here) != bits(there)).flatten(1).any(-1)
            if bool(wrong.any()):
                return f"live state row {int(wrong.nonzero()[0, 0])} of request {player.all.index(request)} differs"
    return None


def bits(x: torch.Tensor) -> torch.Tensor:
    """Raw bits, so that NaN equals itself."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def _first_wrong(
    player: Player, request: Request, actual: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor
) -> str:
    """The first row that differs, its first channel or byte, and the distance, in a sentence."""
    row = int(wrong.nonzero()[0, 0])
    differ = (bits(actual[row]) != bits(expected[row])).nonzero()[:, 0]
    first, rows = int(differ[0]), f"{int(wrong.sum())} of {wrong.shape[0]} rows"
    a, e, where = actual[row, first], expected[row, first], _name(player, request, row)
    if actual.dtype == torch.uint8:
        name = stored.name_byte(player.what.format, player.spec.head_dim, first)
        told = f"byte {first} ({name}): {int(a)} instead of {int(e)}"
        return f"{where}, {told} ({differ.shape[0]} of {actual.shape[1]} bytes, {rows})"
    return f"{where}, channel {first}: {_pair(a, e)} ({differ.shape[0]} of {actual.shape[1]} channels, {rows})"


def _name(player: Player, request: Request, row: int) -> str:
    return f"row {int(player.own_rows(request)[row])} of request {player.all.index(request)}"


def _pair(a: torch.Tensor, e: torch.Tensor) -> str:
    ulp = int(ulp_distance(a[None], e[None])[0]) if bool(torch.isfinite(a) & torch.isfinite(e)) else -1
    return f"{a.item():.6g} instead of {e.item():.6g} ({'not finite' if ulp < 0 else f'{ulp} ulp'})"
