"""The conformance kit: right adapters pass, every mutant dies of a wrong answer, failures are small and replayable."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from kvcondense import KvCondenseError
from kvcondense.backends.reference import ReferenceBackend, Stages
from kvcondense.cli import app
from kvcondense.conformance import mutants
from kvcondense.conformance.adapter import Adapter
from kvcondense.conformance.cases import Case, Op, shrink
from kvcondense.conformance.invariants import INVARIANTS, check, first_failure, play, whole
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.conformance.own import KINDS, BackendAdapter, load_factory
from kvcondense.conformance.script import Script
from kvcondense.conformance.soak import soak
from kvcondense.conformance.stored import CANARY
from kvcondense.stages import pool, rope

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda i: i.name)
def test_every_invariant_holds_for_our_backends(invariant, backend, kind):
    outcome = check(invariant, load_factory(f"{backend}:{kind}"))
    assert outcome.passed, (outcome.detail, outcome.case)
    assert bool(outcome.skipped) == (invariant.name == "I9 codes"), "which needs a quantised cache: test_kit_geometry"
    assert outcome.played > 0 or outcome.skipped


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["reference", "kvcondense.backends.cpu"])
def test_other_seeds_play_other_histories(seed, name):
    assert first_failure(load_factory(name), seed=seed) is None


def test_the_original_kernels_forms_pass():
    """PR 270 pools online, last slot first, and rotates with selector matrices."""
    stages = Stages(pool=pool.online, rope=rope.selector)
    assert first_failure(lambda: BackendAdapter(ReferenceBackend("original", stages))) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed_by_a_wrong_answer(name, monkeypatch, tmp_path):
    """By the kit, and by ``verify``, which asks the kit where its own case is blind."""
    outcome = first_failure(load_factory(f"mutant:{name}"))
    assert outcome is not None
    assert "Error" not in outcome.detail, "a mutant that crashes has not been tested"
    if outcome.case is not None:
        assert outcome.case.size <= 400
        judge = next(i.judge for i in INVARIANTS if i.name == outcome.invariant)
        again = Case.from_json(outcome.case.to_json())
        assert again == outcome.case
        assert play(again, load_factory(f"mutant:{name}"), judge)[0] == outcome.detail
        assert play(again, load_factory("reference"), judge)[0] is None, "the case is fair"
    monkeypatch.setattr("kvcondense.cli.work.verify.first_failure", lambda make: outcome)  # has just been asked
    words = [
        "verify",
        "--kind",
        "hca",
        "--history",
        "0",
        "--batch",
        "1",
        "--mutant",
        name,
        "--json",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, (result.output, result.exception)
    assert json.loads((tmp_path / "r").read_text())["caught_by"] in ("this case", outcome.invariant)


def test_histories_are_as_wide_as_what_is_declared():
    """An engine that keeps eight rows of a step is right if it says so, and found if it declares more."""
    invariant = next(i for i in INVARIANTS if i.name == "I2 rollback")
    able = BackendAdapter().capabilities
    for most, wrong in ((16, True), (9, True), (8, False)):
        narrow = replace(able, max_draft=most)
        outcome = check(invariant, lambda a=narrow: BackendAdapter(MUTANTS["eight-drafts-kept-for"], capabilities=a))
        assert bool(outcome.detail) == wrong
        assert all(op.drafts <= most for case in invariant.cases(random.Random(0), narrow) for op in case.ops)
        asked = {op.drafts for case in invariant.cases(random.Random(0), narrow) for op in case.ops}
        assert {1, most - 1, most} <= asked


def test_far_rows_lie_in_the_last_page():
    invariant = next(i for i in INVARIANTS if i.name == "I7 address")
    for seed in range(3):
        for case in invariant.cases(random.Random(seed), BackendAdapter().capabilities):
            script = Script(case)
            first = script.frame.slots(script.live[0], torch.tensor([0]))
            assert 0 in script.live[0].touched
            assert int(first) // script.setup.page_rows == script.setup.num_pages - 1


def test_transformers_passes_what_it_declares():
    pytest.importorskip("transformers", minversion="5.23")
    make = load_factory("kvcondense.conformance.transformers_adapter:make")
    outcomes = {i.name: check(i, make) for i in INVARIANTS}
    assert {n for n, o in outcomes.items() if not o.skipped} == {
        "I6 emission",
        "I9 numerics",
        "I1 composition",
        "I5 only-written reads",
        "I7 address",
    }
    assert all(o.passed for o in outcomes.values()), outcomes


def test_a_users_adapter(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    assert isinstance(load_factory("naive_adapter:make")(), Adapter)
    # Its pool sums in torch's order, ours oldest to newest: equal to itself, near the reference.
    assert first_failure(load_factory("naive_adapter:make")) is None
    leaky = first_failure(load_factory("naive_adapter:make_leaky"))
    assert leaky.invariant == "I3 isolation"
    assert leaky.case.requests <= 3
    with pytest.raises(KvCondenseError, match="methods of Adapter"):
        load_factory("naive_adapter:make_nothing")()


def test_the_adapter_of_the_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE.parent / "examples"))
    outcomes = [check(i, load_factory("adapter:make")) for i in INVARIANTS]
    assert all(o.passed for o in outcomes), outcomes
    assert {o.invariant for o in outcomes if o.skipped} == {"I8 portability", "I8 fork", "I9 bytes"}


class OneChannel(BackendAdapter):
    """From the second step on, one channel of the rows is off by a bit."""

    steps = 0

    def step(self, kv_score, batch):
        super().step(kv_score, batch)
        self.steps += 1

    def rows(self, slots):
        rows = super().rows(slots).clone()
        written = rows.shape[0] and not bool((rows[0].view(torch.uint8) == CANARY).all())
        if self.steps > 1 and written:
            rows.view(torch.int16)[0, 3] ^= 1
        return rows


class Scribbler(BackendAdapter):
    """Writes a cache row that no request owns."""

    def step(self, kv_score, batch):
        super().step(kv_score, batch)
        self.cache.rows[0, 1] = 1.0


def test_one_wrong_bit_is_found_and_named():
    outcome = check(next(i for i in INVARIANTS if i.name == "I1 composition"), OneChannel)
    assert "channel 3" in outcome.detail
    assert "(1 ulp) (1 of 64 channels" in outcome.detail


def test_a_row_of_nobody_is_guarded():
    outcome = first_failure(Scribbler)
    assert outcome.invariant == "I6 emission"
    assert outcome.detail == "cache slot 1 was written, which belongs to no finished window"


@pytest.mark.parametrize(
    "name", ["nowhere:make", "kvcondense.spec", "kvcondense.spec:nothing", "reference:cloud", "mutant:none", "mutant"]
)
def test_adapters_that_do_not_exist(name):
    with pytest.raises(KvCondenseError, match="--adapter"):
        load_factory(name)


def test_shrinking_finds_the_core():
    """A failure that needs 5 tokens of request 1 and a move of it; everything else can go."""
    ops = [Op("step", (9, 9, 9), padding=3), Op("move", q=0), Op("step", (4, 7, 2), 2, "nan"), Op("move", q=1)]
    case = Case("csa", 3, (*ops, Op("step", (1, 1, 1))))
    tried = []

    def fails(c):
        tried.append(c)
        moved = [op for op in c.ops if op.kind == "move"]
        return any(sum(op.counts[q] for op in c.ops if op.kind == "step") >= 5 for q in {m.q for m in moved if m})

    small = shrink(case, fails)
    assert small.requests == 1
    assert sorted(op.kind for op in small.ops) == ["move", "step"]
    assert sum(sum(op.counts) for op in small.ops) == 5
    assert len(tried) < 150


BAD_CASES = {
    "no json": "{",
    "a list": "[]",
    "no ops": '{"spec": "csa", "requests": 1}',
    "unknown spec": '{"spec": "mla", "requests": 1, "ops": []}',
    "requests": '{"spec": "csa", "requests": 0, "ops": []}',
    "too many": '{"spec": "csa", "requests": 100000, "ops": []}',
    "unknown op": '{"spec": "csa", "requests": 1, "ops": [{"kind": "exec"}]}',
    "unknown field": '{"spec": "csa", "requests": 1, "ops": [], "x": 1}',
    "counts": '{"spec": "csa", "requests": 2, "ops": [{"kind": "step", "counts": [1]}]}',
    "huge count": '{"spec": "csa", "requests": 1, "ops": [{"kind": "step", "counts": [99999999999]}]}',
    "order": '{"spec": "csa", "requests": 2, "ops": [{"kind": "step", "counts": [1, 1], "order": [0, 0]}]}',
    "request": '{"spec": "csa", "requests": 1, "ops": [{"kind": "move", "q": 1}]}',
    "junk": '{"spec": "csa", "requests": 1, "ops": [{"kind": "step", "counts": [1], "junk": "os"}]}',
    "scale": '{"spec": "csa", "requests": 1, "ops": [], "scale": "x"}',
}


@pytest.mark.parametrize("case", BAD_CASES)
def test_case_files_are_not_trusted(case):
    with pytest.raises(KvCondenseError, match="case"):
        Case.from_json(BAD_CASES[case])


def invoke(*words, status=0):
    result = CliRunner().invoke(app, ["conformance", *map(str, words)])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def test_soak_counts_and_passes(tmp_path):
    for kind in KINDS:
        result = soak(load_factory(f"reference:{kind}"), 0, seed=3)
        assert result.passed, (result.detail, result.case)
        assert (result.histories, result.request_steps > 100) == (1, True)
    text = invoke("--soak", 0.02, "--seed", 5, "--json", tmp_path / "j")
    assert "PASS  soak, --adapter reference --seed 5" in text
    assert json.loads((tmp_path / "j").read_text())["request_steps"] > 100


def test_a_failing_soak_leaves_a_case_that_can_be_replayed(tmp_path):
    file = tmp_path / "soak.json"
    text = invoke("--adapter", "mutant:online-drafts-folded", "--soak", 1, "--folder", tmp_path, status=1)
    assert f"--replay {file}" in text
    text = invoke("--adapter", "mutant:online-drafts-folded", "--replay", file, status=1)
    assert "FAIL  rows and state" in text
    assert "FAIL" not in invoke("--adapter", "reference:online", "--replay", file)
    assert "drafts" in file.read_text()


def test_the_command_reports(tmp_path):
    report = tmp_path / "j"
    text = invoke("--json", report)
    told = ["SKIP" if i.name == "I9 codes" else "PASS" for i in INVARIANTS]
    assert [line[:4] for line in text.splitlines()[: len(INVARIANTS)]] == told
    assert [i["passed"] for i in json.loads(report.read_text())["invariants"]] == [{"PASS": True}.get(t) for t in told]
    folder = tmp_path / "found"
    text = invoke("--adapter", "mutant:ape-shifted", "--folder", folder, status=1)
    assert "channel 0" in text
    assert "smallest history found" in text
    assert {p.name for p in folder.iterdir()} == {"I9-numerics.json", "I8-portability.json", "summary.md"}
    assert "2 causes of 4 failures" in text, "rows are wrong everywhere, near and far, and so are scores in the state"
    text = invoke("--adapter", "mutant:stale-draft-row", "--folder", folder, status=1)
    again = re.findall(r"--replay (\S+)", text)
    assert len(again) == len(set(again)) == text.count("FAIL") > 1
    for found in again:
        invoke("--adapter", "mutant:stale-draft-row", "--replay", found, status=1)


class Broken(BackendAdapter):
    """An adapter with one mistake of its own."""

    def step(self, kv_score, batch):
        if batch.query_start_loc.shape[0] > 2:
            raise ValueError(f"no room for {kv_score.shape[0]} tokens")
        super().step(kv_score, batch)


def test_an_adapters_own_error_is_one_cause(monkeypatch, tmp_path):
    monkeypatch.setattr("kvcondense.cli.work.adapters.load_factory", lambda _: lambda: Broken())
    text = invoke("--folder", tmp_path / "found", "--json", tmp_path / "j", status=1)
    found = [i for i in json.loads((tmp_path / "j").read_text())["invariants"] if i["passed"] is False]
    assert len(found) > 3
    assert {i["raised"].partition(" at ")[0] for i in found} == {"ValueError"}
    assert text.count("smallest history") == 1
    assert text.count("the error of ") == len(found) - 1
    assert f"1 cause of {len(found)} failures" in text
    assert len(list((tmp_path / "found").iterdir())) == 2


def test_junit_says_what_the_command_says(monkeypatch, tmp_path):
    class Odd(Broken):
        capabilities = replace(BackendAdapter().capabilities, exports=False)

        def step(self, kv_score, batch):
            try:
                super().step(kv_score, batch)
            except ValueError:
                raise ValueError("<b>]]>&\x00\ufffe") from None

    monkeypatch.setattr(
        "kvcondense.cli.work.adapters.load_factory", lambda _: lambda: Odd(capabilities=Odd.capabilities)
    )
    invoke("--folder", tmp_path / "c", "--json", tmp_path / "j", "--junit", tmp_path / "j.xml", status=1)
    asked = json.loads((tmp_path / "j").read_text())["invariants"]
    suite = ElementTree.parse(tmp_path / "j.xml").getroot().find("testsuite")
    cases = suite.findall("testcase")
    assert [c.get("name").partition(": ")[0] for c in cases] == [i["invariant"] for i in asked]
    assert [{True: "", None: "skipped", False: "failure"}[i["passed"]] for i in asked] == [
        c[0].tag if len(c) else "" for c in cases
    ]
    assert int(suite.get("failures")) == len(suite.findall("testcase/failure")) > 2
    assert "<b>]]>&" in suite.find("testcase/failure").get("message")
    assert Case.from_json(suite.find("testcase/failure").text)
    invoke("--junit", tmp_path / "x.xml", "--soak", 1, status=2)
    invoke("--junit", tmp_path / "x.txt", status=2)


def test_the_table_of_mutants(monkeypatch, tmp_path):
    few = {n: MUTANTS[n] for n in ("ape-dropped", "pad-unwritten")}
    monkeypatch.setattr("kvcondense.cli.work.conformance.CORRECT", ("reference:online",))
    for module in ("kvcondense.cli.work.conformance", "kvcondense.conformance.own"):
        monkeypatch.setattr(f"{module}.MUTANTS", few)
    text = invoke("--mutants", "--json", tmp_path / "j")
    assert "2 of 2 caught" in text
    assert json.loads((tmp_path / "j").read_text())["mutants"] == {
        "ape-dropped": "I9 numerics",
        "pad-unwritten": "I9 bytes",
    }
    monkeypatch.setattr("kvcondense.cli.work.conformance.CORRECT", ())
    few.clear()  # both are done with
    few["harmless"] = mutants.Mutant("harmless", "nothing")
    assert "SURVIVED" in invoke("--mutants", status=1)


@pytest.mark.parametrize("words", ["--adapter none:x", "--rounds 0", "--soak -1", "--replay /nowhere"])
def test_the_command_refuses(words):
    invoke(*words.split(), status=2)


def run_pytest(folder, *words):
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


def test_the_pytest_plugin(tmp_path):
    result = run_pytest(tmp_path, "--kvcondense-adapter", "reference:online")
    assert f"{len(INVARIANTS) - 1} passed, 1 skipped" in result.stdout, result.stdout + result.stderr
    result = run_pytest(tmp_path, "--kvcondense-adapter", "mutant:emission-twice", "-x")
    assert result.returncode == 1
    assert "I6 emission" in result.stdout
    assert "smallest case" in result.stdout
    assert run_pytest(tmp_path).returncode == 5, "nothing is collected unless it is asked for"
    source = (HERE.parent / "src" / "kvcondense_pytest.py").read_text()
    assert "\nfrom kvcondense" not in source, "every pytest run imports the plugin"
    assert "\nimport kvcondense" not in source


def test_what_a_case_says_about_state_and_guards():
    case = Case("csa", 2, (Op("step", (9, 5), padding=2), Op("fork", q=0, to=1), Op("step", (3, 4))))
    detail, visited = play(case, load_factory("reference"), whole)
    assert (detail, visited.request_steps) == (None, 4)
    assert visited.told()["csa"]["chunk lengths"] == "3-5, 9"
    assert replace(case, seed=1).to_json() != case.to_json()
