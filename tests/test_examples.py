"""The short examples run, say what they should, and stay short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    "compress_text": ("", None),  # follows from its size
    "serve": ("request 0: ", "DIFFER"),
    "engine": ("[1, 3] tokens", None),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_example_runs(name, capsys, monkeypatch):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 60
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    text = capsys.readouterr().out
    wanted, unwanted = SHORT[name]
    if name == "compress_text":
        size = len(path.read_bytes())
        wanted = f"CSA: {size} tokens -> {size // 4} rows"
    assert wanted in text
    assert unwanted is None or unwanted not in text
    if name == "serve":
        assert text.count("equal, byte for byte") == 2
