"""Cache formats as descriptors: which bytes a compressed row becomes. One entry per format, no code paths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcondense.errors import UnsupportedError


@dataclass(frozen=True)
class CacheFormat:
    """A row of ``head_dim`` elements of ``element``, rows packed without gaps.

    ``bf16`` is what DeepSeek's code keeps before quantisation (spec: 512 bf16 channels are 1024 bytes). ``fp32`` keeps
    the rows as computed, for fp32 models and for comparing implementations without a rounding in between.
    """

    name: str
    element: torch.dtype

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one row."""
        return head_dim * self.element.itemsize

    def page_bytes(self, head_dim: int, page_rows: int) -> int:
        """Bytes from one page to the next."""
        return page_rows * self.row_bytes(head_dim)


FORMATS: dict[str, CacheFormat] = {
    f.name: f for f in (CacheFormat("bf16", torch.bfloat16), CacheFormat("fp32", torch.float32))
}


def get_format(name: str) -> CacheFormat:
    """The format called ``name``; raises with the list of names otherwise."""
    if name not in FORMATS:
        raise UnsupportedError("format", f"one of {', '.join(FORMATS)}", repr(name))
    return FORMATS[name]
