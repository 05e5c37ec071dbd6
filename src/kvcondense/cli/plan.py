"""``kvcondense plan``: how many bytes of state and cache a model takes, and what exporting a request costs."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer

from kvcondense.cli.output import JsonFile, Output
from kvcondense.config import PRESETS, ModelConfig
from kvcondense.errors import RangeError, UnsupportedError, require_int
from kvcondense.formats import CacheFormat, get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import RingLayout
from kvcondense.spec import CompressorSpec

EXAMPLE = "Example: kvcondense plan --model flash --context 1048576 --batch 8 --state"
_STATE_BYTES = 4
_PER_LINE = 8


def plan(
    model: Annotated[str, typer.Option(help="Preset: demo, flash, pro or v41.")] = "flash",
    context: Annotated[int, typer.Option(help="Tokens per request.")] = 1 << 20,
    batch: Annotated[int, typer.Option(help="Requests.")] = 1,
    draft: Annotated[int, typer.Option(help="Tokens of a step that may be rejected.")] = 0,
    format: Annotated[str, typer.Option(help="Cache format of the main rows.")] = "fp8_model1",
    indexer_format: Annotated[str, typer.Option(help="Cache format of the indexer's rows.")] = "mxfp4_indexer",
    page_tokens: Annotated[int, typer.Option(help="Tokens per cache page.")] = 256,
    state: Annotated[bool, typer.Option("--state", help="Also: bytes of an export at every position.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Print the bytes of state and cache of a model's compressors, for all layers of a kind and in total.

    State: a ring of the least rows, fp32, and, where windows do not overlap, the online form instead. Cache: whole
    pages for ``context`` tokens.
    """
    if model not in PRESETS:
        raise UnsupportedError("--model", f"one of {', '.join(PRESETS)}", repr(model))
    for name, value, low in (("--context", context, 0), ("--batch", batch, 1), ("--draft", draft, 0)):
        require_int(name, value, low)
    require_int("--page-tokens", page_tokens, 1)
    config = PRESETS[model]
    if context > config.max_positions:
        raise RangeError("--context", f"at most {config.max_positions} ({model})", context)
    output = Output(json_file)
    lines = []
    for spec, layers in compressors(config).items():
        fmt = get_format(indexer_format if spec.head_dim == config.index_head_dim else format)
        lines.append(sizes(config, spec, layers, fmt, context, draft, page_tokens))
    for line in lines:
        output.say(f"{line['compressor']}: {line['layers']} layers, ratio {line['ratio']}, {line['format']}")
        output.say(f"  state per layer  ring of {line['ring_rows']} rows: {_size(line['ring'])}")
        if line["online"] is not None:
            output.say(
                f"                   online: {_size(line['online'])}, {line['ring'] / line['online']:.0f} times less"
            )
        output.say(f"  cache per layer  {line['rows']} rows in {line['pages']} pages: {_size(line['cache'])}")
    totals = {
        "ring": sum(x["layers"] * x["ring"] for x in lines),
        "online": sum(x["layers"] * (x["ring"] if x["online"] is None else x["online"]) for x in lines),
        "cache": sum(x["layers"] * x["cache"] for x in lines),
    }
    output.say(f"per request, all layers, {context} tokens, {draft} drafts")
    output.say(f"  state, rings               {_size(totals['ring'])}")
    output.say(f"  state, online if possible  {_size(totals['online'])}")
    output.say(f"  cache                      {_size(totals['cache'])}")
    if batch > 1:
        ring, cache = (_size(batch * totals[key]) for key in ("ring", "cache"))
        output.say(f"{batch} requests: state {ring} in rings, cache {cache}")
    report: dict[str, Any] = {"model": model, "context": context, "batch": batch}
    report |= {"compressors": lines, "totals": totals}
    seconds = _planning_time(config)
    output.say(f"planning a step of 1024 requests: {1e6 * seconds:.0f} us (median, once for all layers of a ratio)")
    report["planning_seconds"] = seconds
    if state:
        report["exported"] = [_exported(output, config, spec) for spec in compressors(config)]
    output.finish(report)


def compressors(config: ModelConfig) -> dict[CompressorSpec, int]:
    """Every kind of compressor in a model, and the number of layers that own one."""
    specs: dict[CompressorSpec, int] = {}
    for layer in config.compressor_layers:
        for part in CompressorSpec.parts_of_layer(config, layer):
            spec = CompressorSpec.for_layer(config, layer, part)
            specs[spec] = specs.get(spec, 0) + 1
    return specs


def kind_of(config: ModelConfig, spec: CompressorSpec) -> str:
    """CSA, indexer or HCA; V4.1's have their ratio for a name."""
    if config.generation != "v4":
        return f"ratio {spec.ratio}"
    return ("indexer" if spec.rotate else "CSA") if spec.overlap else "HCA"


def sizes(
    config: ModelConfig,
    spec: CompressorSpec,
    layers: int,
    fmt: CacheFormat,
    context: int,
    draft: int,
    page_tokens: int,
) -> dict[str, Any]:
    """Bytes of one compressor of one request: ring, online state (None with overlap), cache pages."""
    fmt.check(spec.head_dim, spec.rope_dim)
    ring_rows = spec.required_ring_rows(draft)
    rows, page_rows = spec.visible_rows(context), max(1, page_tokens // spec.ratio)
    pages = -(-rows // page_rows)
    outside = 4 * page_rows if fmt.scales_outside and not fmt.tensor_scale else 0
    row = _STATE_BYTES * spec.state_dim
    return {
        "compressor": f"{config.name} {kind_of(config, spec)}",
        "layers": layers,
        "ratio": spec.ratio,
        "format": fmt.name,
        "ring_rows": ring_rows,
        "ring": ring_rows * row,
        "online": None if spec.overlap else 3 * _STATE_BYTES * spec.head_dim + draft * row,
        "rows": rows,
        "pages": pages,
        "cache": pages * (fmt.page_bytes(spec.head_dim, page_rows) + outside),
    }


def _planning_time(config: ModelConfig, requests: int = 1024, runs: int = 21) -> float:
    """Median seconds to plan a decode step on this machine: random positions, ring state, block table."""
    spec = next(iter(compressors(config)))
    gen = torch.Generator().manual_seed(0)
    pages = config.max_positions // spec.ratio // 64 + 1
    table = torch.randint(0, 1 << 20, (1, pages), generator=gen).expand(requests, pages)
    starts = torch.randint(0, config.max_positions, (requests,), generator=gen)
    layout = RingLayout(requests, spec.required_ring_rows(0))
    times = []
    for _ in range(runs):
        batch = RaggedBatch.build(
            torch.arange(requests + 1), start_positions=starts, state_slots=torch.arange(requests), block_table=table
        )
        begun = time.perf_counter()
        Plan.build(spec, batch, state_layout=layout, page_rows=64)
        times.append(time.perf_counter() - begun)
    return sorted(times)[runs // 2]


def _exported(output: Output, config: ModelConfig, spec: CompressorSpec) -> dict[str, Any]:
    """Bytes of rows in an exported request, at every position: they repeat with the ratio after the first window."""
    row, r = _STATE_BYTES * spec.state_dim, spec.ratio
    first = [spec.seed_rows(p) * row for p in range(r)]
    later = [spec.seed_rows(r + p) * row for p in range(r)]
    name = f"{config.name} {kind_of(config, spec)}"
    output.say(f"exported state of {name}, ratio {r}: {row} bytes a row, and a header")
    groups = [("position", 0, first), (f"position mod {r}, from {r} on", 0, later)] if first != later else []
    for title, offset, values in groups or [(f"position mod {r}", 0, later)]:
        output.say(f"  {title}")
        for start in range(0, len(values), _PER_LINE):
            part = " ".join(f"{v:>7}" for v in values[start : start + _PER_LINE])
            output.say(f"    {offset + start:>4}: {part}")
    return {"compressor": name, "ratio": r, "row": row, "first_window": first, "later": later}


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= scale:
            return f"{nbytes} B ({nbytes / scale:.2f} {unit})"
    return f"{nbytes} B"
