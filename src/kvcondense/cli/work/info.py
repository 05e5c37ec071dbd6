"""The work of ``kvcondense info``: versions, backends, preset compressors, checkpoints, and cache formats."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import kvcondense
from kvcondense import capacity
from kvcondense.api import explain
from kvcondense.backends.cpu import native
from kvcondense.backends.triton import fences
from kvcondense.checkpoint import compressors as stored_compressors
from kvcondense.cli.output import Output, width
from kvcondense.config import PRESETS
from kvcondense.errors import UnsupportedError
from kvcondense.formats import FORMATS, CacheFormat, describe, get_format
from kvcondense.golden import calibrated
from kvcondense.integrations.vllm_plugin.support import support
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights
from kvcondense_vllm import VARIABLE

HEADINGS = {
    "compressor": "compressor",
    "layers": "layers",
    "ratio": "ratio",
    "window": "window",
    "head_dim": "head_dim",
    "state_row_bytes": "state row",
    "state_bytes": "state",
    "bf16_row_bytes": "bf16 row",
}
"""What a table says over the entries of ``compressors``."""


def run(
    output: Output,
    *,
    formats: bool,
    names_alone: bool,
    markdown: bool,
    format: str | None,
    error: bool,
    compile: bool,
    checkpoint: Path | None,
    vllm: bool,
    head_dim: int,
) -> None:
    """Say what was asked for."""
    if compile:
        reason = native.problem()
        if reason is not None:
            raise UnsupportedError("--compile", "a machine that can run the CPU kernels", reason)
        native.compile_all(output.say)
    for flag, given in (("--names", names_alone), ("--markdown", markdown)):
        if given and not formats:
            raise UnsupportedError(flag, "it together with --formats", "it alone")
    if error and format is None:
        raise UnsupportedError("--error", "it together with --format NAME", "it alone")
    if vllm:
        output.finish(_vllm(output))
    elif checkpoint is not None:
        output.finish(_checkpoint(output, checkpoint))
    elif format is not None:
        output.finish(_one_format(output, get_format(format), head_dim, error))
    elif formats:
        output.finish(_formats(output, names_alone, markdown))
    else:
        output.finish(_machine(output))


def _machine(output: Output) -> dict[str, Any]:
    versions = {"kvcondense": kvcondense.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numba", "triton", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    backends = _backends()
    for name, number in versions.items():
        output.say(f"{name:<14} {number}")
    for name, reason in backends.items():
        output.say(f"backend {name:<6} {'can run' if reason is None else reason}")
    fence = _fence(versions["triton"])
    if fence is not None:
        output.say(f"triton {versions['triton']:<7} {fence}")
    kernels = _kernels(backends["cpu"])
    for kernel in kernels:
        state = "compiled" if kernel["cached"] else "not compiled yet"
        output.say(f"CPU kernel     {kernel['name']}: {state}, {kernel['path']}")
    output.say(f"formats        {len(FORMATS)}: kvcondense info --formats")
    output.say()
    rows = compressors()
    _print_table(output, table(rows))
    return {
        "versions": versions,
        "backends": backends,
        "proxy_fence": fence,
        "kernels": kernels,
        "formats": list(FORMATS),
        "compressors": rows,
    }


def _fence(triton: str) -> str | None:
    """What is done about a fence that the installed Triton leaves out; None without Triton."""
    if triton == "not installed":
        return None
    if fences.omitted():
        return "omits the fence between copies and matrix units: kernels that project are compiled with it added"
    return "fences what copies write for the matrix units"


def _checkpoint(output: Output, directory: Path) -> dict[str, Any]:
    found = [
        {
            "layer": c.layer,
            "part": c.part,
            "mtp": c.mtp,
            "scheme": c.scheme,
            "prefix": c.prefix,
            "storage": c.storage,
            "ratio": c.spec.ratio,
            "window": c.spec.window,
            "head_dim": c.spec.head_dim,
            "bytes": c.bytes,
            "tensors": {
                ours: {"name": t.name, "file": t.file.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.bytes}
                for ours, t in c.tensors.items()
            },
        }
        for c in stored_compressors(directory)
    ]
    if not found:
        raise UnsupportedError("--checkpoint", "a model with compressors", directory)
    rows = [
        {
            **{h: str(c[h]) for h in ("layer", "part", "ratio", "window", "head_dim")},
            **{k: f"{'x'.join(map(str, t['shape']))} {t['dtype']}" for k, t in c["tensors"].items() if "." not in k},
            "bytes": str(c["bytes"]),
        }
        for c in found
    ]
    headings = list(dict.fromkeys(h for row in rows for h in row if h != "bytes"))
    _print_table(output, [{h: row.get(h, "-") for h in (*headings, "bytes")} for row in rows])
    output.say()
    past = list(dict.fromkeys(c["layer"] for c in found if c["mtp"] is not None))
    output.say(f"{len(found)} compressors, {sum(c['bytes'] for c in found)} bytes")
    for key, what in (("scheme", "names"), ("storage", "stored as")):
        kinds = {kind: [c["layer"] for c in found if _kind(c, key) == kind] for kind in (_kind(c, key) for c in found)}
        for kind, layers in kinds.items():
            where = "" if len(kinds) == 1 else f" in layers {', '.join(map(str, dict.fromkeys(layers)))}"
            output.say(f"{what}: {kind}{where}")
    if past:
        output.say(f"of MTP layers: {', '.join(map(str, past))}, numbered on from the main ones")
    return {"checkpoint": str(directory), "compressors": found}


def _kind(compressor: dict[str, Any], key: str) -> str:
    """A compressor's storage, or its scheme of names with the prefix."""
    prefix = f", prefix {compressor['prefix']}" if key == "scheme" and compressor["prefix"] else ""
    return f"{compressor[key]}{prefix}"


def _vllm(output: Output) -> dict[str, Any]:
    found, asked = support(), os.environ.get(VARIABLE)
    on = "on" if asked == "1" else f"off: {VARIABLE} is {'not set' if asked is None else repr(asked)}, not '1'"
    output.say(f"vllm           {found.version or 'none'}{f', on {found.device}' if found.device else ''}")
    output.say(f"plugin         {on}")
    for name in found.as_dict()["replaced"]:
        output.say(f"{'replaces' if asked == '1' else 'would replace':<14} {name}.forward")
    for why in () if found.why else found.left:
        output.say(f"left alone     {why}")
    if found.why:
        output.say(f"replaces       nothing: {found.why}")
    return {"vllm": {**found.as_dict(), "on": asked == "1"}}


def _formats(output: Output, names: bool, markdown: bool) -> dict[str, Any]:
    rows = describe.overview()
    if names:
        for name in FORMATS:
            output.say(name)
    elif markdown:
        output.say(describe.markdown().rstrip("\n"), wrap=False)
    else:
        shown = ("format", "head_dim", "row bytes", "page stride", "what it is")
        _print_table(output, [{h: row[h] for h in shown} for row in rows])
    return {"formats": rows}


def _one_format(output: Output, fmt: CacheFormat, head_dim: int, error: bool) -> dict[str, Any]:
    d = fmt.head_dim or head_dim
    report: dict[str, Any] = {
        "format": fmt.name,
        "summary": fmt.summary,
        "used_by": fmt.source,
        "head_dim": d,
        "row_bytes": fmt.row_bytes(d),
        "page_stride": describe.stride(fmt, d),
        "bytes": describe.byte_map(fmt, d),
        "kinds": calibrated.kinds_of(fmt),
    }
    output.say(f"{fmt.name}: {fmt.summary}")
    output.say(f"used by        {fmt.source}")
    output.say(f"rows           {d} channels in {fmt.row_bytes(d)} bytes; fits {', '.join(report['kinds'])}")
    examples = f"P = 64: {fmt.page_bytes(d, 64)}, P = 2: {fmt.page_bytes(d, 2)}"
    output.say(f"page of P rows {report['page_stride']} bytes; {examples}")
    output.say()
    _print_table(output, report["bytes"])
    output.say()
    output.say("a page of 2 rows (the number over a box is its first byte):")
    columns = (width() or describe.COLUMNS + 2) - 2
    for line in describe.picture(fmt, d, columns=columns):
        output.say(f"  {line}")
    if error:
        output.say()
        output.say(f"error on {calibrated.ROWS} rows of a Flash compressor with calibrated weights, in RMS of the row:")
        report["error"] = {kind: calibrated.error(fmt, calibrated.rows(kind)) for kind in report["kinds"]}
        for kind, e in report["error"].items():
            output.say(
                f"  {kind:<8} mean {e['mean']:.2e}  max {e['max']:.2e}  "
                f"cosine {e['cosine']:.7f} (least {e['least cosine']:.7f})"
            )
    return report


def _print_table(output: Output, rows: list[dict[str, Any]]) -> None:
    output.table(list(rows[0]), [list(row.values()) for row in rows])


def compressors() -> list[dict[str, Any]]:
    """One line per kind of compressor in the preset models; state: bytes of a full window in fp32, per layer."""
    return [
        {
            "compressor": f"{config.name} {capacity.kind_of(config, spec)}",
            "layers": layers,
            "ratio": spec.ratio,
            "window": spec.window,
            "head_dim": spec.head_dim,
            "state_row_bytes": 4 * spec.state_dim,
            "state_bytes": 4 * spec.state_dim * spec.window,
            "bf16_row_bytes": get_format("bf16").row_bytes(spec.head_dim),
        }
        for config in PRESETS.values()
        for spec, layers in capacity.compressors(config).items()
    ]


def table(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The lines of ``compressors`` with headings and units."""

    def cell(key: str, value: Any) -> str:
        if key == "state_bytes":
            return f"{value // 1024} KiB"
        return f"{value} B" if key.endswith("_bytes") else str(value)

    return [{HEADINGS[key]: cell(key, value) for key, value in row.items()} for row in rows]


def _kernels(reason: str | None) -> list[dict[str, Any]]:
    """Where compiled kernels are kept, and which there are; none where the backend cannot run."""
    if reason is not None:
        return []
    return [{"name": k.name, "path": str(k.path), "cached": k.cached} for k in native.status()]


def _backends() -> dict[str, str | None]:
    spec = CompressorSpec(ratio=1, head_dim=16, eps=1e-6, rope_dim=0, has_ape=False, has_gate=False)
    weights = CompressorWeights(norm=torch.ones(16))
    return explain(spec, torch.ones(1, 16), weights, None, RaggedBatch.build([0, 1], start_positions=[0]))
