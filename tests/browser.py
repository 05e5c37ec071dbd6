"""A headless Chromium for tests: the system's, or playwright's own; or the reason why there is none."""

import contextlib
import shutil
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

    def check(self, path):
        """Nothing was logged, nothing was fetched, and nothing sticks out at the side."""
        assert self.complaints == []
        assert self.requests == [path.as_uri()]
        assert self.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
