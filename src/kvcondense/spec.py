"""What one compressor computes: ratio, overlap, dims, rounding profile, and the integers that follow from them."""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from kvcondense.config import ModelConfig
from kvcondense.config.values import MAX_RATIO, MAX_SIZE, whole
from kvcondense.errors import CheckpointError, DtypeError, RangeError, UnsupportedError, require_int
from kvcondense.files.reading import short
from kvcondense.files.schema import typed


class Rounding(enum.Enum):
    """Where a row is rounded to bf16 between the pool and the cache."""

    REFERENCE = "reference"
    """Before the norm, after the norm, after RoPE: DeepSeek's inference/model.py and pypto-lib's PR 270."""
    FUSED = "fused"
    """Nowhere before the cache: one fp32 chain, as vLLM and SGLang compute it for V4."""
    LATENT = "latent"
    """After the norm only, and a cache quantises the row as RoPE leaves it, in fp32: vLLM's chain for V4.1.

    Not so with one scale for the whole cache, which always meets bf16 rows.
    """

    @property
    def pooled(self) -> bool:
        """Whether the pooled row is rounded to bf16, before the norm."""
        return self is Rounding.REFERENCE

    @property
    def latent(self) -> bool:
        """Whether the norm's result is."""
        return self is not Rounding.FUSED

    @property
    def rotated(self) -> bool:
        """Whether the channels that RoPE turned are."""
        return self is Rounding.REFERENCE

    @property
    def row(self) -> bool:
        """Whether the whole row is, on its way to a cache that quantises it."""
        return self is not Rounding.LATENT


@dataclass(frozen=True)
class CompressorSpec:
    """One compressor: the rule that turns ``window`` tokens into one row of ``head_dim`` channels.

    ratio r: a row is emitted every r tokens. overlap: the row also reads the r tokens before its window, through
    channels [0, d) of the projection while the window itself reads [d, 2d). rope_dim: trailing channels that are
    rotated. rotate: Hadamard rotation after RoPE. has_ape: per-slot score bias [r, N]. has_gate: the scores are
    projected from x; without a gate they are the ape alone, or zero. eps has no default on purpose.
    """

    ratio: int
    head_dim: int
    eps: float
    rope_dim: int
    overlap: bool = False
    rotate: bool = False
    has_ape: bool = True
    has_gate: bool = True
    rounding: Rounding = Rounding.REFERENCE

    def __post_init__(self) -> None:
        # Bounds of a model's, so that no product of sizes that a file states leaves 64 bits.
        for field, low, most in (("ratio", 1, MAX_RATIO), ("head_dim", 1, MAX_SIZE), ("rope_dim", 0, MAX_SIZE)):
            whole(field, getattr(self, field), low, most)
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise RangeError("rope_dim", f"an even number up to head_dim {self.head_dim}", self.rope_dim)
        if not (isinstance(self.eps, float) and math.isfinite(self.eps) and self.eps > 0):
            raise RangeError("eps", "a positive finite float", repr(self.eps))
        if not isinstance(self.rounding, Rounding):
            raise DtypeError("rounding", "a Rounding", repr(self.rounding))
        if self.rotate and self.head_dim & (self.head_dim - 1):
            raise UnsupportedError("rotate", "a head_dim that is a power of two", f"head_dim {self.head_dim}")

    @classmethod
    def csa(cls, config: ModelConfig, **changes: Any) -> CompressorSpec:
        """Main compressor of a CSA layer: ratio 4, overlapping windows."""
        ratios = [r for r in config.overlap_ratios if r in config.compress_ratios]
        if not ratios:
            raise UnsupportedError("config", "a model with overlapping windows", config.name)
        return _of(config, ratios[0], **changes)

    @classmethod
    def hca(cls, config: ModelConfig, **changes: Any) -> CompressorSpec:
        """Compressor of an HCA layer: ratio 128, separate windows."""
        ratios = {r for r in config.compress_ratios if r > 1 and r not in config.overlap_ratios}
        if not ratios or config.generation != "v4":
            raise UnsupportedError("config", "a DeepSeek-V4 model with HCA layers", config.name)
        return _of(config, max(ratios), **changes)

    @classmethod
    def indexer(cls, config: ModelConfig, **changes: Any) -> CompressorSpec:
        """Key compressor of the lightning indexer: as CSA at index_head_dim, then Hadamard."""
        return cls.csa(config, **{"head_dim": config.index_head_dim, "rotate": True, **changes})

    @classmethod
    def for_layer(cls, config: ModelConfig, layer: int, part: str = "main", **changes: Any) -> CompressorSpec:
        """The compressor that ``layer`` owns; ``part`` is ``"main"`` or, in a CSA layer, ``"indexer"``."""
        if part not in ("main", "indexer"):
            raise RangeError("part", "'main' or 'indexer'", repr(part))
        if part not in cls.parts_of_layer(config, layer):
            raise UnsupportedError("part", f"'main' (layer {layer} has no indexer compressor)", repr(part))
        return (
            _of(config, config.compress_ratios[layer], **changes) if part == "main" else cls.indexer(config, **changes)
        )

    @staticmethod
    def parts_of_layer(config: ModelConfig, layer: int) -> tuple[str, ...]:
        """Compressors that ``layer`` owns: the main one and, in a CSA layer, the indexer's; raises if it owns none."""
        if not config.owns_compressor(layer):
            owners = ", ".join(map(str, (*config.compressor_layers, *config.mtp_compressor_layers)))
            raise UnsupportedError("layer", f"a layer that owns a compressor ({owners})", layer)
        return ("main", "indexer") if config.compress_ratios[layer] in config.overlap_ratios else ("main",)

    @property
    def rounded(self) -> bool:
        """True if norm and RoPE leave rows in bf16, so that a cache's rounding changes none."""
        return self.rounding.latent and (self.rounding.rotated or not self.rope_dim) and not self.rotate

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return {**asdict(self), "rounding": self.rounding.value}

    @classmethod
    def from_dict(cls, entries: dict[str, Any], name: str) -> CompressorSpec:
        """``as_dict``, out of a file: no entry more, no entry less. Raises CheckpointError, which names ``name``."""
        names = {f.name for f in fields(cls)}
        if set(entries) != names:
            raise CheckpointError(name, f"the entries {', '.join(sorted(names))}", short(entries))
        return typed(entries, cls, name)

    @functools.cached_property
    def halves(self) -> int:
        """c: 2 if windows overlap, else 1."""
        return 2 if self.overlap else 1

    @functools.cached_property
    def width(self) -> int:
        """N = c * head_dim: projected kv channels, and as many score channels."""
        return self.halves * self.head_dim

    @functools.cached_property
    def window(self) -> int:
        """W = c * ratio: tokens that one row reads."""
        return self.halves * self.ratio

    @functools.cached_property
    def projected(self) -> int:
        """Channels of a kv_score row: 2N (kv first, then score), or N without a gate."""
        return self.width * (2 if self.has_gate else 1)

    @functools.cached_property
    def state_dim(self) -> int:
        """Channels of a state row: [kv | score + ape], or [kv] without a gate."""
        return self.projected

    def visible_rows(self, length: int) -> int:
        """Compressed rows that exist after ``length`` tokens: floor(length / ratio)."""
        return length // self.ratio

    def live_start(self, length: int) -> int:
        """First position that a request of ``length`` tokens must still hold in its state.

        The next row to be emitted is length // ratio; nothing before its first candidate is read again.
        """
        return max(0, (length // self.ratio) * self.ratio - (self.halves - 1) * self.ratio)

    def seed_rows(self, position: int) -> int:
        """State rows that a request needs to go on at ``position``: positions live_start(position) .. position - 1.

        0 at a window boundary without overlap, the previous window (4 for ratio 4) with overlap.
        """
        return require_int("position", position, 0) - self.live_start(position)

    def required_ring_rows(self, max_draft: int) -> int:
        """State rows per request so that the last ``max_draft`` rows of a step may be rejected.

        R >= max(W, V + W - 2) for steps of V rows that accept at least one (max_draft = V - 1), and V + W - 1 if all
        V may be rejected (max_draft = V).
        """
        if max_draft < 0:
            raise RangeError("max_draft", "at least 0", max_draft)
        return self.window - 1 + max(1, max_draft)


def _of(config: ModelConfig, ratio: int, **changes: Any) -> CompressorSpec:
    v4 = config.generation == "v4"
    fields: dict[str, Any] = {
        "ratio": ratio,
        "head_dim": config.head_dim,
        "eps": config.eps,
        "rope_dim": config.rope_dim,
        "overlap": ratio in config.overlap_ratios,
        "has_ape": v4,
        "has_gate": v4 or ratio > 1,
    }
    return CompressorSpec(**{**fields, **changes})
