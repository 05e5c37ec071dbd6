"""A stand-in for a GPU: Triton's interpreter on the CPU, tiny cases under the real names, host clocks in few rounds.

It shows that every step runs and leaves its records. No time of it means anything, so every record says so.
``python -m on_gpu.stand_in WORDS`` is the kvcondense command on it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

_HIDDEN, _MOST_REQUESTS = 128, 2


class _Graph:
    """A CUDA graph's place: the work itself."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.replay = body


def _elapsed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def apply() -> None:
    """Put it in the GPU's place, in this process."""
    import torch
    import triton

    from kvcondense.bench import cases, device, fused, peers, records, tune

    if device.home() == "cpu":
        return
    torch.set_num_threads(1)
    facts = {"device": "stand-in", "toolkit": "none", "triton": triton.__version__}
    constants: dict[str, Any] = {
        "home": lambda: "cpu", "available": lambda: True, "machine": lambda: facts, "capture": _Graph,
        "elapsed": _elapsed, "_cache_bytes": lambda: 1 << 20, "_FLUSH_BYTES": 1 << 12, "_LARGE_BYTES": 1 << 16,
        "_SMALL_BYTES": 1 << 12, "_GEMM": (64, 64, 64), "_ROUNDS": 1, "_CALLS": 1, "_FEW_CALLS": 1,
    }  # fmt: skip
    for name, value in constants.items():
        setattr(device, name, value)
    device._warm_up = _elapsed
    records.text = lambda record: json.dumps({**record, "stand_in": True}) + "\n"
    peers.installed = list
    config = replace(cases.CONFIG, hidden_size=_HIDDEN)
    for module in (cases, fused):
        setattr(module, "CONFIG", config)  # noqa: B010
    cases.DEVICE_CASES.update({name: _tiny(case) for name, case in cases.DEVICE_CASES.items()})
    layers = fused.LAYERS
    layers.update({n: replace(la, cases=tuple(map(_tiny, la.cases))) for n, la in layers.items()})
    tune.KINDS = {"csa": cases.FORMAT}
    tune.CLASSES = ((None, 1, 32, 0),)
    tune._LEAST_BLOCK, tune._WARPS = 512, (8,)
    tune.cast_is_exact = lambda *_: False  # the interpreter's cast is nobody's


def _tiny(case: Any) -> Any:
    """The same kind of step with few tokens: windows that were finished still are, histories keep their remainder."""
    ratio = case.spec.ratio
    start = case.start % ratio + (case.spec.window if case.start else 0)
    most = 8 if case.start else 2 * ratio
    return replace(case, batch=min(case.batch, _MOST_REQUESTS), tokens=min(case.tokens, most), start=start)


if __name__ == "__main__":
    apply()
    from kvcondense.cli import main

    main()
