"""``kvcondense bench``: timings beside floors and installed peers, as lines, JSON lines, a table and a chart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvcondense.backends import get_backend
from kvcondense.bench import device as gpu
from kvcondense.bench import measure, peer_files, records, report
from kvcondense.bench.cases import CASES, DEVICE_CASES
from kvcondense.bench.context_parallel import CASES as SPLITS
from kvcondense.bench.context_parallel import run_split
from kvcondense.bench.decode_step import DECODE_STEP, decode_step
from kvcondense.bench.fused import LAYERS, run_layer
from kvcondense.bench.run import CONTEXTS, context_series, run_case
from kvcondense.bench.training import CASES as TRAINING_CASES
from kvcondense.bench.training import run_case as run_training
from kvcondense.cli import completion, page
from kvcondense.cli.output import Output
from kvcondense.cli.page import ReportFile
from kvcondense.errors import RangeError, UnsupportedError

EXAMPLE = "Example: kvcondense bench --backend cpu --json timings.jsonl --plot timings.png"
_WHAT = "kvcondense bench"
_SERIES = {CONTEXTS: context_series, DECODE_STEP: decode_step}
"""What is timed on a CPU beside the cases."""


def bench(
    backend: Annotated[str, typer.Option(help="Backend to time.", autocompletion=completion.backends)] = "cpu",
    case: Annotated[
        list[str] | None,
        typer.Option(help="Part of a case's name; may be given again.", autocompletion=completion.cases),
    ] = None,
    fused: Annotated[
        bool, typer.Option("--fused", help="Steps from hidden states, fused and not, beside the GEMM alone (GPU).")
    ] = False,
    context_parallel: Annotated[
        bool, typer.Option("--context-parallel", help="A sequence on 2 and 4 processes, beside one.")
    ] = False,
    peer_file: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Engine's Triton kernels to run: rtp-llm=FILE, vllm=FOLDER (GPU)."),
    ] = None,
    training: Annotated[
        bool, typer.Option("--training", help="Forward and backward of 8192 tokens, beside eager autograd.")
    ] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the cases, with their bytes and flops.")] = False,
    from_file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Show timings of an earlier --json instead.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw bars to a picture.")] = None,
    report_file: ReportFile = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="JSON lines, a timing each ('-': standard output).")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the --json file: cases that it has are not timed again.")
    ] = False,
) -> None:
    """Time a backend beside the reference, transformers and nano-deepseek-v4 where installed, and given peers.

    Before anyone is timed, its rows are compared with the reference's. Timings are medians of interleaved rounds, warm
    and with cold caches. The floor is the case's bytes over the bandwidth, or its flops over the rate of torch's bf16
    GEMM, both measured in the same run. On a GPU, bare steps, engines' kernels and GEMMs are timed as CUDA graphs.
    With --fused, a step from hidden states is timed as the backend does it at once, as GEMM and step, and, for small
    steps, in the way that gives a token the same bits in every step. With --training, gradients are compared first;
    with --context-parallel, rows with those of one process, and bytes with those of gathering all.
    Each timing is in the --json file as soon as it is made; --resume goes on with a file of the same machine, versions
    and sources. A case that raises is recorded, and the others go on.
    Exit status 1 if the backend's rows are wrong or a case raised.
    """
    output = Output(json_file)
    on_gpu = backend == "triton"
    if fused + training + context_parallel > 1:
        raise UnsupportedError("--fused", "one of --fused, --training and --context-parallel", "more")
    if fused and not on_gpu:
        raise UnsupportedError("--fused", "--backend triton", backend)
    if context_parallel and on_gpu:
        raise UnsupportedError("--context-parallel", "a backend of the CPU", backend)
    cases: dict[str, Any] = (LAYERS if fused else DEVICE_CASES) if on_gpu else CASES
    if training or context_parallel:
        cases = TRAINING_CASES if training else SPLITS
    if list_cases:
        rows = [(c.name, c.bytes, c.flops) for c in cases.values()]
        more = [(name, "", "") for name in _SERIES] if cases is CASES else []
        output.table(("case", "bytes", "flops"), [*rows, *more])
        return
    chosen = [c for c in cases.values() if not case or any(part in c.name for part in case)]
    series = [name for name in _SERIES if cases is CASES and (not case or any(part in name for part in case))]
    if not chosen and not series:
        raise RangeError("--case", f"part of one of: {'; '.join(cases)}", case)
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise UnsupportedError("--plot", "a file that ends in .png, .svg or .pdf", plot)
    page.check(report_file)
    if from_file is not None:
        if resume:
            raise UnsupportedError("--resume", "timings to be made", "--from")
        found = records.read(from_file, "--from", _WHAT)
        if any("complete" in r for r in found):
            found = [found[0], *records.finished(found)]
        records.Log(json_file, found[0], found[1:])
    else:
        get_backend(backend)  # a wrong name is an error before any work
        if on_gpu and not gpu.available():
            raise UnsupportedError("--backend", "a GPU for triton (nobody times its interpreter)", "none found")
        if peer_file and not on_gpu:
            raise UnsupportedError("--peer-file", "--backend triton", backend)
        extra = [peer_files.load(text) for text in peer_file or ()]
        one_case = run_layer if fused else partial(run_case, backend=backend, extra=extra)
        if training or context_parallel:
            one_case = run_training if training else run_split
        log, rates = _start(output, on_gpu, resume)
        _measure(output, log, chosen, partial(one_case, rates=rates, say=output.say, device=_home(on_gpu)))
        for name in series:
            if name not in log.complete:
                for record in _SERIES[name](backend, output.say):
                    log.add(record)
                log.finish(name)
        found = log.records
    for table in report.tables(found):
        output.say()
        output.markdown(table)
    if report_file is not None:
        about = {**found[0]["machine"], **{f"{k}, per second": f"{v:.3g}" for k, v in found[0]["rates"].items()}}
        page.write(report_file, _WHAT, about, page.of_timings(found))
        output.say(f"written to {report_file}")
    if plot is not None:
        report.plot(found, plot)
        output.say(f"drawn to {plot}")
    wrong = any("wrong" in r and r["runner"].startswith((backend, "fused", "kvcondense")) for r in found)
    if wrong or any("failed" in r for r in found):
        raise typer.Exit(1)


def _home(on_gpu: bool) -> str:
    return gpu.home() if on_gpu else "cpu"


def _start(output: Output, on_gpu: bool, resume: bool) -> tuple[records.Log, measure.Rates]:
    """The records to add to, and this machine's rates: measured, or those of the file that is gone on with."""
    machine = {**measure.machine(), **(gpu.machine() if on_gpu else {})}
    head, kept = records.resumed(output.json_file, machine, _WHAT) if resume else (None, [])
    measure.keep_memory()
    if head is None:
        output.say("measuring this machine's rates ...")
        head = {"machine": machine, "rates": vars(gpu.rates() if on_gpu else measure.Rates.measure())}
    rates = measure.Rates(**head["rates"])
    output.say(f"{machine}")
    output.say(
        f"memory {rates.memory / 1e9:.0f} GB/s, cache {rates.cache / 1e9:.0f} GB/s, "
        f"bf16 GEMM {rates.gemm / 1e9:.0f} GFLOP/s"
    )
    return records.Log(output.json_file, head, kept), rates


def _measure(output: Output, log: records.Log, chosen: list[Any], one_case: Any) -> None:
    for number, one in enumerate(chosen, 1):
        if one.name in log.complete:
            output.say(f"[{number}/{len(chosen)}] {one.name}: in the file already")
            continue
        output.say(f"[{number}/{len(chosen)}] {one.name}: comparing rows, then timing ...")
        try:
            for record in one_case(one):
                log.add(record)
                if "us" in record:
                    output.say(report.line(record))
        except Exception as error:  # whatever a compiler or a driver raises: the other cases have their own chance
            log.add({"case": one.name, "failed": f"{type(error).__name__}: {error}"})
            output.say(f"{one.name}: {type(error).__name__}: {error}")
        else:
            log.finish(one.name)
