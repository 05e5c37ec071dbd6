"""--report: one page, everything in it, tables that say what the command said."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from browser import Watched, chromium
from kvcondense.cli import app

BASELINE = Path(__file__).parent.parent / "benchmarks" / "baselines" / "cpu.jsonl"
pytest.importorskip("matplotlib")


def run(*words, status=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of the three commands."""
    folder = tmp_path_factory.mktemp("pages")
    run(
        "verify", "--kind", "csa", "--history", 40, "--report", folder / "verify.html", "--json", folder / "verify.json"
    )
    wrong = ("--mutant", "ape-dropped", "--kind", "csa", "--history", 40)
    run("verify", *wrong, "--report", folder / "mutant.html", status=1)
    run("bench", "--from", BASELINE, "--report", folder / "bench.html")
    run("conformance", "--adapter", "cpu", "--report", folder / "conformance.html")
    run("conformance", "--mutants", "--report", folder / "mutants.html", "--json", folder / "mutants.json")
    return folder


def test_tables_and_plots_say_what_was_found(pages):
    text = (pages / "verify.html").read_text()
    for name, found in json.loads((pages / "verify.json").read_text())["outputs"].items():
        assert f"<td>{name}</td>" in text
        assert sum(found["ulps"].values()) > 0 or name == "kv_bytes"
    assert text.count("PASS") == 5
    assert "<svg" in text
    assert "FAIL" in (pages / "mutant.html").read_text()
    assert "decode 16" in (pages / "bench.html").read_text()
    assert "I1" in (pages / "conformance.html").read_text()
    caught, text = json.loads((pages / "mutants.json").read_text())["mutants"], (pages / "mutants.html").read_text()
    for name, by in caught.items():
        assert f"<td>{name}</td><td>{by}</td>" in text
    assert text.count('class="good"') == 3  # the correct ones


def test_pages_stand_alone_on_a_phone(pages):
    with chromium() as browser:
        for path in sorted(pages.glob("*.html")):
            for width in (1280, 400):
                view = Watched(browser, path, width=width, scheme="dark")
                view.check(path)
                shapes = view.page.eval_on_selector_all(
                    "figure svg",
                    "all => all.filter(s => getComputedStyle(s).display != 'none').map(s => s.classList[0])",
                )
                assert set(shapes) == {"tall" if width == 400 else "broad"}


def test_a_page_of_another_kind_is_refused(tmp_path):
    assert "html" in run("verify", "--report", tmp_path / "x.pdf", status=2)
