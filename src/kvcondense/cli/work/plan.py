"""The work of ``kvcondense plan``: what a model's compressors take, in lines, JSON and a picture."""

from __future__ import annotations

import re
import time as clock
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from kvcondense import files
from kvcondense.capacity import Capacity, Line, capacity, compressors, exported, kind_of
from kvcondense.cli.output import Output
from kvcondense.config import PRESETS, ModelConfig
from kvcondense.errors import RangeError
from kvcondense.layout.addresses import RingLayout
from kvcondense.planning import Planner
from kvcondense.spec import CompressorSpec

NOT_COUNTED = "weights, sliding windows of recent tokens, activations"
_BYTES = ((" GiB", 1 << 30), (" MiB", 1 << 20), (" KiB", 1 << 10))
_TOKENS = (("M", 1 << 20), ("k", 1 << 10))
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def run(
    output: Output,
    *,
    model: str,
    context: str,
    batch: int,
    draft: int,
    format: str,
    state: str,
    page_tokens: int,
    memory: str | None,
    time: bool,
    plot: Path | None,
) -> None:
    """Count, and say what is not counted."""
    config = model_of(model)
    main, _, indexer = format.partition(",")
    options: dict[str, Any] = {
        "format": main, "indexer_format": indexer or "mxfp4_indexer", "draft": draft, "state": state,
        "page_tokens": page_tokens,
    }  # fmt: skip
    tokens = _amount("--context", context, r"")
    room = None if memory is None else _amount("--memory", memory, r"(?:ib|b)?")
    found = capacity(config, tokens, **options)
    _say(output, found, batch, room)
    seconds = _planning_time(config) if time else None
    if seconds is not None:
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
        "main_layers": config.num_hidden_layers,
        "mtp_compressors": _past(config),
        "not_counted": NOT_COUNTED,
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
        output.say(f"in {_size(room)}: {found.fits(room)} such requests, of what is counted here")
    output.say(f"not counted: {NOT_COUNTED}")
    for kind, layers in _past(found.config).items():
        which = f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
        main = f"past the {found.config.num_hidden_layers} main ones"
        output.say(f"not counted: {kind} of {which}, {main} (MTP, as far as the checkpoint has them)")


def _past(config: ModelConfig) -> dict[str, list[int]]:
    """Kind of compressor -> layers past the main ones that the config gives one."""
    found: dict[str, list[int]] = {}
    for layer in config.mtp_compressor_layers:
        for part in CompressorSpec.parts_of_layer(config, layer):
            found.setdefault(kind_of(config, CompressorSpec.for_layer(config, layer, part)), []).append(layer)
    return found


def _state(line: Line, kind: str) -> str:
    if kind == "online" and line.online is not None:
        return f"online: {_size(line.online)}, {line.ring / line.online:.0f} times less than a ring"
    return f"ring of {line.ring_rows} rows: {_size(line.ring)}"


def model_of(name: str) -> ModelConfig:
    """A preset, or what a config.json, or that of a folder, says."""
    if name in PRESETS:
        return PRESETS[name]
    return ModelConfig.from_json(name)


def _amount(name: str, text: str, unit: str) -> int:
    """A number with k, M, G or T for powers of 1024 (of 1000 before a B, as disks and GPUs are sold)."""
    match = re.fullmatch(rf"(\d{{1,30}}(?:\.\d{{1,30}})?)([kmgt]?)({unit})", text.strip().lower(), re.ASCII)
    if match is None:
        raise RangeError(name, "a number of at most 30 digits, with k, M, G or T behind it if you like", repr(text))
    number, power, kind = match.groups()
    scale = 1000 ** "kmgt".index(power) * 1000 if power and kind == "b" else _UNITS[power]
    return int(Fraction(number) * scale)


def _planning_time(config: ModelConfig, requests: int = 1024, runs: int = 101) -> float:
    """Median seconds to make a decode step's batch and plans on this machine: random positions, ring states."""
    specs = {(spec.ratio, spec.overlap): spec for spec in compressors(config)}.values()
    planner = Planner([(spec, RingLayout(requests, spec.required_ring_rows(0)), None) for spec in specs])
    starts = torch.randint(0, config.max_positions, (requests,), generator=torch.Generator().manual_seed(0))
    bounds, slots, times = torch.arange(requests + 1), torch.arange(requests), []
    for _ in range(runs):
        begun = clock.perf_counter()
        planner.step(bounds, start_positions=starts, state_slots=slots, slot_mapping=slots)
        times.append(clock.perf_counter() - begun)
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
    axes.legend(fontsize=10)
    with files.replacing(path) as made:
        figure.savefig(made, dpi=130)
    plt.close(figure)


def _short(value: int, units: Sequence[tuple[str, int]]) -> str:
    """A power of two as people say it: 128k tokens, 4 MiB."""
    return next((f"{value // scale}{unit}" for unit, scale in units if value >= scale), str(value))


def _size(nbytes: int) -> str:
    near = next((f" ({nbytes / scale:.2f}{unit})" for unit, scale in _BYTES if nbytes >= scale), "")
    return f"{nbytes} B{near}"
