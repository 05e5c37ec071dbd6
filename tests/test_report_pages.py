"""--report: one page, everything in it, tables that say what the command said."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from browser import HOSTILE, Watched, chromium, elements
from kvcondense.cli import app
from kvcondense.conformance.invariants import INVARIANTS, Outcome
from kvcondense.conformance.mutants import MUTANTS

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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvcondense.cli.work.conformance.load_factory", lambda name: name)
        patch.setattr("kvcondense.cli.work.conformance.first_failure", found)
        run("conformance", "--mutants", "--report", folder / "mutants.html", "--json", folder / "mutants.json")
    return folder


def found(name, *, seed):
    """What catches each mutant is test_conformance's to find out: pages have its name, whichever it is."""
    number = list(MUTANTS).index(name.removeprefix("mutant:")) if name.startswith("mutant:") else None
    return None if number is None else Outcome(INVARIANTS[(number + seed) % len(INVARIANTS)].name, "", detail="wrong")


def test_tables_and_plots_say_what_was_found(pages):
    text = (pages / "verify.html").read_text()
    for name, found in json.loads((pages / "verify.json").read_text())["outputs"].items():
        assert f"<td>{name}</td>" in text
        assert sum(found["ulps"].values()) > 0 or name == "kv_bytes"
    assert text.count("PASS") == 5
    assert "<svg" in text
    assert "FAIL" in (pages / "mutant.html").read_text()
    text = (pages / "bench.html").read_text()
    assert "decode 16" in text
    rates = json.loads(BASELINE.read_text(encoding="utf-8").splitlines()[0])["rates"]
    assert f"{rates['memory'] / 1e9:.3g} GB/s" in text
    assert f"{rates['cached'] / 1e6:.3g} MB<" in text, "bytes, no rate"
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


def renamed(value, word):
    """Records with ``word`` behind every string, and beside every fact of the machine."""
    if isinstance(value, dict):
        return {k: renamed(v, word) for k, v in value.items()}
    return f"{value} {word}" if isinstance(value, str) and value not in ("warm", "cold") else value


def bench_page(tmp_path, word):
    """The report of some of the committed timings with hostile names."""
    head, *records = [json.loads(line) for line in BASELINE.read_text(encoding="utf-8").splitlines()]
    head = renamed(head, word)
    head["machine"][word] = word
    head["rates"][word] = 1e9
    many = ("decode 16", "prefill 2048")  # cases of kinds that the others show, and whose pictures take long
    few = [r for r in records if not r.get("complete", r.get("case", "")).startswith(many)]
    lines = [head, *(r if "complete" in r else renamed(r, word) for r in few)]
    source, made = tmp_path / "records.jsonl", tmp_path / "bench.html"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run("bench", "--from", source, "--report", made)
    return made


def adapter_page(tmp_path, word, monkeypatch):
    """The report of an adapter whose every error has ``word`` in it."""
    from kvcondense.cli.work import conformance as work
    from kvcondense.conformance.own import BackendAdapter

    class Evil:
        name = word

        def why_not(self, step):
            del step

        def run(self, step):
            del step
            raise ValueError(word)

    monkeypatch.setattr("kvcondense.cli.work.adapters.load_factory", lambda _: lambda: BackendAdapter(Evil()))
    monkeypatch.setattr(work, "INVARIANTS", work.INVARIANTS[:2])
    made = tmp_path / "conformance.html"
    case = ("--folder", tmp_path / "found")
    run("conformance", "--adapter", word, *case, "--rounds", 1, "--report", made, status=1)
    return made


def verify_page(tmp_path, word):
    """A comparison with hostile names and details."""
    from kvcondense.cli.work import page

    made, short = tmp_path / "verify.html", word[:20].replace("$", "")
    parts = [
        page.heading(word, word),
        page.table((word, "b"), [(word, word), (1, "PASS")]),
        page.histogram({short: {short: 3, "0": 1}, "b": {"0": 1}}),
        page.tally({short: 3}, short),
    ]
    page.write(made, word, {word: word}, parts)
    return made


def shown(view):
    """Text of the tables' cells and of the pictures."""
    return view.page.eval_on_selector_all("td, th, h1, h2, svg text", "all => all.map(e => e.textContent)")


@pytest.mark.parametrize("kind", ["bench", "conformance", "verify"])
def test_hostile_names_are_text(kind, tmp_path, monkeypatch):
    seen = {}
    with chromium() as browser:
        for number, word in enumerate(("plain", *HOSTILE)):
            folder = tmp_path / str(number)
            folder.mkdir()
            if kind == "bench":
                path = bench_page(folder, word)
            else:
                with monkeypatch.context() as patch:
                    path = verify_page(folder, word) if kind == "verify" else adapter_page(folder, word, patch)
            view = Watched(browser, path)
            title, kinds = elements(view)
            assert title != "ran"
            seen[word] = [found for found in kinds if found[0] not in ("path", "g", "use", "defs", "text", "clippath")]
            assert view.complaints == []
            assert view.requests == [path.as_uri()]
            assert any(" ".join(word.split()) in " ".join(text.split()) for text in shown(view))
            view.page.close()
    assert all(found == seen["plain"] for found in seen.values())


def test_a_picture_has_no_styles_of_its_own(pages):
    for path in pages.glob("*.html"):
        text = path.read_text()
        assert text.count("<style") == 1
        assert not re.findall(r"<\w[^<>]*\sstyle=", text)
        assert not re.search(r"<t\w+[^<>]*>[^<]*mathdefault", text)  # the numbers of axes are formulas still
