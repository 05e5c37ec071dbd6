"""The documentation site: every block of code is one that the build runs, and every picture one that a block makes.

``make docs`` runs the blocks; this checks, quickly, that there is none that it would skip, and looks at what was built.
"""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from browser import Watched, chromium
from kvcondense.conformance.vectors.schema import Entry, Op, Vector

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = 'exec="on"'
CODE = ("python", "sh", "bash", "console", "pycon")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_of_code_is_run(page):
    text = page.read_text()
    shell = "".join(m["code"] for m in FENCE.finditer(text) if m["language"] == "sh" and RUN in m["options"])
    for block in FENCE.finditer(text):
        if block["language"] not in CODE or RUN in block["options"]:
            continue
        if (source := re.fullmatch(r'--8<-- "(examples/(\w+)\.py)"\n', block["code"])) is not None:
            assert source[1] in shell or f"{source[2]}:make" in shell, f"{page.name} shows {source[1]}, runs it nowhere"
            continue
        ci = (ROOT / ".ci" / "run").read_text()
        commands = re.findall(r"^make \w+", block["code"], re.MULTILINE)
        assert commands, f"{page.name}: a block that is not run:\n{block[0]}"
        assert all(re.search(rf"^{command}$", ci, re.MULTILINE) for command in commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_picture_is_made_by_a_command_on_its_page(page):
    text = page.read_text()
    commands = "".join(m["code"] for m in FENCE.finditer(text) if RUN in m["options"])
    for name in re.findall(r"made/([\w.-]+\w)", text):
        assert f"build/docs/{name}" in commands
    assert re.findall(r"!\[[^]]*\]\((?!made/)", text) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_tests_that_a_page_names_exist(page):
    for file, name in re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", page.read_text()):
        assert f"\ndef {name}(" in (ROOT / "tests" / (file or "test_engines.py")).read_text(), f"{file}::{name}"


def test_every_entry_of_a_test_vector_is_on_its_page():
    text = (ROOT / "docs" / "vectors.md").read_text()
    for schema in (Vector, Op, Entry):
        _, table = text.split(f"| field of `{schema.__name__}` |")
        cells = [row.split("|")[1] for row in table.split("\n\n")[0].splitlines()[2:]]
        assert sorted(re.findall(r"`(\w+)`", "".join(cells))) == sorted(f.name for f in fields(schema))


def test_pages_are_on_the_map():
    listed = re.findall(r"(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == [p.name for p in PAGES]


def test_built_pages_fetch_nothing_and_fit_a_phone():
    built = sorted(p for page in PAGES if (p := ROOT / "build" / "site" / f"{page.stem}.html").exists())
    if not built:
        pytest.skip("make docs has not run")
    with chromium() as browser:
        for path in built:
            for width, scheme in ((1280, "light"), (400, "dark")):
                view = Watched(browser, path, width=width, scheme=scheme)
                assert view.complaints == []
                assert all(url.startswith(("file:", "data:", "blob:")) for url in view.requests), path
                assert view.page.evaluate("document.documentElement.scrollWidth") <= width
                view.page.close()
