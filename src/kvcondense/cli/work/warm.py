"""The work of ``kvcondense warm``: what a model's steps launch, compiled ahead of the first of them."""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import torch

from kvcondense.backends.cpu import native
from kvcondense.capacity import compressors, kind_of
from kvcondense.cli.output import Output
from kvcondense.cli.work.aot import check_compiler, workers
from kvcondense.cli.work.plan import model_of
from kvcondense.errors import RangeError, UnsupportedError
from kvcondense.formats import get_format


def run(
    output: Output,
    *,
    model: str,
    backend: str,
    arch: str | None,
    format: str,
    state: str,
    drafts: int,
    page_tokens: int,
    jobs: int | None,
) -> bool | None:
    """Whether all kernels compile."""
    if backend == "cpu":
        reason = native.problem()
        if reason is not None:
            raise UnsupportedError("--backend", "a machine that can run the CPU kernels", reason)
        native.compile_all(output.say)
        output.finish({"backend": backend, "kernels": [str(k.path) for k in native.status()]})
        return None
    check_compiler("warm")
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
    with workers(jobs, [arch]) as work:
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
    return not failed
