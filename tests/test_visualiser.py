"""Traces and the page that plays them: numbers are the plans', wrong ones are flagged, nothing comes from elsewhere."""

import copy
import json

import pytest
from typer.testing import CliRunner

from browser import HOSTILE, Watched, chromium, elements
from kvcondense import CompressorSpec, ModelConfig, Plan, RaggedBatch
from kvcondense.cli import app
from kvcondense.errors import RangeError
from kvcondense.layout.addresses import RingLayout
from kvcondense.markup import json_block
from kvcondense.visualiser import Scenario, page, trace
from kvcondense.visualiser.page import built_in

CSA = CompressorSpec.csa(ModelConfig.FLASH)
DRAFTS = Scenario(CSA, prompt=22, chunk=5, drafts=3, steps=6)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def saved(tmp_path, traces):
    path = tmp_path / "page.html"
    path.write_text(page(traces), encoding="utf-8")
    return path


def spoilt(change):
    """A trace with one wrong number."""
    found = copy.deepcopy(trace(DRAFTS))
    change(found["steps"])
    return found


WRONG = {
    "a read of another row": lambda steps: steps[3]["reads"][0].__setitem__(1, (steps[3]["reads"][0][1] + 1) % 11),
    "a window too few": lambda steps: steps[0]["windows"].pop(),
    "a window too many": lambda steps: steps[0]["windows"].append([1, 9, 4]),
    "RoPE at the last position": lambda steps: steps[0]["windows"][0].__setitem__(2, 3),
    "a row that was not kept": lambda steps: steps[0]["keeps"].pop(),
    "two windows in one row": lambda steps: steps[1]["windows"][0].__setitem__(1, steps[0]["windows"][0][1]),
    "rejected tokens go on": lambda steps: steps[-1].__setitem__("start", steps[-1]["start"] + 1),
}


def test_a_trace_says_what_plans_say():
    found = trace(DRAFTS)
    layout = RingLayout(1, CSA.required_ring_rows(3))
    assert [s["start"] for s in found["steps"]] == [0, 5, 10, 15, 20, 22, 23, 25, 28, 32, 33]
    for step in found["steps"]:
        batch = RaggedBatch.build(
            [0, step["tokens"]], start_positions=[step["start"]], state_slots=[0], draft_rows=step["drafts"]
        )
        plan = Plan.build(CSA, batch, state_layout=layout)
        assert [w[0] for w in step["windows"]] == plan.window_index.tolist()
        assert [w[2] for w in step["windows"]] == [4 * w for w in plan.window_index.tolist()]
        assert step["keeps"] == [list(p) for p in zip(plan.keep_position.tolist(), plan.keep_row.tolist(), strict=True)]
        live = range(CSA.live_start(step["start"]), step["start"])
        assert step["reads"] == [[p, p % layout.ring_rows] for p in live]
    assert found["cache"]["row_bytes"][1] == [
        ["nope", 576, 1024], ["rope", 1024, 1152], ["scales", 2312, 2319], ["pad", 2319, 2320]
    ]  # fmt: skip
    paged = trace(Scenario(CSA, 22, 5, state_page=8))
    assert paged["state"]["kind"] == "paged"
    with pytest.raises(RangeError, match="ring_rows"):
        trace(Scenario(CSA, 22, 5, 3, ring_rows=8))
    with pytest.raises(RangeError, match="chunk"):
        Scenario(CSA, 22, 0)


def test_what_is_shown_is_the_plan(browser, tmp_path):
    found = trace(DRAFTS)
    path = saved(tmp_path, [found])
    view = Watched(browser, path)
    for number, step in enumerate(found["steps"]):
        assert view.page.inner_text("#where") == f"step {number + 1} of {len(found['steps'])}"
        shown = view.page.eval_on_selector_all(
            "#rows b", "cells => cells.map(c => [Number(c.textContent), Number(c.dataset.row), c.className])"
        )
        assert [[p, row] for p, row, kind in shown if kind == "new"] == sorted(step["keeps"], key=lambda k: k[1])
        cells = view.page.eval_on_selector_all(
            "#tokens b", "cells => cells.map(c => [c.className, Number(c.textContent)])"
        )
        end, sure = step["start"] + step["tokens"], step["start"] + step["tokens"] - step["drafts"]
        kinds = {"new": range(step["start"], sure), "draft": range(sure, sure + step["accepted"]),
                 "lost": range(sure + step["accepted"], end), "read": [p for p, _ in step["reads"]]}  # fmt: skip
        for kind, positions in kinds.items():
            assert [p for words, p in cells if kind in words.split()] == list(positions)
        slots = view.page.eval_on_selector_all("#cache b[tabindex]", "cells => cells.map(c => Number(c.dataset.slot))")
        assert set(slots) >= {w[1] for w in step["windows"]}
        for index, slot, rope in step["windows"]:
            assert f"window {index}: pools" in view.page.inner_text("#events")
            assert f"rotated at {rope}, to cache row {slot}" in view.page.inner_text("#events")
        assert "Checked" in view.page.inner_text("#verdict")
        view.page.keyboard.press("ArrowRight")
    view.page.keyboard.press("Home")
    view.page.focus("#cache b")
    assert "nope 0..447, rope 448..575" in view.page.inner_text("#bytes")
    boxes = view.page.eval_on_selector_all("#strip i", "all => all.map(b => [b.className, b.title, b.style.left])")
    assert len(boxes) == sum(len(fields) for fields in found["cache"]["row_bytes"])
    assert [title for mine, title, _ in boxes if mine] == [
        f"row 0, {name}: bytes {first} to {last - 1} of {found['cache']['page_bytes']}"
        for name, first, last in found["cache"]["row_bytes"][0]
    ]
    assert float(boxes[1][2].rstrip("%")) == pytest.approx(100 * 448 / found["cache"]["page_bytes"], abs=1e-3)
    view.check(path)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_flagged(browser, tmp_path, name):
    path = saved(tmp_path, [spoilt(WRONG[name])])
    view = Watched(browser, path)
    assert view.page.get_attribute("#verdict", "class") == "wrong"
    assert "This plan is wrong" in view.page.inner_text("#verdict")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_stands_alone_at_any_width(browser, tmp_path, width, scheme):
    path = saved(tmp_path, [])
    view = Watched(browser, path, width=width, scheme=scheme)
    assert view.page.evaluate("traces.every(t => judge(t).length === 0)")
    assert view.page.evaluate("traces.length") == len(built_in())
    for ratio in ("128", "2", "4"):
        view.page.select_option("#ratio", ratio)
        view.page.select_option("#drafts", "7")
        view.page.keyboard.press("Tab")
        view.page.click("#next")
        assert view.page.inner_text("#where").startswith("step 2")
        assert view.page.eval_on_selector_all("#tokens b", "cells => cells.length") > 0
    view.check(path)


def test_it_plays_and_loads_a_trace(browser, tmp_path):
    path = saved(tmp_path, [])
    view = Watched(browser, path)
    view.page.click("#play")
    view.until("at >= 1")
    view.page.click("#play")
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(spoilt(WRONG["a window too few"])))
    view.page.set_input_files("#file", file)
    view.page.wait_for_selector("#verdict.wrong")
    assert "ends in it" in view.page.inner_text("#verdict") or "end in it" in view.page.inner_text("#verdict")
    file.write_text("{}")
    view.page.set_input_files("#file", [])
    view.page.set_input_files("#file", file)
    view.until("document.getElementById('verdict').textContent.includes('cannot be shown')")
    assert view.complaints == []


def test_the_command_writes_traces_and_pages(tmp_path):
    names = [str(tmp_path / n) for n in ("t.json", "p.html", "tour.html")]
    words = ["explain", "--kind", "hca", "--prompt", "130", "--chunk", "130", "--trace", names[0], "--page", names[1],
             "--tour", names[2]]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "window 0 -> cache row 4, RoPE at 0" in result.output
    assert json.loads((tmp_path / "t.json").read_text())["spec"]["ratio"] == 128
    assert "<script" in (tmp_path / "p.html").read_text()
    for wrong in (["--kind", "x"], ["--model", "x"], ["--chunk", "0"], ["--ring-rows", "9"]):
        assert CliRunner().invoke(app, ["explain", *wrong]).exit_code != 0


def poisoned(value, word):
    """A trace with ``word`` for every string of it, and beside every key."""
    if isinstance(value, dict):
        return {k: poisoned(v, word) for k, v in value.items()} | {word: word}
    if isinstance(value, list):
        return [poisoned(v, word) for v in value]
    return word if isinstance(value, str) else value


def test_strings_of_a_trace_are_text(browser, tmp_path):
    """In a page that is made with the trace, in one that loads its file, and in the name of a file that is none."""
    seen = {}
    for word in ("plain", *HOSTILE):
        path = saved(tmp_path, [poisoned(trace(DRAFTS), word)])
        view = Watched(browser, path)
        assert view.page.evaluate("traces[0].cache.format") == word
        view.page.focus("#cache b[tabindex]")
        places = ("#about-cache", "#bytes")
        for text in [view.page.text_content(place) for place in places]:
            assert word in text
        assert all(
            word in title for title in view.page.eval_on_selector_all("#strip i", "all => all.map(b => b.title)")
        )
        made = elements(view)
        file = tmp_path / "trace.json"
        file.write_text(json.dumps(poisoned(trace(DRAFTS), word)), encoding="utf-8")
        view.page.set_input_files("#file", file)
        view.until("trace !== traces[0]")
        view.page.focus("#cache b[tabindex]")
        loaded = elements(view)
        named = {"name": word, "mimeType": "application/json", "buffer": json.dumps({"schema": word}).encode()}
        view.page.set_input_files("#file", named)
        view.page.wait_for_selector("#verdict.wrong")
        assert word in view.page.text_content("#verdict")
        seen[word] = (made, loaded, elements(view))
        view.check(path)
        view.page.close()
    assert all(found == seen["plain"] for found in seen.values())


def test_a_trace_that_cannot_be_shown_leaves_the_one_before(browser, tmp_path):
    path = saved(tmp_path, [trace(DRAFTS)])
    view = Watched(browser, path)
    view.page.click("#next")
    bad = poisoned(trace(DRAFTS), "x") | {"cache": None}
    view.page.set_input_files("#file", {"name": "t", "mimeType": "", "buffer": json.dumps(bad).encode()})
    view.until("document.getElementById('verdict').textContent.includes('cannot be shown')")
    view.page.click("#next")
    assert view.page.inner_text("#where").startswith("step 2")
    view.check(path)


def test_the_policy_lets_nothing_else_run(browser, tmp_path):
    """What a hole in the escaping would let in: a script, a style, an attribute of either, a fetch, a form."""
    text = page([trace(DRAFTS)])
    for intruder in (
        "<script>document.title = 'ran'</script>",
        "<style>h1 { color: red }</style>",
        "<img src=x onerror=\"document.title = 'ran'\">",
        '<b style="color: red">x</b>',
        '<base href="https://example.com/">',
        '<iframe src="https://example.com/"></iframe>',
    ):
        path = tmp_path / "page.html"
        path.write_text(text.replace("<h1>", f"{intruder}<h1>"), encoding="utf-8")
        view = Watched(browser, path)
        assert view.page.title() != "ran"
        assert any("Content Security Policy" in said for said in view.complaints), intruder
        assert view.page.inner_text("#where").startswith("step 1 of")
        assert "example.com" not in view.page.evaluate("document.baseURI")
        view.page.close()


def test_marks_in_a_trace_are_not_replaced():
    marks = ("/*SCRIPT*/", "/*STYLE*/", "[/*TRACES*/]", "<!--POLICY-->")
    plain, marked = (page([{"x": "".join(words)}]) for words in ([], marks))
    assert marked == plain.replace('{"x":""}', json_block({"x": "".join(marks)}))
    assert json.loads(json_block("<&>\u2028\u2029")) == "<&>\u2028\u2029"
    assert not set("<&>\u2028\u2029") & set(json_block("<&>\u2028\u2029"))
