"""The CPU backend: Numba kernels over torch tensors. One call does a step; see condense.py for what threads do."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvcondense.backends import Step
from kvcondense.backends.cpu import calls, native, params, scratch, target
from kvcondense.backends.cpu.blocks import address
from kvcondense.backends.cpu.threads import SERIAL, launch
from kvcondense.errors import UnsupportedError
from kvcondense.layout.plan import Plan


@dataclass(frozen=True)
class CpuBackend:
    """Steps and projections on the CPU, in fp32, for channels in multiples of 16."""

    name: str = "cpu"

    def why_not(self, step: Step) -> str | None:
        """None if this step can run here, else the reason."""
        kv_score, state = step.kv_score, step.state
        if kv_score.device.type != "cpu":
            return f"kv_score is on {kv_score.device}, not on the CPU"
        if kv_score.dtype not in calls.KINDS:
            return f"kv_score is {kv_score.dtype}; the kernels compute in fp32 (the reference takes fp64)"
        if state is not None and state.dtype not in (torch.float32, torch.bfloat16):
            return f"the state is {state.dtype}; the kernels take fp32 and bf16"
        if step.spec.head_dim % params.CHANNELS:
            return f"head_dim {step.spec.head_dim} is not a multiple of {params.CHANNELS}"
        if step.cache is not None:
            try:
                calls.format_block(step.cache)
            except UnsupportedError as error:
                return str(error)
        return native.problem(calls.kernels(step.state, step.cache))

    def run(self, step: Step) -> None:
        """Do the step. A cache in validation mode is encoded by its format, so that nothing is written if it raises."""
        if step.cache is not None and step.cache.strict:
            calls.run(step, store=False, keeps=False)
            live = step.plan.window_slot >= 0
            stored = step.cache.encode(step.rows[live], exact=not step.spec.rounding.row)
            step.cache.put(step.plan.window_slot[live], stored)
            calls.run(step, windows=False)
        else:
            calls.run(step)

    def prepare_step(self, step: Step) -> Callable[[Plan], None] | None:
        """``run`` of this step with other plans, its block filled beforehand; None where it has to be filled anew."""
        return None if step.cache is not None and step.cache.strict else calls.prepare(step)

    def why_not_project(self, x: torch.Tensor, w: torch.Tensor) -> str | None:
        """None if x @ w.T can run here, else the reason."""
        if x.device.type != "cpu":
            return f"x is on {x.device}, not on the CPU"
        if x.dtype is not torch.bfloat16 or w.dtype is not torch.bfloat16:
            return f"x is {x.dtype} and w {w.dtype}; the kernel multiplies bf16"
        if x.shape[1] % 32 or x.shape[1] == 0 or w.shape[0] % 8:
            return f"w is {list(w.shape)}; channels must come in multiples of 8 and the hidden size in multiples of 32"
        return native.problem(("project",))

    def project(self, x: torch.Tensor, w: torch.Tensor, tile: int | None) -> torch.Tensor:  # noqa: ARG002 - not needed
        """x @ w.T with fp32 sums, in an order that depends on the hidden size alone."""
        x, w = (t if t.stride(1) == 1 else t.contiguous() for t in (x, w))
        out = torch.empty(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
        _multiply(_product(x, w, out), x, w)
        return out

    def prepare_product(self, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Callable[[], None] | None:
        """``project`` of these buffers into ``out``; None where they are copied first."""
        if x.stride(1) != 1 or w.stride(1) != 1:
            return None
        block = _product(x, w, out)
        return lambda: _multiply(block[:], x, w)


_SCRATCH, _TALL, _WIDE = (params.Product.place(name) for name in ("scratch", "tile_tokens", "tile_channels"))


def _product(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> array[int]:
    """The block of a product, but for what follows from the number of threads."""
    product = params.Product()
    product.x, product.x_stride = x.data_ptr(), 2 * x.stride(0)
    product.w, product.w_stride = w.data_ptr(), 2 * w.stride(0)
    product.out, product.tokens, product.channels = out.data_ptr(), x.shape[0], w.shape[0]
    product.hidden_bytes, product.scratch_bytes = 2 * x.shape[1], params.Product.bytes()
    product.scratch = product.tile_tokens = product.tile_channels = 0
    return product.pack()


def _multiply(block: array[int], x: torch.Tensor, w: torch.Tensor) -> None:
    """Enter the kernel with a block of ``_product``, which nobody else uses."""
    threads = 1 if x.shape[0] * w.numel() < SERIAL else torch.get_num_threads()
    block[_TALL], block[_WIDE] = _tiles(x.shape[0], w.shape[0], threads)
    block[_SCRATCH] = scratch.of(threads * params.Product.bytes())
    launch(native.address("project"), address(block), threads)


def _tiles(tokens: int, channels: int, threads: int) -> tuple[int, int]:
    """Tokens and channels of a task. A few tokens share the channels out, more than there are threads if they can."""
    wide = target.target().product_channels
    while wide > 16 and -(-tokens // params.TALL) * (channels // wide) < 4 * threads:
        wide //= 2
    return params.TALL, wide


BACKEND = CpuBackend()
