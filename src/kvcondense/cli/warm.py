"""``kvcondense warm``, as it is typed: compile the kernels that a model's steps need, before the first of them asks."""

from __future__ import annotations

from typing import Annotated

import typer

from kvcondense.cli import names
from kvcondense.cli.output import JsonFile, Quiet
from kvcondense.cli.values import FormatPair, Jobs, Model, PageTokens, completer, one_of, whole

EXAMPLE = "Example: kvcondense warm --model flash --backend triton --drafts 3 --json warm.json"
FAILS = "a kernel does not compile"
BACKENDS = ("triton", "cpu")


def warm(
    model: Model = "flash",
    backend: Annotated[str, typer.Option(help="triton or cpu.", **one_of(BACKENDS))] = "triton",
    arch: Annotated[
        str | None,
        typer.Option(
            help="Architecture, sm_NN or gfx9NN. Default: that of the GPU that is here.",
            autocompletion=completer(names.ARCHITECTURES),
        ),
    ] = None,
    format: FormatPair = "fp8_model1,mxfp4_indexer",
    state: Annotated[
        str, typer.Option(help="ring, paged, or online where windows do not overlap.", **one_of(names.WARM_STATES))
    ] = "ring",
    drafts: Annotated[
        int, typer.Option(help="Tokens of a step that may be rejected: rings have rows for them.", **whole(0, 1024))
    ] = 0,
    page_tokens: PageTokens = names.PAGE_TOKENS,
    jobs: Jobs = None,
    quiet: Quiet = False,
    json_file: JsonFile = None,
) -> None:
    """Compile what decode, verify and prefill steps of a model launch, so that no step waits for a compiler.

    triton: every kernel form that its steps from kv_score and from hidden states take, for the cache of Triton on disk
    (TRITON_CACHE_DIR). No GPU is needed if --arch names one. cpu: the kernels of that backend, which serve every model.
    """
