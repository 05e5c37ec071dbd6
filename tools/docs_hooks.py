"""mkdocs hooks of the documentation site: pictures that blocks of code make, and formulas.

A page shows ``made/NAME`` where a block on the same page writes ``build/docs/NAME``. Blocks run while pages are
rendered, before mkdocs copies files, so the site never shows a picture that its commands did not just make.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

MADE = Path("build/docs")
TEST = re.compile(r"(?<=<code>)(?:[\w/]+\.py::)?test_\w+(?=</code>)")
SHOWN = re.compile(r"\bmade/([\w-]+\.(?:svg|png|html|json))")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Start with an empty folder of pictures; give ``math`` fences to MathML, which browsers draw by themselves."""
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir(parents=True)
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _formula})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Announce the pictures that pages show, so that links to them are checked as any other."""
    names = {name for page in files.documentation_pages() for name in SHOWN.findall(page.content_string)}
    for name in sorted(names):
        files.append(File.generated(config, f"made/{name}", abs_src_path=str((MADE / name).absolute())))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let names of tests break at their underscores, so that tables of them fit a phone."""
    del page, config, files
    return TEST.sub(lambda found: found[0].replace("_", "_<wbr>").replace("::", "::<wbr>"), html)


def _formula(source: str, *_: Any, **__: Any) -> str:
    return convert(source, display="block")
