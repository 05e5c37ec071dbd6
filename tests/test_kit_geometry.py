"""The kit at any size and in any cache format: declared in words, judged by the format, wherever positions begin."""

import inspect
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcondense import KvCondenseError
from kvcondense.conformance import Capabilities, Engine, compressors, histories, stored
from kvcondense.conformance.cases import Case, Op
from kvcondense.conformance.compressors import REAL, SMALL, compressor
from kvcondense.conformance.coverage import Coverage, ranges, unasked
from kvcondense.conformance.invariants import INVARIANTS, check, first_failure, play, whole
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.own import BackendAdapter, load_factory
from kvcondense.conformance.script import Script
from kvcondense.formats import FORMATS
from kvcondense.layout.cache import PagedCache

QUANTISED = (
    "csa head_dim=512 rope_dim=64 format=fp8_model1 page_rows=16",
    "indexer head_dim=128 rope_dim=64 format=mxfp4_indexer page_rows=16 rotate=false",
    "r2 head_dim=512 rope_dim=64 format=fp4_v41 page_rows=8 rounding=latent",
    "indexer head_dim=128 rope_dim=64 format=fp8_indexer_pow2_16x16 page_rows=16",
    "hca ratio=16 format=fp8_tensor",
    "csa ratio=3 format=fp32 page_rows=7",
)


def declaring(impl, *specs, **more):
    """A factory of our backend that declares these compressors and nothing of its own formats."""
    able = replace(BackendAdapter().capabilities, **{"specs": specs or SMALL, "formats": False, **more})
    return lambda: BackendAdapter(impl, capabilities=able)


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda i: i.name)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_quantised_caches_of_every_kind_pass(backend, invariant):
    outcome = check(invariant, declaring(backend, *QUANTISED))
    assert outcome.passed, (outcome.detail, outcome.case)
    assert bool(outcome.skipped) == (invariant.name == "I9 bytes")


def test_bytes_that_are_certain_are_those_of_tritons_kernels_too():
    outcome = check(next(i for i in INVARIANTS if i.name == "I9 codes"), declaring("triton", *QUANTISED[:4]))
    assert outcome.passed, (outcome.detail, outcome.case)
    assert outcome.played == 3, "one is rotated: nothing is certain behind a Hadamard"


def test_real_sizes_pass():
    assert first_failure(declaring("cpu", *REAL)) is None


@pytest.mark.parametrize("name", [
    "scale-floor-on-scale", "scale-rounded-down", "scale-rounded-after", "mx-scale-as-fp32", "fp4-ties-down",
    "fp4-nibbles-swapped", "fnuz-for-e4m3", "scales-inline", "pad-unwritten",
])  # fmt: skip
def test_wrong_bytes_are_found_in_anybodys_cache(name):
    """No adapter has to know kvcondense's formats to be found out: rows whose bytes are certain tell."""
    found = first_failure(declaring(MUTANTS[name], *QUANTISED))
    assert found is not None
    assert "Error" not in found.detail
    assert play(found.case, declaring("reference", *QUANTISED), _judge(found.invariant))[0] is None


def _judge(name):
    return next(i.judge for i in INVARIANTS if i.name == name)


def test_a_wrong_byte_is_named():
    class OneByte(BackendAdapter):
        def rows(self, slots):
            rows = super().rows(slots).clone()
            rows[:, 580] ^= (rows[:, 580] != stored.CANARY).to(torch.uint8)
            return rows

    able = replace(BackendAdapter().capabilities, specs=QUANTISED[:1], formats=False)
    found = check(next(i for i in INVARIANTS if i.name == "I9 codes"), lambda: OneByte(capabilities=able))
    assert "byte 580 (scales[4])" in found.detail
    assert found.case.size < 12


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda f: f.name)
def test_rows_go_through_bytes_and_back(form):
    d, page_rows = form.head_dim or 64, max(3, form.tile)
    cache = stored.new_cache(form, d, 2, page_rows)
    slots = torch.tensor([page_rows, 1])
    raw = stored.stored(cache, slots)
    assert bool((raw.contiguous().view(torch.uint8) == stored.CANARY).all())
    rows = torch.randn(2, d, generator=torch.Generator().manual_seed(1))
    cache.put(slots, cache.encode(rows))
    raw = stored.stored(cache, slots)
    stored.check(form, d, raw, 2)
    assert torch.equal(stored.values(form, d, raw), cache.decode_rows(slots))
    with pytest.raises(KvCondenseError, match="rows"):
        stored.check(form, d, raw[:, 1:], 2)
    with pytest.raises(KvCondenseError, match="rows"):
        stored.check(form, d, raw.double(), 2)


@pytest.mark.parametrize("words", [
    "", "mla", "csa head_dim", "csa head_dim=x", "csa head_dim=512 head_dim=64", "csa format=fp9", "csa ratio=0",
    "csa format=fp8_model1", "csa head_dim=99999", "indexer head_dim=96", "csa rotate=yes", "csa page_rows=0",
    "csa eps=-1.0", "csa rope_dim=3", "indexer head_dim=128 rope_dim=64 format=fp8_indexer_pow2_16x16 page_rows=4",
    "csa x=1", "csa page_rows=100000", "csa ratio=" + "9" * 5000, 7, None,
])  # fmt: skip
def test_words_that_name_no_compressor(words):
    with pytest.raises(KvCondenseError):
        Capabilities(specs=(words,))


@pytest.mark.parametrize("wrong", [
    {"max_draft": -1}, {"max_draft": 1 << 20}, {"max_positions": 0}, {"max_positions": 1 << 30},
    {"chunk_lengths": (0,)}, {"rounding": "upwards"}, {"specs": ("csa", "csa")}, {"chunk_lengths": (1 << 20,)},
])  # fmt: skip
def test_capabilities_that_nobody_has(wrong):
    with pytest.raises(KvCondenseError, match=next(iter(wrong))):
        Capabilities(**wrong)


@pytest.mark.parametrize("how", [{"exports": True}, {"offsets": True}, {}, {"unmapped": False}], ids=str)
def test_far_positions_without_exports(how, monkeypatch):
    """By import, by an offset that is declared legal, or behind a prefix of zeros, whose rows nobody reads."""
    monkeypatch.setattr("kvcondense.conformance.invariants.shrink", lambda case, _: case)  # prefixes again and again
    able = {"exports": False, "max_positions": 1 << 17, **how}
    specs = [s for s in SMALL if not compressor(s).spec.overlap] if how.get("offsets") else SMALL
    if "unmapped" in how:  # a prefix goes through the request's pages step by step: of large ones there are fewer
        specs = [f"{s} page_rows=64" for s in specs]
    invariant = next(i for i in INVARIANTS if i.name == "I7 position")
    outcome = check(invariant, declaring("cpu", *specs, **able))
    assert outcome.passed, outcome.detail
    hca = next(s for s in specs if s.startswith("hca"))
    assert max(outcome.coverage.seen[hca]["positions"]) > 65536, "beyond what a table without YaRN covers"
    for name in ("rope-clamped", "no-yarn"):
        assert check(invariant, declaring(MUTANTS[name], *specs, **able)).detail


def test_histories_stay_below_the_last_position():
    for most in (100, 5000, 70_000, 1 << 20):
        able = Capabilities(max_positions=most)
        for case in histories.positions(random.Random(0), able):
            assert case.first % case.compressor.spec.ratio == 0
            assert case.first == 0 or Script(case).setup.max_positions <= most


def test_chunks_of_the_engines_own_lengths():
    able = replace(BackendAdapter().capabilities, chunk_lengths=(96, 250))
    outcome = check(
        next(i for i in INVARIANTS if i.name == "I1 composition"),
        declaring("reference", chunk_lengths=(96, 250)),
    )
    assert outcome.passed
    for spec in able.specs:
        assert {95, 96, 97, 249, 250, 251} <= outcome.coverage.seen[spec]["chunk lengths"]


def test_verify_steps_begin_at_every_phase():
    outcome = check(next(i for i in INVARIANTS if i.name == "I2 rollback"), load_factory("reference"))
    for spec in SMALL:
        assert outcome.coverage.told()[spec]["phases of verify steps"] == "{0} of {0}".format(
            compressor(spec).spec.ratio
        )


def test_a_history_stays_fair_when_it_is_made_smaller():
    """Whoever says that drafts end verify steps alone is never shown a longer chunk with drafts."""
    invariant = next(i for i in INVARIANTS if i.name == "I2 rollback")
    for mixed in (True, False):
        able = {"specs": ("csa",), "mixed": mixed}
        cases = list(invariant.cases(random.Random(0), Capabilities(**able)))
        assert len(cases) == 2 + mixed
        assert all(histories.fair(case, Capabilities(**able)) for case in cases)
        found = check(invariant, declaring(MUTANTS["eight-drafts-kept-for"], "csa", mixed=mixed))
        assert histories.fair(found.case, Capabilities(**able))
    assert not histories.fair(Case("csa", 1, (Op("step", (9,), drafts=2),)), Capabilities(mixed=False))


def test_coverage_says_what_was_left_unasked():
    assert unasked(Capabilities()) == []
    left = unasked(Capabilities(specs=("csa",), exports=False, max_draft=0, spare=False))
    assert "drafts" in left
    assert "tokens behind the last request" in left
    assert "compressors of ratio 2, 8, 128" in left
    assert any("prefix" in line for line in left)
    assert ranges({1, 2, 3, 7, 9, 10}) == "1-3, 7, 9-10"
    seen = Coverage()
    seen.step("csa", 3, 6, 0, 0)
    assert seen.told() == {}, "an empty chunk visits nothing"


def test_requests_and_rows_of_nobody_are_histories():
    """They are shrunk, written and played again as others are."""
    case = Case("csa", 1, (Op("step", (9,), inert=8, unmapped=True), Op("step", (4,), padding=2)))
    assert Case.from_json(case.to_json()) == case
    assert play(case, load_factory("reference"), whole)[0] is None
    pairs = {"inert-slot-clamped": "I4 inert request", "row-0-for-minus-1": "I4 slot -1"}
    for mutant, name in pairs.items():
        found = check(next(i for i in INVARIANTS if i.name == name), load_factory(f"mutant:{mutant}"))
        assert found.case.size < 40


def test_an_engine_that_returns_something_else_is_told_so():
    class Odd(Engine):
        capabilities = Capabilities(specs=("csa",), exports=False, refuses=False, returns_state=False)

        def step(self, kv_score, batch):
            del kv_score, batch

        def rows(self, slots):
            return torch.zeros(slots.shape[0], 3)

    found = first_failure(Odd)
    assert "rows: expected [0, 64] for bf16" in found.detail or "for bf16, got" in found.detail


def test_the_adapter_of_the_docs_is_short():
    """At most 30 lines for an engine with FP8 pages, and they pass."""
    text = (Path(__file__).parent.parent / "examples" / "adapter.py").read_text()
    code = text.partition('"""\n\n')[2]
    assert "fp8_model1" in code
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 30


def test_compressors_say_what_they_read():
    assert compressor("csa").spec.head_dim == 64
    what = compressor("indexer head_dim=128 rope_dim=64 format=mxfp4_indexer page_rows=64 rotate=false")
    assert (what.spec.head_dim, what.page_rows, what.format.name, what.spec.rotate) == (128, 64, "mxfp4_indexer", False)
    assert what.page_bytes == PagedCache.allocate(128, 1, 64, format="mxfp4_indexer").data.shape[1]
    doc = inspect.getdoc(compressors.compressor)
    assert all(
        name in doc for name in ("ratio", "head_dim", "rope_dim", "overlap", "rotate", "has_ape", "eps", "rounding")
    )
