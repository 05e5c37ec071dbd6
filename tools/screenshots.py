"""Screenshots of the visualiser and of reports, at 1280 (light) and 400 pixels (dark). Needs Chromium."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from typer.testing import CliRunner

from kvcondense.cli import app
from kvcondense.visualiser import page

_BASELINE = Path(__file__).parent.parent / "benchmarks" / "baselines" / "cpu.jsonl"


def main() -> None:
    """Write visualiser-*.png, report-*.png (of verify) and bench-*.png (of the committed timings)."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Example: python tools/screenshots.py docs/images")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as made, sync_playwright() as p:
        files = {name: Path(made) / f"{name}.html" for name in ("visualiser", "report", "bench")}
        files["visualiser"].write_text(page(), encoding="utf-8")
        words = ["verify", "--kind", "csa", "--history", "1000", "--no-rotate", "--report", str(files["report"])]
        assert CliRunner().invoke(app, words).exit_code == 0
        words = ["bench", "--from", str(_BASELINE), "--report", str(files["bench"])]
        assert CliRunner().invoke(app, words).exit_code == 0
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, file in files.items():
            for width in (1280, 400):
                scheme = "light" if width > 400 else "dark"
                view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                view.goto(file.as_uri())
                if name == "visualiser":
                    view.select_option("#chunk", "5")
                    view.select_option("#drafts", "3")
                    view.fill("#step", "7")
                    view.locator("#cache b[tabindex]").last.focus()
                view.screenshot(path=folder / f"{name}-{width}.png", full_page=name != "bench")  # a long page
                print(folder / f"{name}-{width}.png")
        browser.close()


if __name__ == "__main__":
    main()
