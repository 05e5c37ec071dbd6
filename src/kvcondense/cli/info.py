"""``kvcondense info``: versions, and what each backend can do on this machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import kvcondense
from kvcondense.api import explain
from kvcondense.cli.output import JsonFile, say, write_json
from kvcondense.config import PRESETS
from kvcondense.formats import FORMATS
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

EXAMPLE = "Example: kvcondense info --json -"


def info(json_file: JsonFile = None) -> None:
    """Say which versions are installed and, for each backend, whether it can run here or why not."""
    versions = {"kvcondense": kvcondense.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numba", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    spec = CompressorSpec(ratio=1, head_dim=2, eps=1e-6, rope_dim=0, has_ape=False, has_gate=False)
    weights = CompressorWeights(norm=torch.ones(2))
    batch = RaggedBatch.build([0, 1], start_positions=[0])
    backends = explain(spec, torch.ones(1, 2), weights, None, batch)
    for name, number in versions.items():
        say(f"{name:<14} {number}")
    for name, reason in backends.items():
        say(f"backend {name:<6} {'can run' if reason is None else reason}")
    say(f"formats        {', '.join(FORMATS)}")
    say(f"presets        {', '.join(PRESETS)}")
    result = {"versions": versions, "backends": backends, "formats": list(FORMATS), "presets": list(PRESETS)}
    write_json(result, json_file)
