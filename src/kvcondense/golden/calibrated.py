"""Rows like those of a trained model, and how much of them a cache format loses."""

from __future__ import annotations

import torch

from kvcondense.api import condense
from kvcondense.config import ModelConfig
from kvcondense.errors import UnsupportedError, require_known
from kvcondense.formats import CacheFormat
from kvcondense.golden.inputs import GoldenCase
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.snapshot import import_live
from kvcondense.layout.state import StatePool
from kvcondense.numerics import FP32_LOWEST
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights

FIRST = 8192
ROWS = 256
# Standard deviations of wkv, wgate and ape, and mean and deviation of gamma, as measured on DeepSeek-V4-Flash.
SCALES = {
    "csa": (0.0245, 0.0388, 0.124, 0.967, 0.193),
    "hca": (0.0246, 0.0316, 0.034, 0.100, 0.055),
    "indexer": (0.0293, 0.0512, 0.153, 0.685, 0.261),
}


def rows(kind: str, seed: int = 0, count: int = ROWS, rounding: Rounding = Rounding.REFERENCE) -> torch.Tensor:
    """``count`` bf16-valued rows [count, head_dim] of a Flash compressor, from window 8192 / ratio on.

    For x ~ N(0, 1) and weights of deviation sigma, projected channels are normal with deviation sigma * sqrt(D):
    they are drawn at once, without the projection.
    """
    require_known("kind", kind, SCALES)
    kv, gate, ape, gamma, spread = SCALES[kind]
    config = ModelConfig.FLASH
    spec: CompressorSpec = getattr(CompressorSpec, kind)(config, rounding=rounding)
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    root = config.hidden_size**0.5
    weights = CompressorWeights(norm=gamma + spread * normal(spec.head_dim), ape=ape * normal(spec.ratio, spec.width))
    rope = RopeTable.build(config, FIRST + count * spec.ratio)
    state = StatePool.ring(spec, 1)
    seeded = torch.zeros(FIRST - spec.live_start(FIRST), spec.state_dim)
    seeded[:, spec.width :] = FP32_LOWEST
    import_live(spec, state, RaggedBatch.build([0, 0], start_positions=[FIRST], state_slots=[0]), seeded)
    out = []
    for start in range(0, count, 16):  # a chunk at a time: 16 windows of 128 tokens are 8 MiB
        n = min(16, count - start) * spec.ratio
        kv_score = torch.cat([kv * root * normal(n, spec.width), gate * root * normal(n, spec.width)], dim=1)
        batch = RaggedBatch.build([0, n], start_positions=[FIRST + start * spec.ratio], state_slots=[0])
        out.append(condense(spec, kv_score, weights, rope, batch, state=state).values)
    return torch.cat(out).bfloat16().float()


def kinds_of(fmt: CacheFormat) -> list[str]:
    """Kinds of compressor whose rows fit ``fmt``."""
    fitting = []
    for kind in SCALES:
        spec = GoldenCase(kind=kind, preset="flash").spec
        try:
            fmt.check(spec.head_dim, spec.rope_dim)
        except UnsupportedError:
            continue
        fitting.append(kind)
    return fitting


def error(fmt: CacheFormat, x: torch.Tensor) -> dict[str, float]:
    """What storing bf16-valued rows x [E, d] in ``fmt`` costs.

    mean and max of |q s - x|, each as a fraction of its row's RMS, and mean and least cosine of q s and x by row. A
    scale for the whole cache is the one that just reaches the largest value.
    """
    scale = x.abs().amax() / 448 if fmt.tensor_scale else None
    back = fmt.decode(fmt.encode(x, scale), scale).double()
    x = x.double()
    delta = (back - x).abs() / x.square().mean(-1, keepdim=True).sqrt()
    cosine = torch.nn.functional.cosine_similarity(back, x, dim=-1)
    return {
        "mean": float(delta.mean()),
        "max": float(delta.max()),
        "cosine": float(cosine.mean()),
        "least cosine": float(cosine.min()),
    }
