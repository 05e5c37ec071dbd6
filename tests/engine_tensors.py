"""What tests of engines' tensors share: compressors as engines have them, weights, tokens, blocks with gaps, bytes."""

import torch

from kvcondense import CompressorSpec, CompressorWeights, ModelConfig, RopeTable
from kvcondense.spec import Rounding

FLASH = ModelConfig.FLASH
CSA = CompressorSpec.csa(FLASH, rounding=Rounding.FUSED)
INDEXER = CompressorSpec.indexer(FLASH, rounding=Rounding.FUSED)
UNROTATED = CompressorSpec.indexer(FLASH, rounding=Rounding.FUSED, rotate=False)  # as vLLM has it
HCA = CompressorSpec.hca(FLASH, rounding=Rounding.FUSED)
V41 = CompressorSpec.for_layer(ModelConfig.V41_FLASH, 2, rounding=Rounding.LATENT)  # ratio 2
ROPE = RopeTable.build(FLASH, 1024)


def weights(spec):
    gen = torch.Generator().manual_seed(5)
    ape = torch.randn(spec.ratio, spec.width, generator=gen)
    return CompressorWeights(norm=1 + 0.2 * torch.randn(spec.head_dim, generator=gen), ape=ape)


def tokens(spec, count, seed=0):
    return torch.randn(count, spec.projected, generator=torch.Generator().manual_seed(seed))


def blocks(count, rows, size, stride, dtype):
    """An engine's tensor with padded blocks, and its memory."""
    storage = torch.zeros(count, stride, dtype=dtype)
    return storage.as_strided((count, rows, size), (stride, size, 1)), storage


def raw_bytes(storage):
    return bytes(storage.contiguous().view(torch.uint8).flatten().tolist())


def rows_by_page(rows, slots, page_rows):
    """{page: {row of it: values}} of finished rows, as the cache's encoder gets them: bf16 values."""
    found = {}
    for row, slot in zip(rows.bfloat16().float().tolist(), slots.tolist(), strict=True):
        found.setdefault(slot // page_rows, {})[slot % page_rows] = row
    return found
