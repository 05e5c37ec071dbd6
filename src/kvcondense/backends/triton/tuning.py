"""How steps are cut into programs: a small table by architecture, ratio, head_dim and rows. No tuning at run time.

``tuning.json`` holds it. A choice changes speed, never a bit.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcondense.backends.triton.fences import older_than
from kvcondense.spec import CompressorSpec

TABLE = Path(__file__).with_name("tuning.json")
ANY = "any"
"""Architecture whose entries stand in for those that the table does not name."""
CASTS = ("bf16", "e4m3", "e2m1")
"""Casts of fp32 that kernels may leave to the chip, where ``kvcondense tune`` has shown that every result is equal."""
_DEPENDENT = 90
"""The first sm_ with programmatic dependent launch."""
_FEW_PRODUCTS = 128
"""No more than there are processors, or little more."""
_TILE = 4096
"""Elements of a tile, [window, channels], where the table says nothing."""


@dataclass(frozen=True)
class Choice:
    """block: channels of a program; num_warps: its warps; casts: of ``CASTS``, those that the chip does by itself;
    counters: a program is threads, and atomics tell the last of a window's programs that it is (else a program is one
    thread, and a second launch finishes windows); holds: ``holds_loads``; windows: of a program whose block is all
    channels, a power of two: pooled together where all of their tokens are the step's.
    """

    block: int
    num_warps: int
    casts: tuple[str, ...] = ()
    counters: bool = True
    holds: bool = False
    windows: int = 1


@functools.cache
def table() -> dict[str, Any]:
    """The file: by architecture its source, hardware_casts, counters, dependent_launch, fused_tokens, library_product,
    decode_programs ([window, programs, programs of two compressors], for windows of at most so many tokens, null any),
    and entries.

    An entry is [ratio, head_dim, rows, block, num_warps, windows] and serves steps of at most ``rows`` windows, null
    any number.
    """
    return json.loads(TABLE.read_text(encoding="utf-8"))


def dump(content: dict[str, Any]) -> str:
    """The file's text: JSON, an entry to a line."""
    text = json.dumps(content, indent=2)
    return re.sub(r"\[\s+([^\[\]]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


_stand_in: ContextVar[str | None] = ContextVar("stand_in", default=None)


@contextlib.contextmanager
def stand_in(arch: str) -> Iterator[None]:
    """Within, every device counts as one of this architecture: for launches that are only written down."""
    token = _stand_in.set(arch)
    try:
        yield
    finally:
        _stand_in.reset(token)


_in_full_order: ContextVar[bool] = ContextVar("in_full_order", default=False)


@contextlib.contextmanager
def in_full_order() -> Iterator[None]:
    """Within, no kernel starts before the one ahead of it has ended, whatever the table says; captures included."""
    token = _in_full_order.set(True)
    try:
        yield
    finally:
        _in_full_order.reset(token)


def architecture(device: torch.device) -> str:
    """sm_90, gfx942, Ascend ... of a device, "any" under the interpreter."""
    return _stand_in.get() or _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type == "cuda":
        if torch.version.hip is not None:
            return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return "Ascend" if device.type == "npu" else ANY


def _part(arch: str) -> dict[str, Any]:
    """What the table has for an architecture."""
    return table().get(arch, table()[ANY])


def choose(device: torch.device, spec: CompressorSpec, rows: int) -> Choice:
    """The tiling of a step with ``rows`` windows on this device."""
    return choose_for(architecture(device), spec.ratio, spec.window, spec.head_dim, rows)


def casts(arch: str) -> tuple[str, ...]:
    """Of ``CASTS``, those that the table lets an architecture's chips do by themselves."""
    return tuple(_part(arch)["hardware_casts"])


def holds_loads(arch: str) -> bool:
    """True if loads that are asked for ahead have to be volatile, or the assembler moves them to where they are used.

    AMD's leaves them where they are, and waits for each one that is volatile.
    """
    return arch.startswith("sm_")


def threads(device: torch.device) -> bool:
    """True if a program on this device is threads, which barriers join."""
    return _part(architecture(device))["counters"]


def fused_tokens(device: torch.device) -> int | None:
    """Least tokens of a step that is fused with its projection on this device; None: no step is."""
    return _part(architecture(device))["fused_tokens"]


def library_product(device: torch.device) -> bool:
    """True if a product by the vendor's library, then the step, beats steps that are fused with their projection."""
    return _part(architecture(device))["library_product"]


def one_launch_tokens(arch: str) -> int | None:
    """Most tokens of a step from x that is one launch, where the vendor's product, then the step, is possible, too.

    None: any number. Where memory is fast, that way is predicted to win at 64 tokens by more than the model leaves out
    of the product, its chain of loads (``kvcondense bench --predict sm_90 --fused``). Not so on sm_89 and sm_120.
    """
    return None if arch in ("sm_89", "sm_120") else 16


def launch_options(device: torch.device) -> dict[str, Any]:
    """Options of every launch: whether its programs may start while earlier kernels run, on sm_90 and later.

    One place sets both the kernel's flag, by which each program waits, and the launch's, by which it has to.
    """
    arch = architecture(device)
    if not (starts_early(arch) and _part(arch)["dependent_launch"]) or _in_full_order.get():
        return {}
    return {"PDL": True, "launch_pdl": True}


def starts_early(arch: str) -> bool:
    """True of chips that can start a kernel before the one ahead of it has ended."""
    return arch.startswith("sm_") and int(arch[3:]) >= _DEPENDENT


def product_options(arch: str) -> dict[str, Any]:
    """Options of a kernel that multiplies in long tiles or by itself.

    Without matrix units that read shared memory, sm_120 has too few registers for tiles whose loads run ahead; where
    the assembler would spill before it takes all that there are, it is told how many.
    """
    still = {"num_stages": 1} if arch.startswith("sm_12") else {}
    return {"enable_fp_fusion": False, **({"maxnreg": 255} if arch.startswith("sm_1") else {}), **still}


def decode_options(arch: str, each: int) -> dict[str, Any]:
    """Options of a launch whose programs of four warps wait for one another, ``each`` of them on a processor.

    The compiler is told how many registers are left for each, since a grid that does not fit would be refused. Not on
    sm_90, where Triton 3.9 takes no more by itself, and spills if it is told; 3.6 takes more than there are.
    """
    told: dict[str, Any] = {"maxnreg": min(255, 65536 // (128 * each) // 8 * 8)}  # they are given out by eights
    if arch.startswith("gfx"):  # a program has a wave on each of four units, whose registers such waves share
        told = {"waves_per_eu": each}
    untold = arch.startswith("sm_9") and not older_than(3, 9)
    return {"enable_fp_fusion": False, **({} if untold else told)}


def online_options(arch: str, num_warps: int) -> dict[str, Any]:
    """Options of a launch that folds: of eight warps, sm_120's assembler would spill before it takes what there is."""
    return {"maxnreg": 96} if arch.startswith("sm_12") and num_warps == 8 else {}


def tile_columns(arch: str) -> int:
    """Projected channels that a tile of a long step accumulates at once, reading x once for them.

    Sums of 256 take half the registers of eight warps. Where matrix units take operands from registers, too, pooling
    does not fit beside them (sm_80, sm_89, sm_120).
    """
    return 256 if arch == ANY or arch.startswith(("sm_9", "sm_10", "gfx")) else 128


def boxes(arch: str) -> bool:
    """True where tiles of tokens that lie side by side, and of weights, are copied by descriptor (TMA)."""
    return arch.startswith(("sm_9", "sm_10"))


def product_rows(arch: str) -> int:
    """Least channels of a product that all its kernels form by the same instruction: one that takes 64, where there is
    such."""
    return 64 if arch.startswith(("sm_9", "sm_10")) else 16


def epilogue_options(arch: str, block: int, has_gate: bool) -> dict[str, bool]:
    """PIN: products end in registers, whose layout the epilogue of a tile should keep (sm_100's end elsewhere).

    HALVES: stored tokens of many channels are looked up in two halves, or registers would spill (``kvcondense aot``;
    without scores they spill on AMD if it is done).
    """
    pin = arch.startswith(("sm_", "gfx")) and not arch.startswith("sm_10")
    return {"PIN": pin, "HALVES": pin and block > 64 and (has_gate or not arch.startswith("gfx"))}


def decode_programs(device: torch.device, window: int, compressors: int = 1, products: int | None = None) -> int | None:
    """Programs of a processor in launches whose programs wait for one another; None: there are none such.

    Long windows take twice the registers of short ones, of which four fit without spills (``kvcondense aot``), or three
    that do the work of two compressors. Two are enough for few ``products`` (None: many), as the indexer has by itself.
    """
    entries = _part(architecture(device))["decode_programs"]
    each = entries and next(each[compressors - 1] for most, *each in entries if most is None or window <= most)
    return min(each, 2) if each and products is not None and products <= _FEW_PRODUCTS else each


@functools.lru_cache(maxsize=4096)
def choose_for(arch: str, ratio: int, window: int, head_dim: int, rows: int) -> Choice:
    """The tiling for an architecture by name."""
    part, padded = _part(arch), 1 << (window - 1).bit_length()
    block = max(min(head_dim, _TILE // padded), min(head_dim, 16))
    warps = max(1, min(8, block * padded // 512))
    serving = (
        tiling
        for r, d, most, *tiling in part["entries"]
        if (r, d) == (ratio, head_dim) and (most is None or rows <= most)
    )
    block, warps, windows = next(serving, (block, warps, 1))
    return Choice(block, warps, casts(arch), part["counters"], holds_loads(arch), windows)
