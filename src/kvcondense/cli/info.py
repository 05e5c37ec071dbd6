"""``kvcondense info``: versions, what each backend can do here, the preset compressors, and the cache formats."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import kvcondense
from kvcondense import capacity
from kvcondense.api import explain
from kvcondense.backends.cpu import native
from kvcondense.backends.triton import fences
from kvcondense.checkpoint import compressors as stored_compressors
from kvcondense.cli import completion
from kvcondense.cli.output import JsonFile, Output, width
from kvcondense.config import PRESETS
from kvcondense.errors import UnsupportedError
from kvcondense.formats import FORMATS, CacheFormat, describe, get_format
from kvcondense.golden import calibrated
from kvcondense.layout.batch import RaggedBatch
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

EXAMPLE = "Example: kvcondense info --format fp8_model1 --error"
HEADINGS = ("compressor", "layers", "ratio", "window", "head_dim", "state row", "state", "bf16 row")


def info(
    formats: Annotated[bool, typer.Option("--formats", help="List the cache formats.")] = False,
    names: Annotated[bool, typer.Option("--names", help="With --formats: the names alone, one a line.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="With --formats: the generated part of docs/formats.md.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="Show one cache format: byte map and picture.", autocompletion=completion.formats)
    ] = None,
    error: Annotated[
        bool, typer.Option("--error", help="With --format: its error on rows like a trained model's.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the CPU kernels now that are not compiled yet, to fill an image.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="List the compressors of a model directory, from headers alone.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Channels, for formats that take any number.")] = describe.EXAMPLE_DIM,
    json_file: JsonFile = None,
) -> None:
    """Say which versions are installed, which backends can run here or why not, and what the presets compress.

    With --formats or --format: the cache formats, down to the byte. With --checkpoint: layer, kind, ratio, shapes,
    types and sizes of each compressor that is stored there.
    """
    output = Output(json_file)
    if compile:
        reason = native.problem()
        if reason is not None:
            raise UnsupportedError("--compile", "a machine that can run the CPU kernels", reason)
        native.compile_all(output.say)
    for flag, given in (("--names", names), ("--markdown", markdown)):
        if given and not formats:
            raise UnsupportedError(flag, "it together with --formats", "it alone")
    if error and format is None:
        raise UnsupportedError("--error", "it together with --format NAME", "it alone")
    if checkpoint is not None:
        output.finish(_checkpoint(output, checkpoint))
    elif format is not None:
        output.finish(_one_format(output, get_format(format), head_dim, error))
    elif formats:
        output.finish(_formats(output, names, markdown))
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
    _print_table(output, rows)
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
            **{k: f"{'x'.join(map(str, t['shape']))} {t['dtype']}" for k, t in c["tensors"].items()},
            "bytes": str(c["bytes"]),
        }
        for c in found
    ]
    headings = list(dict.fromkeys(h for row in rows for h in row if h != "bytes"))
    _print_table(output, [{h: row.get(h, "-") for h in (*headings, "bytes")} for row in rows])
    output.say()
    output.say(f"{len(found)} compressors, {sum(c['bytes'] for c in found)} bytes")
    return {"checkpoint": str(directory), "compressors": found}


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


def _print_table(output: Output, rows: list[dict[str, str]]) -> None:
    output.table(list(rows[0]), [list(row.values()) for row in rows])


def compressors() -> list[dict[str, str]]:
    """One line per kind of compressor in the preset models; state: bytes of a full window in fp32, per layer."""
    lines = []
    for config in PRESETS.values():
        for spec, layers in capacity.compressors(config).items():
            row_bytes = 4 * spec.state_dim
            values = (
                f"{config.name} {capacity.kind_of(config, spec)}",
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


def _kernels(reason: str | None) -> list[dict[str, Any]]:
    """Where compiled kernels are kept, and which there are; none where the backend cannot run."""
    if reason is not None:
        return []
    return [{"name": k.name, "path": str(k.path), "cached": k.cached} for k in native.status()]


def _backends() -> dict[str, str | None]:
    spec = CompressorSpec(ratio=1, head_dim=16, eps=1e-6, rope_dim=0, has_ape=False, has_gate=False)
    weights = CompressorWeights(norm=torch.ones(16))
    return explain(spec, torch.ones(1, 16), weights, None, RaggedBatch.build([0, 1], start_positions=[0]))
