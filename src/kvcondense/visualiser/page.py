"""The page itself: one HTML file with its style, its script and the traces it starts with, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from kvcondense.config import ModelConfig
from kvcondense.markup import json_block, policy
from kvcondense.spec import CompressorSpec
from kvcondense.visualiser.trace import Scenario, trace


def page(traces: Sequence[dict[str, Any]] = ()) -> str:
    """The page with these traces (default: ``built_in``), as the text of an HTML file.

    Strings of a trace are data: none of them becomes markup or runs, and the page's policy would not let it.
    """
    here = files("kvcondense.visualiser")
    style, script, frame = ((here / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    parts = {
        "<!--POLICY-->": policy(styles=[style], scripts=[script]),
        "/*STYLE*/": style,
        "/*SCRIPT*/": script,
        "[/*TRACES*/]": json_block(list(traces) or built_in()),
    }
    # One pass: what is put in is not searched for marks.
    text, found = re.subn("|".join(map(re.escape, parts)), lambda mark: parts[mark[0]], frame)
    assert found == len(parts)
    return text


def built_in() -> list[dict[str, Any]]:
    """Traces for every combination of the page's controls: compressor, ring, chunk, drafts."""
    flash = ModelConfig.FLASH
    kinds = {
        4: (CompressorSpec.csa(flash), 22, (22, 5, 1)),
        128: (CompressorSpec.hca(flash), 250, (250, 100)),
        2: (CompressorSpec.for_layer(ModelConfig.V41_FLASH, 2), 11, (11, 3, 1)),
    }
    found = []
    for spec, prompt, chunks in kinds.values():
        for chunk in chunks:
            for drafts in (0, 3, 7):
                least = spec.required_ring_rows(drafts)
                for rows in (least, least + 5):
                    found.append(trace(Scenario(spec, prompt, chunk, drafts, steps=12, ring_rows=rows)))
                found.append(trace(Scenario(spec, prompt, chunk, drafts, steps=12, state_page=8)))
    return found
