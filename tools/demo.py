"""The main job on real input: a small DeepSeek-V4 reads a text, and kvcondense compresses what its layers saw.

Makes a model with transformers (real head_dim 512, RoPE 64, ratios 4 and 128, an indexer; narrow everywhere else),
saves it, runs a text through it in fp32 and keeps what enters each compressor. transformers' compressors turn that into
rows in fp32 and in bf16, and so does the ``kvcondense compress`` command, from the saved checkpoint and hidden states;
the rows are compared. Then the same in one go, in chunks, and interrupted and resumed. Last, the cache as an engine
holds it, in FP8 and MXFP4, compressed directly and converted from bf16.

Run: make demo, or python tools/demo.py --out build/demo
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.utils import logging

import kvcondense
from kvcondense import CompressorSpec, CompressorWeights, RaggedBatch, RopeTable
from kvcondense.backends.cpu import native
from kvcondense.cli import app
from kvcondense.numerics import ulp_distance
from kvcondense.spec import Rounding

TEXT = Path(__file__).parent.parent / "LICENSE"
TOKENS = 2999  # one byte a token; no multiple of 4 or 128, so that windows stay open at the end
CSA, HCA = 1, 2
PARTS = {CSA: ("main", "indexer"), HCA: ("main",)}


def make_model() -> Any:
    """A random model whose compressors have something to do: gates, biases and gammas of realistic spread."""
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        num_experts_per_tok=2,
        n_routed_experts=4,
        mlp_layer_types=["moe"] * 3,
        index_n_heads=4,
        index_topk=64,
        hc_mult=2,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        max_position_embeddings=1 << 20,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in (CSA, HCA):
            main = model.model.layers[layer].self_attn.compressor
            for c in [main, *([main.indexer] if layer == CSA else [])]:
                c.gate_proj.weight.normal_(std=1.5 / 512**0.5)
                c.kv_proj.weight.normal_(std=1.5 / 512**0.5)
                c.position_bias.normal_(std=0.12)
                c.kv_norm.weight.normal_(mean=0.97, std=0.19)
    return model


class Report:
    """Lines of the comparison, and whether all of them hold; below them, on a terminal, what is being done."""

    def __init__(self) -> None:
        self.ok = True
        self.lines: list[dict[str, object]] = []
        console = Console(highlight=False, markup=False, soft_wrap=True)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("")

    def say(self, line: str) -> None:
        """Print a line."""
        self.progress.console.print(line)

    def step(self, what: str) -> None:
        """What is done next, for more than a moment: the line below, or one more line where there is no terminal."""
        self.progress.update(self.task, description=what)
        if self.progress.disable:
            print(f"  ...   {what}", flush=True)

    def check(self, what: str, holds: bool, detail: str) -> None:
        """Print a comparison."""
        self.ok &= holds
        self.lines.append({"what": what, "holds": holds, "detail": detail})
        self.say(f"  {'PASS' if holds else 'FAIL'}  {what:<34} {detail}")


def read_text(model: Any, report: Report) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Prefill the text; what entered each compressor: hidden states [1, T, D], and the query's residual."""
    tokens = torch.tensor([list(TEXT.read_bytes()[:TOKENS])])
    entered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: int, args: tuple) -> None:
        entered[layer] = args[0].detach(), args[1].detach()

    layers = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: report.step(f"reading in fp32, layer {i + 1} of {len(layers)}"))
        for i, layer in enumerate(layers)
    ]
    for i in PARTS:
        compressor = layers[i].self_attn.compressor
        hooks.append(compressor.register_forward_pre_hook(lambda _, args, i=i: keep(i, args)))
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return entered


@torch.no_grad()
def their_rows(
    model: Any, entered: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> dict[tuple[int, str], torch.Tensor]:
    """Rows that transformers' compressors make of what entered them, in their own dtype.

    The rest of a model in bf16 is left out: its attention takes ten minutes where torch emulates bf16 products.
    """
    cache: Any = DynamicCache(config=model.config)
    for i, (x, residual) in entered.items():
        x, residual = x.to(model.dtype), residual.to(model.dtype)
        model.model.layers[i].self_attn.compressor(x, residual, torch.arange(x.shape[1])[None], cache, i)
    names = {"main": "compressor", "indexer": "indexer"}
    return {(i, part): cache.layers[i].compressed_kv[names[part]][0] for i in PARTS for part in PARTS[i]}


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
    """fp32 throughout: 1e-5."""
    error = (got - theirs).abs()
    worst = float(error.max())
    report.check(f"fp32 {name} {list(got.shape)}", got.shape == theirs.shape and worst <= 1e-5, f"worst {worst:.1e}")
    return error


def compare_bf16(
    report: Report, name: str, got: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor
) -> torch.Tensor:
    """bf16: 0.063 of the row's RMS or two bf16 steps, and no further from fp64 than transformers (it pools in bf16)."""
    ours, other = got.double(), theirs.double()
    delta = (ours - other).abs()
    rms = other.square().mean(-1, keepdim=True).sqrt()
    near = (delta <= 0.063 * rms) | (ulp_distance(got, theirs) <= 2)
    equal = float((got == theirs).double().mean())
    report.check(
        f"bf16 {name} {list(got.shape)}",
        got.shape == theirs.shape and bool(near.all()),
        f"worst {float((delta / rms).max()):.3f} of the row RMS, {equal:.0%} of the elements bit-equal",
    )
    mine, peer = (float(((t - exact).square().mean() / exact.square().mean()).sqrt()) for t in (ours, other))
    report.check(
        f"bf16 {name} against fp64", mine <= peer, f"kvcondense {mine:.2e}, transformers {peer:.2e} (relative)"
    )
    return delta / rms


def draw(rows: torch.Tensor, errors: dict[str, torch.Tensor], file: Path) -> None:
    """A picture of the cache and of the distances to transformers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(3, 2), layout="constrained")
    image = left.imshow(rows[:96].float(), aspect="auto", cmap="RdBu", vmin=-3, vmax=3, interpolation="nearest")
    left.set(title="CSA cache: first 96 rows, bf16 (RoPE from channel 448)", xlabel="channel", ylabel="row = 4 tokens")
    figure.colorbar(image, ax=left)
    for name, error in errors.items():
        values = error.flatten().double().clamp(min=1e-9).log10()
        right.hist(values.numpy(), bins=80, range=(-9, 0), histtype="step", label=name)
    right.set(title="distance to transformers", xlabel="log10 (fp32: absolute; bf16: of the row RMS)", yscale="log")
    figure.legend(loc="outside lower center", ncols=6)
    figure.savefig(file, dpi=110)


def compare_rows(out: Path, report: Report) -> None:
    """The command's rows beside transformers', in fp32 and in bf16; leaves ``out``/bf16 for what follows."""
    report.say(f"A DeepSeek-V4 of 3 layers reads {TOKENS} bytes of {TEXT.name}")
    errors: dict[str, torch.Tensor] = {}
    picture = torch.empty(0)
    entered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    make_model().save_pretrained(out / "fp32" / "model")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        folder = out / name
        model: Any = DeepseekV4ForCausalLM.from_pretrained(out / "fp32" / "model", dtype=dtype).eval()
        model.save_pretrained(folder / "model")
        entered = entered or read_text(model, report)
        hidden = {f"layers.{layer}.hidden_states": x[0].to(dtype) for layer, (x, _) in entered.items()}
        save_file(hidden, folder / "hidden.safetensors", metadata={"first_position": "0"})
        report.step(f"compressors in {name}: transformers, kvcondense" + (", fp64" if name == "bf16" else ""))
        theirs = their_rows(model, entered)
        options = ("--rounding", "fused", "--format", "fp32") if name == "fp32" else ()
        for layer, parts in PARTS.items():
            got = load_file(compress(folder, layer, f"layer{layer}.safetensors", "--no-rotate", *options))
            for part in parts:
                label = f"{'CSA' if layer == CSA else 'HCA'} {part}"
                rows = got[f"{part}.rows"]
                if name == "fp32":
                    error = compare_fp32(report, label, rows, theirs[layer, part])
                else:
                    error = compare_bf16(report, label, rows, theirs[layer, part], exact_rows(folder, layer, part))
                errors[f"{name} {label}"] = error
            if name == "bf16" and layer == CSA:
                picture = got["main.rows"]
    draw(picture, errors, out / "demo.png")


def compare_files(folder: Path, report: Report) -> None:
    """Cache files made in several ways are equal byte for byte."""
    report.say("bf16, as a cache holds it (indexer rows Hadamard-rotated)")
    for layer in PARTS:
        report.step(f"layer {layer}: in one go, in chunks, interrupted and resumed")
        whole = compress(folder, layer, f"layer{layer}-whole.safetensors")
        chunked = compress(folder, layer, f"layer{layer}-chunked.safetensors", "--chunk", "100")
        for limit in ("1777", "130"):
            again = ("--resume",) if limit == "130" else ()
            compress(folder, layer, f"layer{layer}-resumed.safetensors", "--limit", limit, "--chunk", "333", *again)
        resumed = compress(folder, layer, f"layer{layer}-resumed.safetensors", "--resume")
        same = all(filecmp.cmp(whole, other, shallow=False) for other in (chunked, resumed))
        report.check(f"layer {layer}: files byte-equal", same, f"{whole.stat().st_size} bytes")
        formats = ("--format", "fp8_model1", *(("--indexer-format", "mxfp4_indexer") if layer == CSA else ()))
        report.step(f"layer {layer}: {' '.join(formats[1::2])}, compressed and converted")
        direct = compress(folder, layer, f"layer{layer}-engine.safetensors", *formats)
        converted = command("convert", whole, "--out", folder / f"layer{layer}-converted.safetensors", *formats)
        same = filecmp.cmp(direct, converted, shallow=False)
        report.check(
            f"layer {layer}: {' '.join(formats[1::2])}", same, f"{direct.stat().st_size} bytes, also converted"
        )


def main() -> int:
    """Run everything; exit status 1 if any comparison fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder for the model and the results")
    parser.add_argument("--json", type=Path, help="write the comparison as JSON to this file")
    args = parser.parse_args()
    out: Path = args.out
    begun = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    report = Report()
    with report.progress:
        for kernel in native.STEP + native.PLAN:
            report.step(f"CPU kernel {kernel}")
            native.address(kernel)
        compare_rows(out, report)
        compare_files(out / "bf16", report)
    seconds = time.perf_counter() - begun
    print(
        f"{'all checks passed' if report.ok else 'SOME CHECKS FAILED'} in {seconds:.0f} s; picture: {out / 'demo.png'}"
    )
    if args.json:
        args.json.write_text(json.dumps({"passed": report.ok, "seconds": seconds, "checks": report.lines}, indent=2))
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
