"""Where kernels can be launched, and what every launch needs: the device, its reasons, operands in fp32."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without numpy's warnings of NaN and overflow, which is what the interpreter computes with."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def fp32(t: torch.Tensor) -> torch.Tensor:
    """Contiguous and in fp32."""
    return t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()
