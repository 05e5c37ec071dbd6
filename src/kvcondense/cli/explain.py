"""``kvcondense explain``: what each step of a request reads, keeps, emits and writes, as lines, a trace or a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvcondense.capacity import compressors, kind_of
from kvcondense.cli import completion
from kvcondense.cli.output import JsonFile, Output
from kvcondense.config import PRESETS
from kvcondense.errors import RangeError, require_known
from kvcondense.visualiser import Scenario, page, trace

EXAMPLE = "Example: kvcondense explain --kind csa --prompt 22 --chunk 5 --drafts 3 --trace trace.json --page trace.html"


def explain(
    model: Annotated[
        str, typer.Option(help="Preset: demo, flash, pro or v41.", autocompletion=completion.models)
    ] = "flash",
    kind: Annotated[
        str, typer.Option(help="csa, hca or indexer; of v41: 'ratio 2' or 'ratio 1'.", autocompletion=completion.kinds)
    ] = "csa",
    prompt: Annotated[int, typer.Option(help="Tokens before the first decoded one.")] = 22,
    chunk: Annotated[int, typer.Option(help="Tokens of a prefill step.")] = 8,
    drafts: Annotated[int, typer.Option(help="Drafts of a decode step; step i accepts i mod (drafts + 1).")] = 3,
    steps: Annotated[int, typer.Option(help="Decode steps.")] = 6,
    ring_rows: Annotated[int | None, typer.Option(help="Rows of the state's ring (default: the least).")] = None,
    state_page: Annotated[int | None, typer.Option(help="Rows of a state page, instead of a ring.")] = None,
    page_rows: Annotated[int, typer.Option(help="Rows of a cache page.")] = 4,
    format: Annotated[
        str | None, typer.Option(help="Cache format (kvcondense info --formats).", autocompletion=completion.formats)
    ] = None,
    trace_file: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Write the trace as JSON.")] = None,
    page_file: Annotated[
        Path | None, typer.Option("--page", metavar="FILE.html", help="Write the page that plays it.")
    ] = None,
    tour: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write the page with its own traces.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Say, step by step, what the plan of a request does: one line each, and, if asked for, a page that plays it.

    The trace holds nothing but the numbers of the library's plans.
    """
    output = Output(json_file)
    require_known("--model", model, PRESETS, error=RangeError)
    config = PRESETS[model]
    specs = {kind_of(config, spec).lower(): spec for spec in compressors(config)}
    require_known("--kind", kind.lower(), specs, f"these are {model}'s", RangeError)
    spec = specs[kind.lower()]
    if format is None:
        format = "mxfp4_indexer" if spec.head_dim == config.index_head_dim else "fp8_model1"
    found = trace(Scenario(spec, prompt, chunk, drafts, steps, ring_rows, state_page, page_rows, format))
    for number, step in enumerate(found["steps"], 1):
        ends = step["start"] + step["tokens"] - 1
        rejected = step["drafts"] - step["accepted"]
        output.say(f"step {number}: positions {step['start']}..{ends}" + (f", {rejected} rejected" if rejected else ""))
        output.say(f"  reads {_range(step['reads'])}; keeps {_range(step['keeps'])}")
        for index, slot, rope in step["windows"]:
            output.say(f"  window {index} -> cache row {slot}, RoPE at {rope}")
    if trace_file is not None:
        trace_file.write_text(json.dumps(found) + "\n", encoding="utf-8")
        output.say(f"trace: {trace_file}")
    for file, traces in ((page_file, [found]), (tour, [])):
        if file is not None:
            file.write_text(page(traces), encoding="utf-8")
            output.say(f"page: {file}")
    output.finish(found)


def _range(pairs: list[list[int]]) -> str:
    if not pairs:
        return "nothing"
    return f"{len(pairs)} state rows (positions {pairs[0][0]}..{pairs[-1][0]})"
