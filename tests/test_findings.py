"""docs/findings.md and tools/findings.py without any engine: the page, what adapters declare, blocks, refusals."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcondense import condense
from kvcondense.conformance import Capabilities
from kvcondense.conformance.cases import Case
from kvcondense.conformance.compressors import compressor
from kvcondense.conformance.coverage import unasked
from kvcondense.conformance.histories import step
from kvcondense.conformance.invariants import INVARIANTS, check
from kvcondense.errors import UnsupportedError
from kvcondense.integrations import vllm

ROOT = Path(__file__).parent.parent
JSON, PAGE = ROOT / "benchmarks" / "baselines" / "findings.json", ROOT / "docs" / "findings.md"
FOREIGN = (
    "vllm_adapter:make",
    "vllm_adapter:make_v41",
    "rtp_llm_adapter:make",
    "atom_adapter:make",
    "atom_adapter:make16",
    "atom_adapter:make_wider",
    "mlx_adapter:make",
)


@pytest.fixture(scope="module", autouse=True)
def _paths():
    """Tools and adapters are no part of the package."""
    paths = [str(ROOT / "tools"), str(ROOT / "examples" / "foreign")]
    sys.path += paths
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")  # peers.py sets it where nobody has
        yield
    for path in paths:
        sys.path.remove(path)


@pytest.fixture(scope="module")
def tool():
    from findings import page, registry, run

    return page, registry, run


@pytest.fixture(scope="module")
def report():
    return json.loads(JSON.read_text(encoding="utf-8"))


def factory(name):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def test_the_page_is_what_the_committed_results_give(tool, report):
    assert PAGE.read_text(encoding="utf-8") == tool[0].page(report)


def test_results_are_those_of_every_implementation_and_as_they_are_known(tool, report):
    _, registry, run = tool
    assert list(report["results"]) == [about.name for about in registry.IMPLEMENTATIONS]
    assert run.unexpected(list(registry.IMPLEMENTATIONS), report) == []
    assert set(FOREIGN) == {about.adapter for about in registry.IMPLEMENTATIONS if about.folder}


def test_no_name_of_a_machine_is_published():
    for path in (JSON, PAGE):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ("/tmp", "/home", "/work", "/root", "site-packages") if word in text], path


def test_a_result_that_changed_is_told(tool, report):
    _, registry, run = tool
    changed = json.loads(json.dumps(report))
    atom = next(about for about in registry.IMPLEMENTATIONS if about.fails)
    for invariant in changed["results"][atom.name]["invariants"]:
        invariant["detail"] = ""
    changed["results"]["RTP-LLM"]["error"] = "not done after 1 minutes"
    changed["results"]["vLLM, V4"]["wrong"][0]["seen"] = False
    told = run.unexpected(list(registry.IMPLEMENTATIONS), changed)
    assert [sentence.split(":")[0] for sentence in told] == ["vLLM, V4", "RTP-LLM", atom.name]


@pytest.mark.parametrize("name", FOREIGN)
def test_an_adapter_declares_what_the_results_say(name, tool, report):
    able = factory(name).capabilities
    assert isinstance(able, Capabilities)
    about = next(about for about in tool[1].IMPLEMENTATIONS if about.adapter == name)
    found = report["results"][about.name]
    assert tuple(found["specs"]) == able.specs
    assert found["left_out"] == unasked(able)
    assert set(found["sums"]) == set(about.files)
    for line in able.specs:
        spec = compressor(line).spec
        assert (spec.head_dim, spec.rope_dim) in ((512, 64), (128, 64))


@pytest.mark.parametrize("name", FOREIGN)
def test_without_files_the_variable_or_the_package_is_named(name, monkeypatch, tmp_path):
    monkeypatch.setenv("KVCONDENSE_PEERS", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(UnsupportedError, match=r"KVCONDENSE_PEERS|mlx-lm 0\.32\.2"):
        factory(name)()


def test_the_published_history_is_one_that_can_be_played(report):
    cases = [w["case"] for r in report["results"].values() for w in (*r["invariants"], *r["widths"]) if w.get("case")]
    assert len(cases) == 3
    for data in cases:
        assert Case.from_json(json.dumps(data)).ops


def stand_in(blocks):
    """kvcondense on states in blocks, in the place of an engine's kernels."""

    class StandIn(blocks):
        capabilities = Capabilities(("csa", "hca"), refuses=False)

        def layout(self):
            return 8, 8

        def step(self, kv_score, batch):
            import peers

            found = peers.tokens(self.setup, batch, kv_score.shape[0])
            self.admit(batch)
            told = vllm.batch(
                batch.query_start_loc,
                batch.start_positions + batch.lengths,
                state_block_table=self.table(batch),
                slot_mapping=found.cache_slots[: int(batch.query_start_loc[-1])],
                draft_rows=batch.draft_rows,
            )
            real, s = kv_score[: int(batch.query_start_loc[-1])], self.setup
            if bool(found.mine.any()):
                condense(s.spec, real, s.weights, s.rope, told, state=vllm.state(self.states), cache=self.cache)
            self.release(batch)

    return StandIn


@pytest.mark.parametrize("name", ["I9 numerics", "I1 composition", "I2 rollback", "I3 isolation", "I8 portability"])
def test_blocks_are_kept_as_long_as_they_can_be_read(name):
    import peers

    invariant = next(i for i in INVARIANTS if i.name == name)
    outcome = check(invariant, stand_in(peers.Blocks))
    assert outcome.passed, outcome.detail


def test_tokens_that_are_nobodys_have_no_slot():
    import peers

    from kvcondense.conformance.script import Script, Step

    script = Script(Case("csa", 1, (step(9, inert=3, padding=2),)))
    (op,) = (op for op in script.ops if isinstance(op, Step))
    found = peers.tokens(script.setup, op.batch, 14)
    assert found.mine.tolist() == [True] * 9 + [False] * 5
    assert (found.cache_slots >= 0).nonzero()[:, 0].tolist() == [3, 7]
    assert torch.equal(found.positions[:9], torch.arange(9))


def test_files_that_are_not_there_are_told_and_the_status_says_so(tmp_path):
    words = ("--peers", str(tmp_path), "--only", "rtp", "--json", str(tmp_path / "out.json"))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "findings.py", *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1, done.stderr
    assert "KVCONDENSE_PEERS" in done.stdout
    assert "0 of 1" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["results"]["RTP-LLM"]["invariants"] == []


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--only", "nobody"), "a part of a name"), ((), "--peers"), (("--only", "rtp", "--write", "x"), "--write")],
)
def test_wrong_words_are_told(words, told):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "findings.py", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert told in done.stderr
