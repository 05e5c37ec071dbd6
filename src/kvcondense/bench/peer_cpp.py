"""vLLM's C++ compressor for CPUs, where that build of it is installed; its operators alone are loaded, not vLLM.

They keep every token in fp32 pages by absolute position, [kv | score + ape], in one call and finish windows in a second
(csrc/cpu/sgl-kernels/compressor.cpp). The library needs AVX-512 with bf16.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kvcondense.backends.cpu.target import target
from kvcondense.bench.cases import PAGE_ROWS
from kvcondense.bench.peer_files import Paged
from kvcondense.layout.cache import PagedCache
from kvcondense.stages.hadamard import hadamard

_LIBRARY = "_C.abi3.so"


@functools.cache
def there() -> bool:
    """True if the operators could be loaded. Where vLLM is not a build for CPUs, or a processor's, they are not."""
    found = find_spec("vllm")
    folders = () if found is None else found.submodule_search_locations or ()
    files = [Path(folder) / _LIBRARY for folder in folders if (Path(folder) / _LIBRARY).is_file()]
    if not files or not target().bf16_products:
        return False
    try:
        torch.ops.load_library(str(files[0]))
    except OSError:
        return False
    return hasattr(torch.ops._C, "compress_norm_rope_store_cpu")


class Vllm(Paged):
    """``save_partial_states_cpu`` and ``compress_norm_rope_store_cpu``, or ``..._indexer_cpu``."""

    name = "vllm, C++"
    note = "two calls; every token to an fp32 paged state, windows read from there; metadata made beforehand"
    capturable = False
    rounded = 2.0**-4
    """Half a step of e4m3, relative: rows are compared as they are stored."""

    def cache(self) -> PagedCache:
        case = self.inputs.case
        return PagedCache.allocate(self.spec.head_dim, case.batch * self.pages, PAGE_ROWS, format=case.format)

    def rows(self, cache: PagedCache, slots: torch.Tensor) -> torch.Tensor:
        rows = cache.decode_rows(slots)
        return hadamard(rows) if self.spec.rotate else rows  # it does not rotate the keys of its indexer

    def prepare(self, start: int, count: int) -> dict[str, Any]:
        """And the state rows of each token's window, oldest first [T, window]; -1 before the sequence."""
        prepared = super().prepare(start, count)
        window = self.spec.window
        position = prepared["positions"][:, None] - window + 1 + torch.arange(window)
        page = self.block_table[prepared["requests"].long()[:, None], position.clamp(min=0) // self.block].long()
        row = page * self.block + position % self.block
        return {**prepared, "gather": torch.where(position >= 0, row, -1)}

    def call(self, tokens: torch.Tensor, state: dict[str, Any], prepared: dict[str, Any]) -> None:
        spec, n, ops = self.spec, self.spec.width, torch.ops._C
        positions, memory, data = prepared["positions"], state["memory"], state["cache"].data
        ops.save_partial_states_cpu(
            tokens[:, :n], tokens[:, n:], self.inputs.ape, positions, memory, prepared["slot_mapping"]
        )
        store = ops.compress_norm_rope_store_indexer_cpu if spec.rotate else ops.compress_norm_rope_store_cpu
        store(
            memory, prepared["gather"], positions, prepared["kv_slot_mapping"], self.inputs.norm, spec.eps,
            self.cos_sin, data, PAGE_ROWS, spec.ratio,
        )  # fmt: skip
