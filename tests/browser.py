"""A headless Chromium for tests: the system's, or playwright's own; or the reason why there is none."""

import contextlib
import shutil
import time
from pathlib import Path

import pytest


@contextlib.contextmanager
def chromium():
    """A browser; skips the test with a reason if none can be had (tools/chromium.sh installs one)."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    system = next((found for name in names if (found := shutil.which(name))), None)
    with sync_api.sync_playwright() as p:
        if system is None and not Path(p.chromium.executable_path).exists():
            pytest.skip("no Chromium: sh tools/chromium.sh installs one")
        browser = p.chromium.launch(executable_path=system, args=["--no-sandbox"])
        yield browser
        browser.close()


class Watched:
    """A page that remembers what it logs, raises and requests."""

    def __init__(self, browser, path, *, width=1280, scheme="light"):
        self.complaints, self.requests = [], []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def until(self, condition, seconds=20):
        """Wait until an expression of the page is true; playwright's own way to wait is what the policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def check(self, path):
        """Nothing was logged, nothing was fetched, and nothing sticks out at the side."""
        assert self.complaints == []
        assert self.requests == [path.as_uri()]
        assert self.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


HOSTILE = (
    "</script><script>document.title = 'ran'</script>",
    "</style><style>body { display: none }</style>",
    "<!--<script>",
    "<img src=x onerror=\"document.title = 'ran'\">",
    "<svg onload=\"document.title = 'ran'\"><style>*{}</style>",
    "\"' onmouseover=document.title='ran' x='",
    "]]></svg></td></table><a href=javascript:document.title='ran'>",
    "&lt;b&gt;&amp;#60;i>&#x3c;u>",
    "/*SCRIPT*/ /*STYLE*/ [/*TRACES*/] <!--POLICY-->",
    "\u2028\u2029',a|b\\|c\n| d | e |",
    '$\\frac{1}{$ $x^2$ style="fill: red" #000000',
)
"""What a page must show as text wherever a string comes from outside."""


def elements(view):
    """How many elements of each kind the page has, and its title: hostile strings change neither."""
    count = "Object.entries(Object.groupBy(document.querySelectorAll('*'), e => e.localName))"
    kinds = view.page.evaluate(f"{count}.map(([name, all]) => [name, all.length]).sort()")
    return view.page.title(), kinds
