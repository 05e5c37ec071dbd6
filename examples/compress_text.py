"""Compress a text: bytes become hidden states, hidden states become rows of a cache, and rows are read again.

    python examples/compress_text.py --text README.md

The embedding and the weights are random; a checkpoint's are loaded by CompressorWeights.load.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import kvcondense as kc

HIDDEN = 1024


def main() -> None:
    """A text through CSA and HCA."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=Path(__file__), help="a file to read (default: this one)")
    text = parser.parse_args().text.read_bytes()[:8192]
    gen = torch.Generator().manual_seed(0)
    embedding = torch.randn(256, HIDDEN, generator=gen).bfloat16()
    x = embedding[torch.tensor(list(text))]  # [T, HIDDEN]
    config = kc.ModelConfig.FLASH
    rope = kc.RopeTable.build(config, len(text))
    for name, spec in (("CSA", kc.CompressorSpec.csa(config)), ("HCA", kc.CompressorSpec.hca(config))):
        weights = kc.CompressorWeights(
            norm=torch.ones(spec.head_dim),
            ape=0.1 * torch.randn(spec.ratio, spec.width, generator=gen),
            w=torch.randn(spec.projected, HIDDEN, generator=gen).div(HIDDEN**0.5).bfloat16(),
        )
        pages = -(-spec.visible_rows(len(text)) // 64)
        cache = kc.PagedCache.allocate(spec.head_dim, pages, 64, format="fp8_model1")
        state = kc.StatePool.ring(spec, num_slots=1)
        batch = kc.RaggedBatch.build(
            [0, len(text)], start_positions=[0], state_slots=[0], block_table=[list(range(pages))]
        )
        rows = kc.compress(spec, x, weights, rope, batch, state=state, cache=cache)
        read = cache.decode_rows(rows.slot)  # what attention sees
        error = (read - rows.values).norm() / rows.values.norm()
        print(
            f"{name}: {len(text)} tokens -> {rows.values.shape[0]} rows, {cache.data.numel()} bytes in {pages} pages;"
        )
        print(f"     a cache of all tokens takes {spec.ratio} times as many rows; FP8 is off by {error:.2%}")


if __name__ == "__main__":
    main()
