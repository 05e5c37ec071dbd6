"""The work of ``kvcondense explain``: the steps of a request as its plans say them."""

from __future__ import annotations

import json
from pathlib import Path

from kvcondense import files
from kvcondense.capacity import compressors, kind_of
from kvcondense.cli.output import Output
from kvcondense.config import PRESETS
from kvcondense.errors import RangeError, require_known
from kvcondense.visualiser import Scenario, page, trace


def run(
    output: Output,
    *,
    model: str,
    kind: str,
    prompt: int,
    chunk: int,
    drafts: int,
    steps: int,
    ring_rows: int | None,
    state_page: int | None,
    page_rows: int,
    format: str | None,
    trace_file: Path | None,
    page_file: Path | None,
    tour: Path | None,
) -> None:
    """Say what each step does, and write the files that were asked for."""
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
        files.write(trace_file, json.dumps(found) + "\n")
        output.say(f"trace: {trace_file}")
    for file, traces in ((page_file, [found]), (tour, [])):
        if file is not None:
            files.write(file, page(traces))
            output.say(f"page: {file}")
    output.finish(found)


def _range(pairs: list[list[int]]) -> str:
    if not pairs:
        return "nothing"
    return f"{len(pairs)} state rows (positions {pairs[0][0]}..{pairs[-1][0]})"
