"""``kvcondense warm``: compile the kernels that a model's steps need, before the first of them asks."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Annotated, Any

import torch
import typer

from kvcondense.backends.cpu import native
from kvcondense.capacity import compressors, kind_of
from kvcondense.cli.aot import check_compiler, workers
from kvcondense.cli.output import JsonFile, Output
from kvcondense.cli.plan import FormatPair, Model, PageTokens, model_of
from kvcondense.errors import RangeError, UnsupportedError, require_int, require_known
from kvcondense.formats import get_format

EXAMPLE = "Example: kvcondense warm --model flash --backend triton --drafts 3 --json warm.json"
BACKENDS = ("triton", "cpu")
STATES = ("ring", "paged", "online")


def warm(
    model: Model = "flash",
    backend: Annotated[str, typer.Option(help="triton or cpu.")] = "triton",
    arch: Annotated[
        str | None, typer.Option(help="Architecture, sm_NN or gfx9NN. Default: that of the GPU that is here.")
    ] = None,
    format: FormatPair = "fp8_model1,mxfp4_indexer",
    state: Annotated[str, typer.Option(help="ring, paged, or online where windows do not overlap.")] = "ring",
    drafts: Annotated[int, typer.Option(help="Tokens of a step that may be rejected: rings have rows for them.")] = 0,
    page_tokens: PageTokens = 256,
    jobs: Annotated[int | None, typer.Option(help="Processes that compile. Default: one per processor.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compile what decode, verify and prefill steps of a model launch, so that no step waits for a compiler.

    triton: every kernel form that its steps from kv_score and from hidden states take, for the cache of Triton on disk
    (TRITON_CACHE_DIR). No GPU is needed if --arch names one. cpu: the kernels of that backend, which serve every model.
    Exit status 1 if a kernel does not compile.
    """
    output = Output(json_file)
    require_known("--backend", backend, BACKENDS)
    if backend == "cpu":
        reason = native.problem()
        if reason is not None:
            raise UnsupportedError("--backend", "a machine that can run the CPU kernels", reason)
        native.compile_all(output.say)
        output.finish({"backend": backend, "kernels": [str(k.path) for k in native.status()]})
        return
    require_known("--state", state, STATES)
    require_int("--drafts", drafts, 0)
    require_int("--page-tokens", page_tokens, 1)
    check_compiler("warm", jobs)
    config = model_of(model)
    main, _, indexer = format.partition(",")
    formats = (get_format(main).name, get_format(indexer or "mxfp4_indexer").name)
    from kvcondense.backends.triton import aot, tuning
    from kvcondense.backends.triton.launches import target
    from kvcondense.backends.triton.variants import of_model

    if arch is None:
        if not torch.cuda.is_available():
            raise UnsupportedError("--arch", "an architecture, as there is no GPU here", "none")
        arch = tuning.architecture(torch.device("cuda"))
    target(arch)
    named = {kind_of(config, spec): spec for spec in compressors(config)}
    if not named:
        raise RangeError("--model", "a model with compressors", model)
    for name, spec in named.items():
        get_format(formats[name == "indexer"]).check(spec.head_dim, spec.rope_dim)
    steps = of_model(named, formats, state, drafts, page_tokens)
    begun = time.perf_counter()
    found: list[aot.Compiled] = []
    output.say(f"{config.name} on {arch}: {len(steps)} kinds of steps, in {jobs or os.cpu_count()} processes ...")
    with workers(jobs or os.cpu_count() or 1) as work:
        compiled = work(aot.compile_variant, steps, [arch] * len(steps))
        for kernels in output.track(compiled, len(steps), "compiling"):
            found += kernels
            for one in kernels:
                if one.error is not None:
                    output.say(f"{one.variant} {one.kernel}: FAILED {one.error}")
    counts = Counter(one.kernel for one in found if one.error is None)
    for kernel, count in sorted(counts.items()):
        output.say(f"{kernel:<20} {count}")
    seconds = time.perf_counter() - begun
    failed = sum(one.error is not None for one in found)
    output.say(f"{sum(counts.values())} launches compiled, {failed} failed, in {seconds:.0f} s")
    result: dict[str, Any] = {"backend": backend, "model": config.name, "arch": arch, "seconds": seconds}
    output.finish({**result, "failed": failed, "kernels": [one.as_dict() for one in found]})
    raise typer.Exit(1 if failed else 0)
