"""What is timed: named cases, their inputs, and the bytes and flops that no implementation can avoid."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from kvcondense.config import ModelConfig
from kvcondense.formats import FORMATS, get_format
from kvcondense.spec import CompressorSpec
from kvcondense.weights import CompressorWeights

# No YaRN: one of the peers has none. It changes a table, not the work.
CONFIG = replace(ModelConfig.FLASH, name="flash without YaRN", yarn=None)
V41 = replace(ModelConfig.V41_FLASH, name="v41 without YaRN", yarn=None)
FORMAT, V41_FORMAT = "fp8_model1", "fp4_v41"
PAGE_ROWS = 64


@dataclass(frozen=True)
class Case:
    """``batch`` requests at position ``start`` bring ``tokens`` tokens each; ``hidden``: as x, to be projected.

    kind: hca, csa or indexer, or r2, V4.1's of ratio 2; format: how rows are stored; narrow: kv_score and state are
    bf16.
    """

    name: str
    kind: str
    tokens: int
    batch: int
    start: int
    hidden: bool = False
    format: str = FORMAT
    narrow: bool = False

    @property
    def config(self) -> ModelConfig:
        return V41 if self.kind == "r2" else CONFIG

    @property
    def spec(self) -> CompressorSpec:
        if self.kind == "r2":
            return CompressorSpec.for_layer(V41, V41.compress_ratios.index(2))
        return getattr(CompressorSpec, self.kind)(CONFIG)

    @property
    def windows(self) -> int:
        """Windows that each request completes."""
        return (self.start + self.tokens) // self.spec.ratio - self.start // self.spec.ratio

    @property
    def row_bytes(self) -> int:
        """Of a token's kv_score, and of its row in the state."""
        return (2 if self.narrow else 4) * self.spec.projected

    @property
    def kept_bytes(self) -> int:
        """State rows that later windows need."""
        return self.batch * min(self.tokens, self.spec.seed_rows(self.start + self.tokens)) * self.row_bytes

    @property
    def cache_bytes(self) -> int:
        """Rows of the cache, and their scales."""
        fmt = get_format(self.format)
        scales = fmt.scale_shape(1, 1) or ()  # a tensor of their own, or one number for all
        row = fmt.row_bytes(self.spec.head_dim) + (4 * math.prod(scales) if scales else 0)
        return self.batch * self.windows * row

    @property
    def weight_bytes(self) -> int:
        """Of the projection, if there is one."""
        return 2 * self.spec.projected * self.config.hidden_size if self.hidden else 0

    @property
    def bytes(self) -> int:
        """Bytes that must be read or written once: inputs, stored rows that windows need, kept rows, cache rows.

        Weights of the projection are among them, returned rows are not.
        """
        spec = self.spec
        new = self.tokens * (2 * self.config.hidden_size if self.hidden else self.row_bytes)
        # Of a stored row, a window reads one half of the channels if windows overlap.
        stored = min(self.start, spec.window - 1) if self.windows else 0
        read = self.batch * (new + stored * self.row_bytes // spec.halves)
        return read + self.kept_bytes + self.cache_bytes + self.weight_bytes

    @property
    def flops(self) -> int:
        """Of the projection."""
        return 2 * self.batch * self.tokens * self.config.hidden_size * self.spec.projected if self.hidden else 0


CASES = {
    case.name: case
    for case in (
        Case("prefill 8192, ratio 128", "hca", 8192, 1, 0),
        Case("prefill 8192, ratio 4", "csa", 8192, 1, 0),
        Case("prefill 8192 in bf16, ratio 128", "hca", 8192, 1, 0, narrow=True),
        Case("decode 16 on a boundary, ratio 128", "hca", 1, 16, 1023),
        Case("decode 16 on a boundary in bf16, ratio 128", "hca", 1, 16, 1023, narrow=True),
        Case("decode 16 on a boundary, ratio 4", "csa", 1, 16, 1023),
        Case("decode 16 within a window, ratio 128", "hca", 1, 16, 1000),
        Case("decode 16 within a window, ratio 4", "csa", 1, 16, 1000),
        Case("prefill 2048 from x, ratio 128", "hca", 2048, 1, 0, hidden=True),
        Case("decode 16 from x, ratio 128", "hca", 1, 16, 1000, hidden=True),
        Case("decode 1 from x, ratio 128", "hca", 1, 1, 1000, hidden=True),
        Case("prefill 8192, V4.1 ratio 2", "r2", 8192, 1, 0, format=V41_FORMAT),
        Case("decode 16 on a boundary, V4.1 ratio 2", "r2", 1, 16, 1023, format=V41_FORMAT),
        Case("decode 16 within a window, V4.1 ratio 2", "r2", 1, 16, 1000, format=V41_FORMAT),
    )
}


def _device_cases() -> Iterator[Case]:
    shapes = ((1, 8192), (1, 65536), (8, 8192))
    for ratio, kind in ((128, "hca"), (4, "csa")):
        for batch in (1, 16, 64, 256):
            yield Case(f"decode {batch} on a boundary, ratio {ratio}", kind, 1, batch, 1023)
            yield Case(f"decode {batch} within a window, ratio {ratio}", kind, 1, batch, 1000)
        for batch in (1, 16, 64):
            yield Case(f"verify {batch} x 8 across a boundary, ratio {ratio}", kind, 8, batch, 1019)
        for batch, tokens in shapes:
            yield Case(f"prefill {batch} x {tokens}, ratio {ratio}", kind, tokens, batch, 0)
    for ratio, kind in ((128, "hca"), (4, "csa")):
        for batch in (1, 16, 64):
            yield Case(f"decode {batch} from x on a boundary, ratio {ratio}", kind, 1, batch, 1023, hidden=True)
            yield Case(f"decode {batch} from x within a window, ratio {ratio}", kind, 1, batch, 1000, hidden=True)
        for batch, tokens in shapes:
            yield Case(f"prefill {batch} x {tokens} from x, ratio {ratio}", kind, tokens, batch, 0, hidden=True)
    # Shapes that engines have published times of. A window of ratio 4 needs no longer history than this.
    yield Case("decode 128 on a boundary, ratio 128", "hca", 1, 128, 1023)
    for batch in (512, 4096):
        yield Case(f"decode {batch} on a boundary, ratio 4", "csa", 1, batch, 7)
    yield Case("prefill 8 x 65536, ratio 128", "hca", 65536, 8, 0)
    for name in FORMATS:
        kind = "indexer" if "indexer" in name else "csa"
        if name != FORMAT:
            yield Case(f"prefill 1 x 8192 as {name}, ratio 4", kind, 8192, 1, 0, format=name)
            yield Case(f"decode 64 on a boundary as {name}, ratio 4", kind, 1, 64, 1023, format=name)


DEVICE_CASES = {case.name: case for case in _device_cases()}
"""For GPUs: larger, and every cache format."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case, the same for everybody. Tokens are x [B, n, D] bf16 or kv_score [B, n, projected] fp32.

    history: the tokens before ``start``; new: those of the timed step; rest: those that complete the open window, so
    that a step without a finished row is compared by the row that follows. w [projected, D], ape [r, N], which V4.1
    does without, norm [d].
    """

    case: Case
    history: torch.Tensor
    new: torch.Tensor
    rest: torch.Tensor
    w: torch.Tensor
    ape: torch.Tensor
    norm: torch.Tensor

    @property
    def weights(self) -> CompressorWeights:
        """As kvcondense takes them."""
        return CompressorWeights(norm=self.norm, ape=self.ape if self.case.spec.has_ape else None, w=self.w)


@functools.lru_cache(maxsize=1)
def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Random inputs with the spread of a trained model's, from a fixed seed."""
    spec, gen = case.spec, torch.Generator(device).manual_seed(0)
    end = case.start + case.tokens
    sizes = (case.start, case.tokens, -end % spec.ratio)
    channels = case.config.hidden_size if case.hidden else spec.projected

    def tokens(count: int) -> torch.Tensor:
        t = torch.randn(case.batch, count, channels, generator=gen, device=device)
        t = t if case.hidden else t.mul_(1.5)
        return t.bfloat16() if case.hidden or case.narrow else t

    history, new, rest = (tokens(n) for n in sizes)
    return Inputs(
        case=case,
        history=history,
        new=new,
        rest=rest,
        w=(torch.randn(spec.projected, case.config.hidden_size, generator=gen, device=device) / 40).bfloat16(),
        ape=0.1 * torch.randn(spec.ratio, spec.width, generator=gen, device=device),
        norm=1 + 0.2 * torch.randn(spec.head_dim, generator=gen, device=device),
    )
