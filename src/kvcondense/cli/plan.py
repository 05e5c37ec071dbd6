"""``kvcondense plan``: how many bytes of state and cache a model takes, what a token costs, how many requests fit."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kvcondense.capacity import Capacity, Line, capacity, compressors, exported
from kvcondense.cli import completion
from kvcondense.cli.output import JsonFile, Output
from kvcondense.config import PRESETS, ModelConfig
from kvcondense.errors import RangeError, UnsupportedError, require_int, require_known
from kvcondense.layout.addresses import RingLayout
from kvcondense.planning import Planner

Model = Annotated[
    str,
    typer.Option(help="Preset (demo, flash, pro, v41), or a model's config.json.", autocompletion=completion.models),
]
FormatPair = Annotated[
    str,
    typer.Option(
        metavar="MAIN[,INDEXER]",
        help="Cache formats (kvcondense info --formats).",
        autocompletion=completion.format_pair,
    ),
]
PageTokens = Annotated[int, typer.Option(help="Tokens per cache page.")]
EXAMPLE = "Example: kvcondense plan --model flash --context 1M --batch 64 --memory 80GiB --plot memory.png"
_BYTES = ((" GiB", 1 << 30), (" MiB", 1 << 20), (" KiB", 1 << 10))
_TOKENS = (("M", 1 << 20), ("k", 1 << 10))
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def plan(
    model: Model = "flash",
    context: Annotated[str, typer.Option(help="Tokens per request: 4096, 128k, 1M (k = 1024).")] = "1M",
    batch: Annotated[int, typer.Option(help="Requests.")] = 1,
    draft: Annotated[int, typer.Option(help="Tokens of a step that may be rejected.")] = 0,
    format: FormatPair = "fp8_model1,mxfp4_indexer",
    state: Annotated[
        str, typer.Option(help="ring, or online where windows do not overlap.", autocompletion=completion.states)
    ] = "ring",
    page_tokens: PageTokens = 256,
    memory: Annotated[str | None, typer.Option(help="How many requests fit in this: 80GiB, 141GB, bytes.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw memory against context.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print the bytes of state and cache of a model's compressors, by kind of layer and in total.

    State: a ring of the least rows, fp32, or the online form. Cache: whole pages. Compared with a cache that keeps one
    main row per token in the same layers. Sliding windows and weights are not counted.
    """
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UnsupportedError("--plot", "a file that ends in .png, .svg or .pdf", plot)
    require_int("--batch", batch, 1)
    config = model_of(model)
    main, _, indexer = format.partition(",")
    options: dict[str, Any] = {
        "format": main, "indexer_format": indexer or "mxfp4_indexer", "draft": draft, "state": state,
        "page_tokens": page_tokens,
    }  # fmt: skip
    tokens = _amount("--context", context, r"")
    room = None if memory is None else _amount("--memory", memory, r"(?:ib|b)?")
    found = capacity(config, tokens, **options)
    output = Output(json_file)
    _say(output, found, batch, room)
    seconds = _planning_time(config)
    output.say(f"planning a decode step of 1024 requests: {1e6 * seconds:.0f} us, once for all layers")
    if plot is not None:
        _draw(config, options, tokens, room, plot)
        output.say(f"drawn to {plot}")
    output.finish({
        "model": config.name, "context": tokens, "batch": batch,
        "compressors": [asdict(line) for line in found.lines],
        "totals": {"state": found.state, "cache": found.cache, "uncompressed": found.uncompressed,
                   "per_token": found.per_token},
        "fits": None if room is None else {"memory": room, "requests": found.fits(room)},
        "exported": [exported(config, spec) for spec in compressors(config)],
        "planning_seconds": seconds,
    })  # fmt: skip


def _say(output: Output, found: Capacity, batch: int, room: int | None) -> None:
    for line in found.lines:
        output.say(f"{line.compressor}: {line.layers} layers, ratio {line.ratio}, {line.format}")
        output.say(f"  state per layer  {_state(line, found.kind)}")
        output.say(f"  cache per layer  {line.rows} rows in {line.pages} pages: {_size(line.cache)}")
        output.say(
            f"  a token costs    {line.per_token:.1f} B in each layer, {line.layers * line.per_token:.0f} B in all"
        )
    output.say(f"a request of {found.context} tokens, all layers")
    output.say(f"  state         {_size(found.state)}")
    output.say(f"  cache         {_size(found.cache)}")
    less = f", {found.uncompressed / found.cache:.1f} times as much" if found.cache else ""
    output.say(f"  uncompressed  {_size(found.uncompressed)}{less}")
    output.say(f"  a token costs {found.per_token:.0f} B of cache")
    if batch > 1:
        output.say(f"{batch} requests: {_size(batch * (found.state + found.cache))}")
    if room is not None:
        output.say(f"in {_size(room)}: {found.fits(room)} such requests")


def _state(line: Line, kind: str) -> str:
    if kind == "online" and line.online is not None:
        return f"online: {_size(line.online)}, {line.ring / line.online:.0f} times less than a ring"
    return f"ring of {line.ring_rows} rows: {_size(line.ring)}"


def model_of(name: str) -> ModelConfig:
    """A preset, or what a config.json says; raises for any other name."""
    if Path(name).suffix == ".json" or Path(name).is_file():
        return ModelConfig.from_json(name)
    require_known("--model", name, PRESETS, "or name a model's config.json")
    return PRESETS[name]


def _amount(name: str, text: str, unit: str) -> int:
    """A number with k, M, G or T for powers of 1024 (of 1000 before a B, as disks and GPUs are sold)."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)([kmgt]?)({unit})", text.strip().lower())
    if match is None:
        raise RangeError(name, "a number, with k, M, G or T behind it if you like", repr(text))
    number, power, kind = match.groups()
    scale = 1000 ** "kmgt".index(power) * 1000 if power and kind == "b" else _UNITS[power]
    return int(float(number) * scale)


def _planning_time(config: ModelConfig, requests: int = 1024, runs: int = 101) -> float:
    """Median seconds to make a decode step's batch and plans on this machine: random positions, ring states."""
    specs = {(spec.ratio, spec.overlap): spec for spec in compressors(config)}.values()
    planner = Planner([(spec, RingLayout(requests, spec.required_ring_rows(0)), None) for spec in specs])
    starts = torch.randint(0, config.max_positions, (requests,), generator=torch.Generator().manual_seed(0))
    bounds, slots, times = torch.arange(requests + 1), torch.arange(requests), []
    for _ in range(runs):
        begun = time.perf_counter()
        planner.step(bounds, start_positions=starts, state_slots=slots, slot_mapping=slots)
        times.append(time.perf_counter() - begun)
    return sorted(times)[runs // 2]


def _draw(config: ModelConfig, options: dict[str, Any], tokens: int, room: int | None, path: Path) -> None:
    """Memory of a request against its context: cache by kind of layer, state, and the uncompressed cache."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    contexts = [c for c in (1 << k for k in range(10, 31)) if c <= config.max_positions] or [config.max_positions]
    found = [capacity(config, c, **options) for c in contexts]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.plot(contexts, [f.uncompressed for f in found], "--", color="grey", label="one row per token")
    axes.plot(contexts, [f.cache + f.state for f in found], color="black", lw=2, label="cache and state")
    for i, line in enumerate(found[-1].lines):
        values = [f.lines[i].layers * f.lines[i].cache for f in found]
        axes.plot(contexts, values, marker=".", label=f"cache, {line.layers} x {line.compressor} ({line.format})")
    axes.plot(contexts, [f.state for f in found], ":", color="tab:red", label=f"state, {options['state']}")
    if room is not None:
        axes.axhline(room, color="tab:red", lw=0.8, label=f"{_size(room)}")
    axes.axvline(tokens, color="lightgrey", lw=0.8, zorder=0)
    axes.set(xlabel="tokens of context", ylabel="bytes per request", title=f"{config.name}: compressed KV cache")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis, units in ((axes.xaxis, _TOKENS), (axes.yaxis, _BYTES)):
        axis.set_major_formatter(lambda value, _, units=units: _short(int(value), units))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short(value: int, units: Sequence[tuple[str, int]]) -> str:
    """A power of two as people say it: 128k tokens, 4 MiB."""
    return next((f"{value // scale}{unit}" for unit, scale in units if value >= scale), str(value))


def _size(nbytes: int) -> str:
    near = next((f" ({nbytes / scale:.2f}{unit})" for unit, scale in _BYTES if nbytes >= scale), "")
    return f"{nbytes} B{near}"
