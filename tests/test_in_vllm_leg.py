"""tools/in_vllm.py without vLLM: its words, what its judge calls equal, what runs must show, its baseline."""

import copy
import json
from pathlib import Path

import pytest
import torch

from kvcondense import PagedCache
from kvcondense.formats import get_format
from legs import check_help, modules

ROOT = Path(__file__).parent.parent
BLOCKS, STRIDE, ROWS = 4, 4672, 4


@pytest.fixture(scope="module")
def leg():
    """The package's modules that need no vLLM."""
    return modules("in_vllm", "judge", "run", "world", "off")


@pytest.fixture
def memory():
    """Blocks of one memory, whose pages of four rows lie 64 bytes behind a block's start: rows 5 and 6 written."""
    memory = torch.randint(0, 256, (BLOCKS * STRIDE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pages = PagedCache(
        memory.as_strided((BLOCKS, ROWS * 584), (STRIDE, 1), 64), get_format("fp8_model1_scale_floor"), 512, ROWS
    )
    slots = torch.tensor([5, -1, 6])
    pages.put(slots[slots >= 0], pages.encode(torch.randn(2, 512, generator=torch.Generator().manual_seed(1))))
    return memory, pages, slots


def test_help_says_what_it_does():
    check_help("in_vllm.py", "python tools/in_vllm.py --only modules")


def test_equal_bytes_pass(leg, memory):
    mine, pages, slots = memory
    tally = leg[0].judge(mine, mine.clone(), pages, slots)
    assert (tally.status, tally.row_bytes, tally.row_differ, tally.elsewhere_differ) == ("PASS", 2 * 584, 0, 0)
    assert tally.elsewhere_bytes == mine.shape[0] - 2 * 584


@pytest.mark.parametrize("byte", [0, 64, STRIDE + 63, STRIDE + 64, STRIDE + 64 + 4 * 584, BLOCKS * STRIDE - 1])
def test_one_byte_elsewhere_fails(leg, memory, byte):
    mine, pages, slots = memory
    theirs = mine.clone()
    theirs[byte] ^= 1
    assert leg[0].judge(mine, theirs, pages, slots).why == "1 bytes elsewhere than in rows"


def test_a_code_beside_passes_and_another_one_does_not(leg, memory):
    mine, pages, slots = memory
    at = STRIDE + 64 + 576  # the first code of row 5, in the second row of its page
    for bits, status in ((1, "PASS"), (0x80, "FAIL")):
        theirs = mine.clone()
        theirs[at] ^= bits
        tally = leg[0].judge(mine, theirs, pages, slots)
        assert (tally.status, tally.row_differ) == (status, 1), tally.why
    sums = leg[0].Tally()
    sums.add(tally)
    sums.add(leg[0].judge(mine, mine.clone(), pages, slots))
    assert (sums.status, sums.steps, sums.row_differ) == ("FAIL", 2, 1)


def runs():
    about = {"forwards": 6, "plugin_steps": 6, "step_s": 1, "compressor_s": 1}
    own = {**about, "plugin_steps": 0, "tokens": [[1, 2]], "logprobs": [[-1.0, -2.0]]}
    plugin = {**about, "tokens": [[1, 2]], "logprobs": [[-1.0, -2.0]]}
    idle = {**about, "tokens": [[1, 3]], "logprobs": [[-1.5, -2.0]]}
    drafts = {**plugin, "forwards": 7, "plugin_steps": 7, "drafts": 4}
    ranks = {f"{who}, ranks": {"tokens": [[5]], "worker_steps": [n, n]} for who, n in (("own", 0), ("plugin", 6))}
    return {"own": own, "plugin": plugin, "idle": idle, "plugin, drafts": drafts, **ranks}


def test_an_engine_with_equal_tokens_passes(leg):
    found = leg[1].compared(runs())
    assert (found["status"], found["equal_tokens"], found["tokens"], found["idle_logprobs_apart"]) == (
        "PASS",
        2,
        2,
        0.5,
    )


@pytest.mark.parametrize(
    ("mode", "change", "why"),
    [
        ("plugin", {"tokens": [[1, 9]]}, "other tokens"),
        ("plugin", {"plugin_steps": 5}, "forwards that were not the plugin's"),
        ("own", {"plugin_steps": 1}, "the plugin ran without being asked"),
        ("idle", {"tokens": [[1, 2]], "logprobs": [[-1.0, -2.0]]}, "a plugin that does nothing is not seen"),
        ("plugin, drafts", {"tokens": [[1, 9]]}, "other tokens with drafts"),
        ("plugin, drafts", {"drafts": 0}, "no drafts"),
        ("plugin, drafts", {"plugin_steps": 6}, "forwards with drafts that were not the plugin's"),
        ("own, ranks", {"worker_steps": [0, 1]}, "the plugin ran without being asked"),
        ("plugin, ranks", {"tokens": [[6]]}, "other tokens on ranks"),
        ("plugin, ranks", {"worker_steps": [6, 5]}, "a rank without the plugin"),
        ("plugin, ranks", {"worker_steps": [6]}, "a rank without the plugin"),
    ],
)
def test_an_engine_that_is_wrong_fails(leg, mode, change, why):
    found = runs()
    found[mode].update(change)
    assert leg[1].compared(found)["why"] == why


def test_an_engine_that_breaks_says_how_far_it_came(leg):
    found = runs()
    found["own"] = {"status": "FAIL", "reached": "start the engine", "error": "KeyError: 'c1a'"}
    report = {"engine": leg[1].compared(found)}
    assert leg[1].failed(report) == ["engine"]
    assert leg[1].sentences(report) == ["FAIL  engine, own: up to \"start the engine\", then KeyError: 'c1a'"]


def test_a_block_that_two_requests_hold_is_free_behind_both(leg):
    blocks = leg[2].Blocks([2, 1])
    block = blocks.take()
    blocks.take(block)
    blocks.drop(block)
    assert (block, blocks.free) == (1, [2])
    blocks.drop(block)
    assert blocks.free == [2, 1]
    blocks.drop(blocks.take(0))
    assert blocks.free == [2, 1], "block 0 is nobody's"


def test_the_committed_run_failed_nowhere(leg):
    report = json.loads((ROOT / "benchmarks" / "baselines" / "vllm.json").read_text())
    assert leg[1].failed(report) == []
    modules, engine = report["modules"], report["engine"]
    assert {kind["kind"] for kind in modules["kinds"]} == {"ratio 4", "ratio 128", "indexer, ratio 4"}
    assert all(kind["status"] == "PASS" and not kind["elsewhere_differ"] for kind in modules["kinds"])
    assert all(one["status"] == "PASS" for one in (*modules["mutants"], *modules["checks"]))
    assert len(modules["mutants"]) == 12
    assert modules["own_forwards"] == 0
    assert engine["status"] == "PASS"
    assert engine["equal_tokens"] == engine["tokens"] > 0
    assert [check["check"] for check in report["off"]["checks"]] == list(leg[1].OFF) == list(leg[3].MODES)
    earlier = json.loads((ROOT / "benchmarks" / "baselines" / "vllm-avx2.json").read_text())
    assert leg[1].failed(earlier) == [], "what docs/vllm.md says of AVX2"
    assert earlier["modules"]["compressor"] != modules["compressor"] == "C++"
    assert not any(kind["elsewhere_differ"] for kind in earlier["modules"]["kinds"])
    assert earlier["engine"]["equal_tokens"] == earlier["engine"]["tokens"] > 0
    latents = report["latents"]
    kinds = {kind["kind"]: kind for kind in latents["kinds"]}
    assert list(kinds) == [
        "ratio 2, rings of 8 rows", "ratio 1", "ratio 2, rings of 16 rows", "ratio 2, rings of 8 rows, as on a GPU",
        "ratio 1, as on a GPU",
    ]  # fmt: skip
    assert all(kind["status"] == "PASS" and not kind["ring_differ"] and kind["latent_bytes"] for kind in kinds.values())
    assert [one["status"] for one in latents["mutants"]] == 8 * ["PASS"]
    broken = copy.deepcopy(report)
    broken["modules"]["status"] = "FAIL"
    assert leg[1].failed(broken) == ["modules"]
    assert all(line.startswith("PASS") for line in leg[1].sentences(report))
