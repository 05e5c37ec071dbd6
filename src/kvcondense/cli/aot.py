"""``kvcondense aot``, as it is typed: compile every Triton kernel for architectures that need not be here."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import Jobs, completer

EXAMPLE = "Example: kvcondense aot --arch sm_90 --arch gfx942 --variant hca --json aot.json"
FAILS = "a kernel does not compile or spills registers"


def aot(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="Architecture, sm_NN or gfx9NN; may be given again. Default: all of them.",
            autocompletion=completer(names.ARCHITECTURES),
        ),
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="A name, or a part of names; may be given again.")] = None,
    few: Annotated[bool, typer.Option("--few", help="One variant of each form, of each state too on sm_90.")] = False,
    jobs: Jobs = None,
    list_variants: Annotated[bool, typer.Option("--list", help="Print the variants' names and compile none.")] = False,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Compile the Triton kernels ahead of time, without a GPU, and say what each takes.

    A variant is a compressor, a kind of state, types of tokens and state, a cache format and a number of rows; all that
    the tuning table can choose for DeepSeek-V4's and V4.1's compressors, two windows of a program, which `tune` tries,
    and the kernels that project. "matrix" counts instructions of the matrix units (wgmma alone on sm_90).
    """
