"""Several windows of a program: the bits of one, whatever windows share it, and only where they may be pooled so."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from test_triton import make_state, play

from kvcondense import PagedCache, RaggedBatch, StatePool, condense
from kvcondense.backends.triton import tuning
from kvcondense.backends.triton.constants import constants, state_key
from kvcondense.backends.triton.kernels import condense as kernels
from kvcondense.backends.triton.tuning import Choice
from kvcondense.layout.plan import Plan
from machine import SPECS, rope, tokens, weights

SHORT = [name for name in SPECS if name != "hca"]


@pytest.fixture
def together(monkeypatch):
    """Makes every step take so many windows to a program; the numbers of the first windows that were pooled so."""
    found, real = [], kernels.together

    def use(windows):
        found.clear()
        monkeypatch.setattr(tuning, "choose", lambda *_: Choice(16, 1, windows=windows))
        return found

    def noted(first, *rest):
        found.append(int(first.handle.data[0]))
        real(first, *rest)

    monkeypatch.setattr(kernels, "together", noted)
    return use


def bits(tensors):
    """As integers: NaN are equal, zeros of two signs are not."""
    return [t.contiguous().view(torch.int32 if t.element_size() == 4 else torch.int16) for t in tensors]


@pytest.mark.parametrize("kind", ["none", "ring", "paged"])
@pytest.mark.parametrize("name", SHORT)
def test_no_bit_changes(name, kind, together):
    """Programs with whole windows of one request and of two, windows that begin before the step, and one too few."""
    spec, seen, counts = SPECS[name], [], {}
    x = tokens(spec, 41)
    x[3, 5], x[12, -1], x[20], x[30, :8] = float("nan"), float("inf"), -0.0, float("-inf")
    for windows in (1, 2, 4):
        pooled = together(windows)
        rows, cache, state = play(spec, kind, "triton", x)
        seen.append(bits([*rows, cache, *([] if state is None else [state.data])]))
        counts[windows] = len(pooled)
    assert seen[0][0].any()
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other))
    assert counts[1] == 0
    if name != "r8-overlap":  # of which two whole windows follow one that is not
        assert counts[2] > 0
        assert counts[2] > counts[4] >= (spec.window < 8)


def test_windows_of_two_requests_share_a_program(together):
    """And of one that ends none between them. Which windows the programs took is known."""
    spec = SPECS["r2"]
    x = tokens(spec, 15)
    batch = RaggedBatch.build([0, 6, 7, 15], start_positions=[0, 4, 8])
    seen = []
    for windows, first in ((1, []), (2, [0, 2, 4]), (4, [0])):
        pooled = together(windows)
        seen.append(bits([condense(spec, x, weights(spec), rope(spec, 64), batch, impl="triton").values]))
        assert seen[-1][0].shape[0] == 7
        assert pooled == first
    assert all(torch.equal(seen[0][0], other[0]) for other in seen[1:])


def test_padding_is_left_alone(together):
    """Of a static plan: windows that nobody fills lie in a program with one that somebody does."""
    spec = SPECS["csa"]
    x, seen = tokens(spec, 24), []
    for windows in (1, 2, 4):
        pooled = together(windows)
        state, cache = StatePool.ring(spec, 4), PagedCache.allocate(16, 2, 8)
        state.data.fill_(0)
        cache.fill(0xA5)
        batch = RaggedBatch.build(
            [0, 21, 21, 22], start_positions=[0, -1, 3], state_slots=[2, -1, -1], slot_mapping=list(range(22))
        )
        layout = state.layout
        plan = Plan.build_static(spec, batch, max_tokens=24, state_layout=layout, max_positions=64, cache_rows=16)
        assert plan.num_windows > 5
        rows = condense(
            spec, x, weights(spec), rope(spec, 64), batch, plan=plan, state=state, cache=cache, impl="triton"
        )
        assert (rows.window >= 0).sum() == 5
        assert (rows.values[rows.window < 0] == 0).all()
        assert len(pooled) == (windows == 2), "windows 2 and 3; 0 begins before the request, 5 is nobody's"
        seen.append(bits([rows.values, cache.rows, state.data]))
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0], other))


def test_they_are_for_programs_with_all_channels_and_windows_as_they_lie():
    spec = SPECS["r8"]
    for choice in (Choice(8, 1, windows=2), Choice(16, 1, windows=2)):
        for kind in ("ring", "online"):
            c = constants(spec, state_key(make_state(spec, kind)), None, 0, False, choice)
            assert c.windows == (2 if choice.block == 16 and kind == "ring" else 1)
    two = Choice(16, 1, windows=2)
    assert constants(spec, state_key(None), None, 0, False, two, splits=8).windows == 1
    assert constants(spec, state_key(None), None, 0, False, two, stored=True).windows == 1
    assert constants(replace(spec, ratio=6), state_key(None), None, 0, False, two).windows == 1
