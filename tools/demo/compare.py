"""The demo's comparisons: the command's rows beside transformers', its files beside each other."""

from __future__ import annotations

import contextlib
import filecmp
import io
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM

import kvcondense
from demo.model import CSA, NAMES, PARTS, Entered, make_model, read_text, their_rows
from demo.report import Report
from kvcondense import CompressorSpec, CompressorWeights, RaggedBatch, RopeTable
from kvcondense.cli import app
from kvcondense.formats import get_format
from kvcondense.numerics import ulp_distance
from kvcondense.spec import Rounding

FP32_WORST, BF16_WORST = 1e-5, 0.063
"""How far rows may be from transformers': absolute; of a row's RMS."""
ENGINE = {"main": "fp8_model1", "indexer": "mxfp4_indexer"}
"""The formats in which an engine keeps rows."""


@dataclass
class Found:
    """What the picture shows. Distances [rows, channels] by name, in the units of FP32_WORST and BF16_WORST; rows: the
    CSA rows [E, 512] bf16; counts: rows of each compressor."""

    fp32: dict[str, torch.Tensor]
    bf16: dict[str, torch.Tensor]
    rows: torch.Tensor
    counts: dict[tuple[int, str], int]

    def bytes(self, layer: int) -> int:
        """Of all rows of a layer, as an engine keeps them."""
        sizes = {"main": 512, "indexer": 128}
        return sum(get_format(ENGINE[p]).row_bytes(sizes[p]) * n for (i, p), n in self.counts.items() if i == layer)


def compress(folder: Path, layer: int, out: str, *options: str) -> Path:
    """Run the command as a user would, on the checkpoint and the hidden states in ``folder``."""
    inputs = ("--checkpoint", folder / "model", "--layer", layer, "--hidden", folder / "hidden.safetensors")
    return command("compress", *inputs, "--out", folder / out, *options)


def command(*words: object) -> Path:
    """Run ``kvcondense`` with these words, ``--resume`` in a new process; returns the file after --out."""
    line = [str(word) for word in words]
    if "--resume" in line:
        subprocess.run([sys.executable, "-m", "kvcondense", *line], check=True, stdout=subprocess.DEVNULL)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            status = app(line, standalone_mode=False)
        if status:
            raise SystemExit(status)
    return Path(line[line.index("--out") + 1])


def exact_rows(folder: Path, layer: int, part: str) -> torch.Tensor:
    """The same rows in fp64 without any rounding, from the same weights and hidden states."""
    config = kvcondense.ModelConfig.from_json(folder / "model" / "config.json")
    spec = CompressorSpec.for_layer(config, layer, part, rounding=Rounding.FUSED)
    spec = replace(spec, rotate=False)
    weights = CompressorWeights.load(folder / "model", spec, layer, hidden_size=config.hidden_size, part=part)
    assert weights.w is not None
    weights = replace(weights, w=weights.w.double())
    x = load_file(folder / "hidden.safetensors")[f"layers.{layer}.hidden_states"].double()
    batch = RaggedBatch.build([0, x.shape[0]], start_positions=[0])
    return kvcondense.compress(spec, x, weights, RopeTable.build(config, x.shape[0]), batch).values


def compare_fp32(report: Report, name: str, got: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """fp32 throughout."""
    error = (got - theirs).abs()
    worst = float(error.max())
    holds = got.shape == theirs.shape and worst <= FP32_WORST
    report.check(f"{name}, fp32", holds, f"{got.shape[0]} rows, worst {worst:.1e} (allowed {FP32_WORST:.0e})")
    return error


def compare_bf16(
    report: Report, name: str, got: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor
) -> torch.Tensor:
    """bf16: near transformers, and no further from fp64 than it is (it pools in bf16)."""
    ours, other = got.double(), theirs.double()
    delta = (ours - other).abs()
    rms = other.square().mean(-1, keepdim=True).sqrt()
    near = (delta <= BF16_WORST * rms) | (ulp_distance(got, theirs) <= 2)
    worst, equal = float((delta / rms).max()), float((got == theirs).double().mean())
    detail = f"worst {worst:.3f} of a row's RMS (allowed {BF16_WORST}, or two bf16 steps), {equal:.0%} bit-equal"
    report.check(f"{name}, bf16", got.shape == theirs.shape and bool(near.all()), detail)
    mine, peer = (float(((t - exact).square().mean() / exact.square().mean()).sqrt()) for t in (ours, other))
    report.check(f"{name}, bf16 and fp64", mine <= peer, f"off by {mine:.1e}, transformers by {peer:.1e} (relative)")
    return delta / rms


def compare_rows(out: Path, report: Report) -> Found:
    """The command's rows beside transformers', in fp32 and in bf16; leaves ``out``/bf16 for what follows."""
    report.step("making a model")
    found, entered = Found({}, {}, torch.empty(0), {}), None
    make_model().save_pretrained(out / "fp32" / "model")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        folder = out / name
        model: Any = DeepseekV4ForCausalLM.from_pretrained(out / "fp32" / "model", dtype=dtype).eval()
        model.save_pretrained(folder / "model")
        if entered is None:
            entered = read_text(model, report.step)
        _compare_dtype(folder, model, entered, found, report)
    return found


def _compare_dtype(folder: Path, model: Any, entered: Entered, found: Found, report: Report) -> None:
    """One dtype's rows."""
    name, fp32 = folder.name, model.dtype is torch.float32
    hidden = {f"layers.{layer}.hidden_states": x[0].to(model.dtype) for layer, (x, _) in entered.items()}
    save_file(hidden, folder / "hidden.safetensors", metadata={"first_position": "0"})
    report.step(f"rows in {name}: transformers")
    theirs = their_rows(model, entered)
    options = ("--rounding", "fused", "--format", "fp32") if fp32 else ()
    for layer, parts in PARTS.items():
        report.step(f"rows in {name}: kvcondense, layer {layer + 1}")
        got = load_file(compress(folder, layer, f"layer{layer}.safetensors", "--no-rotate", *options))
        for part in parts:
            label, rows = NAMES[layer, part], got[f"{part}.rows"]
            found.counts[layer, part] = rows.shape[0]
            if fp32:
                found.fp32[label] = compare_fp32(report, label, rows, theirs[layer, part])
                continue
            exact = exact_rows(folder, layer, part)
            found.bf16[label] = compare_bf16(report, label, rows, theirs[layer, part], exact)
            if (layer, part) == (CSA, "main"):
                found.rows = rows


def compare_files(folder: Path, report: Report) -> None:
    """Cache files made in several ways are equal byte for byte."""
    for layer in PARTS:
        name = NAMES[layer, "main"]
        report.step(f"{name} files: in one go, in chunks, interrupted and resumed")
        whole = compress(folder, layer, f"layer{layer}-whole.safetensors")
        chunked = compress(folder, layer, f"layer{layer}-chunked.safetensors", "--chunk", "100")
        for limit in ("1777", "130"):
            again = ("--resume",) if limit == "130" else ()
            compress(folder, layer, f"layer{layer}-resumed.safetensors", "--limit", limit, "--chunk", "333", *again)
        resumed = compress(folder, layer, f"layer{layer}-resumed.safetensors", "--resume")
        same = all(filecmp.cmp(whole, other, shallow=False) for other in (chunked, resumed))
        report.check(f"{name} file, cut in any way", same, "in one go, in chunks, interrupted and resumed: equal bytes")
        options = [f"--format={ENGINE['main']}", *([f"--indexer-format={ENGINE['indexer']}"] if layer == CSA else [])]
        report.step(f"{name} files as engines keep them: compressed and converted")
        direct = compress(folder, layer, f"layer{layer}-engine.safetensors", *options)
        converted = command("convert", whole, "--out", folder / f"layer{layer}-converted.safetensors", *options)
        same = filecmp.cmp(direct, converted, shallow=False)
        formats = " and ".join(option.partition("=")[2] for option in options)
        report.check(f"{name} file in {formats}", same, "compressed directly or converted from bf16: equal bytes")
