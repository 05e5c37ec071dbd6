"""Where kernels can be launched, and what every launch needs: the device, its reasons, operands."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from kvcondense import forks
from kvcondense.backends import Step
from kvcondense.layout.addresses import PagedLayout
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.online import OnlineState
from kvcondense.layout.plan import Plan
from kvcondense.layout.state import StatePool

_DEVICES = ("cuda", "npu")


def why_no_device(device: torch.device) -> str | None:
    """None if kernels can run on tensors of this device, else the reason."""
    if not installed():
        return "triton is not installed (pip install kvcondense[triton])"
    if device.type not in _DEVICES and not interpreted():
        return f"kv_score is on {device}, not on a GPU (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    if device.type != "cpu" and interpreted():
        return f"kv_score is on {device}, but Triton interprets kernels on the CPU (TRITON_INTERPRET is set)"
    return None


def installed() -> bool:
    """True if there is a Triton to import."""
    try:
        return find_spec("triton") is not None
    except ImportError:
        return False


@functools.cache
def interpreted() -> bool:
    """True if Triton runs kernels in its interpreter."""
    import triton

    from kvcondense.backends.triton.kernels.condense import condense_kernel

    return not isinstance(condense_kernel, triton.runtime.JITFunction)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device as the current one: Triton launches there, on its current stream."""
    if device.type == "cpu":
        return _quiet()
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return contextlib.nullcontext()


_interpreter = threading.RLock()


def _forget() -> None:
    global _interpreter
    _interpreter = threading.RLock()


forks.in_child(_forget)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without numpy's warnings of NaN and overflow, which is what the interpreter computes with; threads take turns.

    The interpreter exchanges functions of triton.language for all threads while a kernel runs.
    """
    with _interpreter, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


_numbers = random.Random()  # not the caller's, whose numbers would be others


def next_launch() -> int:
    """A number for a launch, in [1, 2^31).

    It is drawn, so that hardly ever another launch on the same plan has it, or launches add to a counter what comes to
    nothing, as those with numbers in a row might: L + (L + 2) - 2 (L + 1).
    """
    return _numbers.getrandbits(31) or 1


@contextlib.contextmanager
def clean_counters(plans: Iterable[Plan]) -> Iterator[None]:
    """Counters are zero again after launches that were broken off, as under the interpreter."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # of a device that takes no more work
            for plan in plans:
                plan.counters.zero_()
        raise


def fp32(t: torch.Tensor) -> torch.Tensor:
    """Contiguous and in fp32."""
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()


def rope_operands(step: Step) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """cos and sin."""
    return (None, None) if step.rope is None else (fp32(step.rope.cos), fp32(step.rope.sin))


def state_rows(state: StatePool | None) -> Any:
    """The state's rows as kernels take them: a tensor, or kv and scores."""
    if state is None or state.score is None:
        return None if state is None else state.data
    return state.data, state.score


def state_table(batch: RaggedBatch, state: StatePool | OnlineState | None) -> tuple[torch.Tensor | None, int]:
    """Slots or pages by request, and the stride from one request to the next."""
    if isinstance(state, StatePool) and isinstance(state.layout, PagedLayout):
        assert batch.state_block_table is not None
        return batch.state_block_table, batch.state_block_table.stride(0)
    return batch.state_slots, 1


def cache_operands(cache: PagedCache | None) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """Pages, what lies beside them (scales, or bytes of channels), and the strides of both."""
    if cache is None:
        return None, None, 0, 0
    beside = cache.scales if cache.second is None else cache.second.view(torch.uint8)
    return cache.data, beside, cache.data.stride(0), 0 if beside is None or beside.dim() == 0 else beside.stride(0)
