"""tools/engines.py without any engine: its words, why it skips, and what its judge calls equal."""

from dataclasses import replace

import pytest
import torch

from kvcondense import CompressorSpec, ModelConfig
from kvcondense.spec import Rounding
from legs import check_help, modules


@pytest.fixture(scope="module")
def leg():
    """The package's modules that need neither an engine nor Triton's interpreter."""
    return modules("engines", "judge", "run", "scenes")


@pytest.fixture(scope="module")
def scene(leg):
    spec = CompressorSpec(ratio=2, head_dim=512, eps=1e-6, rope_dim=64, has_ape=False, rounding=Rounding.LATENT)
    steps = (((9, 0), (0, 0)), ((1, 0), (5, 2)), ((2, 0), (1, 0)))
    return leg[2].Scene(leg[2].Kind("small", spec, "fp4_v41_times_interleaved", steps, 8, ring=True, named=True))


@pytest.fixture(scope="module")
def whole(leg, scene):
    return leg[2].ours(scene, "reference")


def test_help_says_what_it_does():
    check_help("engines.py", "python tools/engines.py --packages")


def test_an_engine_that_is_missing_is_skipped_and_says_so(leg, tmp_path):
    class Missing:
        NAME, PACKAGE = "nobody's", "no-such-engine"

        @staticmethod
        def kinds():
            spec = CompressorSpec.csa(ModelConfig.FLASH)
            return [leg[2].Kind("one", spec, "fp8_model1", (((4, 0),),), 4)]

        @staticmethod
        def opened(packages):
            return f"not installed: {packages.name}"

    said = []
    report = leg[1].run((Missing,), tmp_path, "", said.append)
    assert [(case["status"], case["version"]) for case in report["cases"]] == [("skipped", "")]
    assert report["cases"][0]["why"] == f"not installed: {tmp_path.name}"
    assert len(said) == 1
    assert not leg[1].failed(report)
    assert not leg[1].run((Missing,), tmp_path, "another", said.append)["cases"]


def test_equal_bytes_pass_on_both_backends(leg, scene, whole):
    verdict = leg[0].judge(scene, leg[2].ours(scene, "cpu"), whole)
    assert verdict.status == "PASS"
    assert (verdict.state_differ, verdict.cache_differ) == (0, 0)
    assert verdict.cache_bytes == scene.written.shape[0] * 288
    assert verdict.state_bytes > 0


def changed(memory, **what):
    """A copy with one byte more in ``state`` or ``cache``."""
    cache, live = memory.cache.clone(), [rows.clone() for rows in memory.live]
    if "cache" in what:
        cache.view(-1)[what["cache"]] ^= what.get("bits", 1)
    if "state" in what:
        live[what["state"]].view(torch.uint8).view(-1)[0] ^= 1
    pages = replace(memory.pages, data=cache)
    return replace(memory, cache=cache, pages=pages, live=live)


def test_one_byte_of_the_state_fails(leg, scene, whole):
    verdict = leg[0].judge(scene, changed(whole, state=0), whole)
    assert (verdict.status, verdict.state_differ) == ("FAIL", 1)


def test_one_byte_of_a_row_that_nobody_wrote_fails(leg, scene, whole):
    verdict = leg[0].judge(scene, changed(whole, cache=0), whole)  # page 0 is nobody's
    assert (verdict.status, verdict.why) == ("FAIL", "rows that the step does not name")


def test_a_code_that_is_not_the_next_one_fails(leg, scene, whole):
    start = int(scene.written[0]) * 288
    row = changed(whole, cache=start, bits=0x8)  # the sign of its first value
    verdict = leg[0].judge(scene, row, whole)
    assert (verdict.status, verdict.why) == ("FAIL", "1 values by more than one step")


@pytest.mark.parametrize("mutant", ["a slot further", "turned a window late"])
def test_deliberate_errors_are_seen(leg, scene, whole, mutant):
    assert leg[0].judge(scene, leg[2].ours(scene, "reference", mutant), whole).status == "FAIL"
