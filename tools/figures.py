"""Pictures of the documentation, drawn from what the library computes: ``python tools/figures.py NAME FILE.svg``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

import kvcondense as kc
from kvcondense.conformance.mutants import MUTANTS
from kvcondense.formats import FORMATS
from kvcondense.golden import calibrated
from kvcondense.numerics import ulp_distance
from kvcondense.spec import Rounding
from kvcondense.stages import pool, rope
from kvcondense.visualiser import Scenario, trace

FLASH = kc.ModelConfig.FLASH
TOKENS = 20


def windows() -> Any:
    """Which tokens each row reads: token p is a one in channel p, so that rows show what went into them."""
    figure, panels = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    for axes, overlap in zip(panels, (True, False), strict=True):
        spec = kc.CompressorSpec(ratio=4, head_dim=TOKENS, eps=1e-6, rope_dim=0, overlap=overlap, has_ape=False)
        one = torch.eye(TOKENS)  # [T, d]
        halves = [-one, one] if overlap else [one]  # kv of the half for the next window, and of the one for its own
        kv_score = torch.cat([*halves, torch.zeros(TOKENS, spec.width)], dim=1)  # [T, 2N]
        weights = kc.CompressorWeights(norm=torch.ones(TOKENS))
        batch = kc.RaggedBatch.build([0, TOKENS], start_positions=[0])
        rows = kc.condense(spec, kv_score, weights, None, batch).values  # [E, T]
        axes.imshow(rows.sign(), cmap=ListedColormap(["#f4a259", "#ffffff", "#5b8fd9"]), vmin=-1, vmax=1, aspect="auto")
        for c, p in rows.nonzero().tolist():
            axes.text(p, c, "P" if rows[c, p] < 0 else "C", ha="center", va="center", fontsize=11)
        axes.set_xticks([p - 0.5 for p in range(0, TOKENS, 4)], minor=True)
        axes.grid(which="minor", axis="x", color="black", lw=0.8)
        axes.set(ylabel="row", yticks=range(rows.shape[0]), xticks=range(TOKENS))
        axes.set_title("overlapping windows (ratio 4)" if overlap else "separate windows", fontsize=11)
    panels[1].set_xlabel("position; a line where a window begins")
    return figure


def weights() -> Any:
    """Softmax weights of one HCA window, channel by channel, at the scales of a trained model."""
    spec, (_, gate, ape, *_) = kc.CompressorSpec.hca(FLASH), calibrated.SCALES["hca"]
    gen = torch.Generator().manual_seed(0)
    w, d = spec.window, 96
    score = gate * FLASH.hidden_size**0.5 * torch.randn(w, d, generator=gen) + ape * torch.randn(w, d, generator=gen)
    one = torch.eye(w)[:, :, None].expand(w, w, d)  # window j holds a one at candidate j: its P is that weight
    shares = pool.two_pass(one.contiguous(), score.expand(w, w, d).contiguous())  # [W, d]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    seen = axes.imshow(shares.T, cmap="magma_r", vmax=0.2, aspect="auto", interpolation="nearest")
    figure.colorbar(seen, extend="max", label="weight (1/128 = 0.0078 would be the mean)")
    axes.set(xlabel="token of the window", ylabel="channel")
    return figure


def ring() -> Any:
    """The state's ring over the steps of a request with drafts, as its plans say."""
    found = trace(Scenario(kc.CompressorSpec.csa(FLASH), prompt=14, chunk=5, drafts=3, steps=6))
    rows, steps = found["state"]["block_rows"], found["steps"]
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    held: dict[int, int] = {}
    for n, step in enumerate(steps):
        read = {row for _, row in step["reads"]}
        sure = step["start"] + step["tokens"] - step["drafts"] + step["accepted"]
        kept = {row: p for p, row in step["keeps"]}
        for row in range(rows):
            position = kept.get(row, held.get(row))
            if row in kept:
                colour = "#a5d8ff" if kept[row] < sure else "#ffc9c9"
            else:
                colour = "#ffd8a8" if row in read else "#eef1f4"
            axes.add_patch(Rectangle((n, row), 0.94, 0.94, color=colour))
            axes.text(n + 0.47, row + 0.47, "" if position is None else position, ha="center", va="center", fontsize=11)
        held |= kept
    for colour, label in (("#ffd8a8", "read"), ("#a5d8ff", "kept"), ("#ffc9c9", "kept, a draft that is rejected"),
                          ("#eef1f4", "neither")):  # fmt: skip
        axes.plot([], [], "s", ms=9, color=colour, label=label)
    names = [f"{s['start']}..{s['start'] + s['tokens'] - 1}" for s in steps]
    axes.set_xticks([n + 0.47 for n in range(len(steps))], names, fontsize=11)
    axes.set(xlim=(0, len(steps)), ylim=(rows, 0), xlabel="step (its positions)", ylabel="row of the ring")
    figure.legend(loc="outside upper center", ncols=4, fontsize=11)
    return figure


def positions() -> Any:
    """How wrong a row's RoPE channels are, by position, if they are rotated somewhere else or by another table."""
    ratio, length = 128, 1 << 20
    index = torch.unique(torch.logspace(0, 13, 160, base=2).long() - 1)  # window
    gen = torch.Generator().manual_seed(0)
    row = torch.randn(index.shape[0], 512, generator=gen)
    right = kc.RopeTable.build(FLASH, length)
    true = _rotated(row, right, index * ratio)
    others = {
        "rotated at w": _rotated(row, right, index),
        "rotated at the last position": _rotated(row, right, index * ratio + ratio - 1),
        "half-split pairs": _rotated(row, right, index * ratio, MUTANTS["half-split-pairs"].stages.rope),
        "no YaRN": _rotated(row, kc.RopeTable.build(replace(FLASH, yarn=None), length), index * ratio),
    }
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for name, other in others.items():
        axes.plot(index * ratio, (other - true).norm(dim=1) / true.norm(dim=1), label=name, lw=1)
    axes.set_xscale("symlog", base=2, linthresh=128)
    axes.set(xlabel="first position of the window (ratio 128)", ylabel="error of the RoPE channels, relative")
    axes.legend(fontsize=10)
    return figure


def profiles() -> Any:
    """How far the FUSED chain's bf16 rows are from the REFERENCE chain's."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    buckets = ["0", "1", "2", "3", "4 and more"]
    for k, kind in enumerate(("csa", "hca")):
        profiles = Rounding.REFERENCE, Rounding.FUSED
        one, other = (calibrated.rows(kind, rounding=rounding).bfloat16() for rounding in profiles)
        for m, (part, cut) in enumerate({"nope": slice(0, 448), "RoPE": slice(448, 512)}.items()):
            far = ulp_distance(one[:, cut], other[:, cut]).clamp(max=4).flatten()
            share = torch.bincount(far, minlength=5) / far.numel()
            at = [i + (2 * k + m - 1.5) * 0.2 for i in range(5)]
            drawn = axes.bar(at, share, 0.2, label=f"{kind.upper()}, {part}")
            axes.bar_label(drawn, [f"{s:.2%}" for s in share.tolist()], fontsize=10, rotation=90, padding=2)
    axes.set_yscale("log")
    axes.set_ylim(top=8)
    axes.set_xticks(range(5), buckets)
    axes.set(xlabel="ulp between the profiles", ylabel="share of elements")
    axes.legend(fontsize=10, ncols=4)
    return figure


def formats() -> Any:
    """What each cache format loses of rows like a trained model's."""
    figure, axes = plt.subplots(figsize=(9, 4.4), layout="constrained")
    names = [n for n, f in FORMATS.items() if n not in ("fp32", "bf16") and f.through is None]
    rows = {kind: calibrated.rows(kind) for kind in calibrated.SCALES}
    errors = [calibrated.error(FORMATS[n], rows[calibrated.kinds_of(FORMATS[n])[0]])["mean"] for n in names]
    drawn = axes.barh(names, errors, color=["#5b8fd9" if FORMATS[n].head_dim == 128 else "#f4a259" for n in names])
    axes.bar_label(drawn, [f"{e:.2%}" for e in errors], fontsize=10, padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=max(errors) * 2)
    axes.set_xlabel("mean error relative to the row's RMS (orange: main rows, blue: indexer keys)")
    return figure


def _rotated(
    row: torch.Tensor, table: kc.RopeTable, position: torch.Tensor, rotate: Callable[..., torch.Tensor] = rope.pairwise
) -> torch.Tensor:
    return rotate(row, *table.rows(position), Rounding.FUSED)[:, 448:]


DRAWN: dict[str, Callable[[], Any]] = {f.__name__: f for f in (windows, weights, ring, positions, profiles, formats)}


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Example: python tools/figures.py ring ring.svg")
    parser.add_argument("name", choices=DRAWN)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    DRAWN[arguments.name]().savefig(arguments.file)
    print(f"drawn to {arguments.file}")


if __name__ == "__main__":
    main()
