"""``kvcondense bench``, as it is typed: timings beside floors and peers, as lines, JSON lines, a table and a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import Quiet
from kvcondense.cli.paths import ReportFile
from kvcondense.cli.values import completer, one_of
from kvcondense.cli.voids import Void

EXAMPLE = "Example: kvcondense bench --backend cpu --json timings.jsonl --plot timings.png"
FAILS = "rows of the backend are wrong, or a case raised"
_OF_TIMINGS = (
    "backend", "context_parallel", "peer_file", "training", "bundle", "swap", "from_file", "plot", "report_file",
    "resume",
)  # fmt: skip
VOID = (
    Void("list_cases", ("predict", "measured")),
    Void("predict", _OF_TIMINGS),
    Void("predict", ("measured",), missing=True),
)


def bench(
    backend: Annotated[str, typer.Option(help="Backend to time.", **one_of(names.BACKENDS))] = "cpu",
    case: Annotated[
        list[str] | None,
        typer.Option(help="Part of a case's name; may be given again.", autocompletion=completer(names.CASES)),
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
    bundle: Annotated[
        bool, typer.Option("--bundle", help="100000 tokens of Flash to a file and back, beside a plain copy.")
    ] = False,
    swap: Annotated[
        bool, typer.Option("--swap", help="States of 8 requests of Flash to host memory and back, beside a plain copy.")
    ] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the cases, with their bytes and flops.")] = False,
    from_file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Show timings of an earlier --json instead.")
    ] = None,
    predict: Annotated[
        str | None,
        typer.Option(
            metavar="ARCH", help="Time nothing: what the model says of a GPU, sm_90 ...", **one_of(names.ARCHITECTURES)
        ),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="GPU timings of an earlier --json, beside --predict's.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw bars to a picture.")] = None,
    report_file: ReportFile = None,
    quiet: Quiet = False,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="JSON lines, a timing each ('-': standard output); an old FILE is FILE~.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the --json file: cases that it has are not timed again.")
    ] = False,
) -> None:
    """Time a backend beside the reference, peers that are installed, and given ones.

    Installed: transformers, nano-deepseek-v4, vLLM's C++ and, for V4.1, mlx-lm.

    Before anyone is timed, its rows are compared with the reference's. Timings are medians of interleaved rounds, warm
    and with cold caches. The floor is the case's bytes over the bandwidth, or its flops over the rate of torch's bf16
    GEMM, both measured in the same run. On a GPU, bare steps, engines' kernels and GEMMs are timed as CUDA graphs.
    With --fused, a step from hidden states is timed in one launch or in tiles, as GEMM and step, and, for small
    steps, in the way that gives a token the same bits in every step. With --training, gradients are compared first;
    with --context-parallel, rows with those of one process, and bytes with those of gathering all.
    Example: kvcondense bench --swap --json swap.jsonl
    Each timing is in the --json file as soon as it is made; --resume goes on with a file of the same machine, versions
    and sources. A case that raises is recorded, and the others go on.

    With --predict, nothing is run: the kernels of the GPU's cases are compiled (minutes for all of them), and their
    machine code, their bytes and a table of the chip's published figures give the time, what decides it, and the floor;
    with --case, each launch too, and with --json every number. A step from hidden states has a line for each way that
    the backend has, its own first. --measured puts timings beside, and takes their rates.
    Example: kvcondense bench --predict sm_90 --case "prefill 1 x 8192, ratio"
    """
