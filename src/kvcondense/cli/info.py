"""``kvcondense info``: versions, what each backend can do here, and the compressors of the preset models."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import kvcondense
from kvcondense.api import explain
from kvcondense.cli.output import JsonFile, Output
from kvcondense.config import PRESETS, ModelConfig
from kvcondense.formats import FORMATS, get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

EXAMPLE = "Example: kvcondense info --json -"
HEADINGS = ("compressor", "layers", "ratio", "window", "head_dim", "state row", "state", "bf16 row")


def info(json_file: JsonFile = None) -> None:
    """Say which versions are installed, which backends can run here or why not, and what the presets compress."""
    output = Output(json_file)
    versions = {"kvcondense": kvcondense.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numba", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    backends = _backends()
    for name, number in versions.items():
        output.say(f"{name:<14} {number}")
    for name, reason in backends.items():
        output.say(f"backend {name:<6} {'can run' if reason is None else reason}")
    output.say(f"formats        {', '.join(FORMATS)}")
    output.say()
    rows = compressors()
    for row in (dict(zip(HEADINGS, HEADINGS, strict=True)), *rows):
        output.say(" ".join(f"{row[h]:<{15 if h == 'compressor' else 10}}" for h in HEADINGS).rstrip())
    output.finish({"versions": versions, "backends": backends, "formats": list(FORMATS), "compressors": rows})


def compressors() -> list[dict[str, str]]:
    """One line per kind of compressor in the preset models; state: bytes of a full window in fp32, per layer."""
    lines = []
    for config in PRESETS.values():
        specs: dict[CompressorSpec, int] = {}
        for layer in config.compressor_layers:
            for part in CompressorSpec.parts_of_layer(config, layer):
                spec = CompressorSpec.for_layer(config, layer, part)
                specs[spec] = specs.get(spec, 0) + 1
        for spec, layers in specs.items():
            row_bytes = 4 * spec.state_dim
            values = (
                f"{config.name} {_kind(config, spec)}",
                str(layers),
                str(spec.ratio),
                str(spec.window),
                str(spec.head_dim),
                f"{row_bytes} B",
                f"{spec.window * row_bytes // 1024} KiB",
                f"{get_format('bf16').row_bytes(spec.head_dim)} B",
            )
            lines.append(dict(zip(HEADINGS, values, strict=True)))
    return lines


def _kind(config: ModelConfig, spec: CompressorSpec) -> str:
    if config.generation != "v4":
        return f"ratio {spec.ratio}"
    return ("indexer" if spec.rotate else "CSA") if spec.overlap else "HCA"


def _backends() -> dict[str, str | None]:
    spec = CompressorSpec(ratio=1, head_dim=2, eps=1e-6, rope_dim=0, has_ape=False, has_gate=False)
    weights = CompressorWeights(norm=torch.ones(2))
    return explain(spec, torch.ones(1, 2), weights, None, RaggedBatch.build([0, 1], start_positions=[0]))
