"""The programs in pypto.language: what they say (by a recorder, which computes nothing), and, if it is there, a run."""

from dataclasses import replace

import pytest
import torch

import pypto_recorder as recorder
from kvcondense import CompressorSpec, KvCondenseError, ModelConfig, RaggedBatch, RopeTable, StatePool, condense
from kvcondense.backends import get_backend
from kvcondense.backends.pypto import calls, kernel, probe, worker
from kvcondense.spec import Rounding
from machine import tokens, weights

FLASH = ModelConfig.FLASH
SPECS = {kind: getattr(CompressorSpec, kind)(FLASH) for kind in ("hca", "csa", "indexer")}
THERE = probe.problem(probe.platform()) is None
needs_pypto = pytest.mark.skipif(not THERE, reason=str(probe.problem(probe.platform())))


def form(spec, hidden, batch=16, slots=4):
    return kernel.Form(
        batch, hidden, spec.head_dim, spec.ratio, spec.overlap, spec.rope_dim, spec.eps,
        slots * (spec.window + 2), spec.window + 2, 64,
    )  # fmt: skip


def where(spec, batch=16):
    """A token within a window, one that ends the first window, one that ends a later one, and nobody."""
    r, ring = spec.ratio, spec.window + 2
    found = [[-1] * batch for _ in range(5)]
    for b, p in enumerate((r + r // 2 - 1, r - 1, 5 * r - 1)):
        ends = (p + 1) % r == 0
        column = (p, b * ring, max(0, spec.window - 1 - p) if ends else -1, b * ring + p % ring, b if ends else -1)
        for row, value in zip(found, column, strict=True):
            row[b] = value
    return found


@pytest.mark.parametrize("rotate", [0, 1])
@pytest.mark.parametrize("hidden", [4096, 7168, 0])
@pytest.mark.parametrize("kind", SPECS)
def test_what_a_program_says_is_in_the_language_and_fits(kind, hidden, rotate):
    spec, pl = SPECS[kind], recorder.language()
    with recorder.installed(pl):
        made = kernel.program(form(spec, hidden))
    outputs, operands = recorder.say(made, where=where(spec), rotate=[rotate] * 8)
    assert list(outputs) == [operands[name] for name in ("state", "cache", "out")]
    said = pl.recorded
    assert ("project" in said.scopes) == (hidden > 0)
    assert ("rotate" in said.scopes) == (rotate == 1)
    assert said.scopes.count("pool") == 2
    assert said.scopes.count("store") == 2
    assert said.scopes.count("keep") == 3
    assert {"select_even", "select_odd", "merge", "norm"} <= set(said.scopes)
    assert said.held <= recorder.UNIFIED_BUFFER


WRONG = {
    "a tile beyond its buffer": lambda f: replace(f, head_dim=512, batch=1024),
    "selectors of another size": lambda f: replace(f, rope_dim=24),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_recorder_refuses_what_does_not_fit(name):
    pl = recorder.language()
    with recorder.installed(pl):
        made = kernel.program(WRONG[name](form(SPECS["hca"], 4096)))
    with pytest.raises(AssertionError):
        recorder.say(made, where=where(SPECS["hca"], 1024), rotate=[1] * 8)


def setup(kind, count, slots=3):
    spec = SPECS[kind]
    state = StatePool.ring(spec, slots, spec.window + 4)
    batch = RaggedBatch.build([0, count, 2 * count], start_positions=[0, 0], state_slots=[2, 0], draft_rows=2)
    return spec, state, batch, RopeTable.build(FLASH, 1024), weights(spec)


@pytest.mark.parametrize("kind", SPECS)
def test_tokens_go_one_by_one_and_leave_what_the_plan_keeps(kind, monkeypatch):
    """The host's half, with the reference in the place of the program: rows, state and what is put back."""
    spec, state, batch, rope, w = setup(kind, 2 * SPECS[kind].ratio + 3)
    x = tokens(spec, 2 * (2 * spec.ratio + 3))
    other = StatePool.ring(spec, 3, spec.window + 4)
    for pool in (state, other):
        pool.data.fill_(7.0)
    expected = condense(spec, x, w, rope, batch, state=other, impl="reference")
    forms = []

    def run(form, operands):
        """What the program's docstring says, in torch."""
        forms.append(form)
        rows, ape, ring, out, at = operands[0], operands[2], operands[9], operands[11], operands[12]
        for b in range(form.batch):
            p, base, begin, kept, _ = at[:, b].tolist()
            if p < 0:
                continue
            z, n, d = rows[b].clone(), form.width, form.head_dim
            z[n:] += ape[p % form.ratio]
            if begin >= 0:
                found = [ring[base + q % form.ring_rows] for q in range(p - form.window + 1 + begin, p)] + [z]
                late = [0 if form.overlap and j < form.ratio else n - d for j in range(begin, form.window)]
                kv = torch.stack([t[h : h + d] for t, h in zip(found, late, strict=True)])
                score = torch.stack([t[n + h : n + h + d] for t, h in zip(found, late, strict=True)])
                u = (kv * score.softmax(0)).sum(0).bfloat16().float()
                y = (u * torch.rsqrt(u.square().mean() + form.eps) * operands[3][0]).bfloat16().float()
                tail, even, odd = y[d - form.rope_dim :], operands[6].float(), operands[7].float()
                a, e = tail @ even, tail @ odd
                cos, sin = operands[4][b], operands[5][b]  # of pairs, then zeros
                a, e = (a * cos - e * sin).bfloat16().float(), (a * sin + e * cos).bfloat16().float()
                y[d - form.rope_dim :] = a @ even.T + e @ odd.T
                out[b] = y @ operands[8].float() * d**-0.5 if operands[13][0] else y
            ring[kept] = z

    monkeypatch.setattr(worker, "run", run)
    monkeypatch.setattr(probe, "problem", lambda name: None)
    done = condense(spec, x, w, rope, batch, state=state, impl=get_backend("pypto"))
    torch.testing.assert_close(done.values, expected.values, rtol=2**-7, atol=2e-2)
    assert torch.equal(state.data, other.data)
    assert len(forms) == 2 * spec.ratio + 3
    assert len(set(forms)) == 1


def test_it_says_what_is_missing(monkeypatch):
    assert (
        (probe.problem("a2a3sim") is None) or "pypto" in probe.problem("a2a3sim") or "pto" in probe.problem("a2a3sim")
    )
    assert "none of a2a3sim" in probe.problem("a9")
    spec, state, batch, rope, w = setup("csa", 4)
    x, backend = tokens(spec, 8), get_backend("pypto")
    monkeypatch.setattr(probe, "problem", lambda name: "the assembler is gone")
    with pytest.raises(KvCondenseError, match="the assembler is gone"):
        condense(spec, x, w, rope, batch, state=state, impl=backend)
    monkeypatch.setattr(probe, "problem", lambda name: None)
    for wanted, changed, held in (
        ("rounding fused", replace(spec, rounding=Rounding.FUSED), state),
        ("no ring", spec, None),
        ("not one fp32 tensor", spec, StatePool.ring(spec, 3, 12, dtype=torch.bfloat16)),
    ):
        with pytest.raises(KvCondenseError, match=wanted):
            condense(changed, x, w, rope, batch, state=held, impl=backend)


def test_auto_never_picks_a_simulator(monkeypatch):
    monkeypatch.setattr(probe, "problem", lambda name: None)
    monkeypatch.setattr(calls, "run", lambda *_: pytest.fail("a simulator was picked"))
    spec, state, batch, rope, w = setup("csa", 4)
    condense(spec, tokens(spec, 8), w, rope, batch, state=state)


@needs_pypto
@pytest.mark.parametrize("kind", SPECS)
def test_a_step_on_the_simulator(kind):
    spec, state, batch, rope, w = setup(kind, 5 if kind != "hca" else 2)
    x = tokens(spec, int(batch.query_start_loc[-1]))
    other = StatePool.ring(spec, 3, spec.window + 4)
    expected = condense(spec, x, w, rope, batch, state=other, impl="reference")
    done = condense(spec, x, w, rope, batch, state=state, impl="pypto")
    torch.testing.assert_close(done.values, expected.values, rtol=2**-7, atol=2e-2)
    rows = expected.request  # only live rows are compared
    assert done.request.tolist() == rows.tolist()
