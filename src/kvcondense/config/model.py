"""What the compressors of one model need to know, checked whoever says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvcondense.config.values import EPS, FACTOR, MAX_RATIO, THETA, TURNS, number, whole
from kvcondense.errors import RangeError, ShapeError, UnsupportedError
from kvcondense.files.reading import short


@dataclass(frozen=True)
class Yarn:
    """YaRN stretch of the RoPE frequencies; the magnitude scale is 1 (DeepSeek's reference applies no mscale)."""

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float

    def __post_init__(self) -> None:
        number("factor", self.factor, FACTOR)
        whole("original_max_positions", self.original_max_positions)
        if number("beta_fast", self.beta_fast, TURNS) < number("beta_slow", self.beta_slow, TURNS):
            raise RangeError("beta_fast", f"at least beta_slow, {self.beta_slow}", self.beta_fast)


@dataclass(frozen=True)
class ModelConfig:
    """What the compressors of one model need to know.

    ``compress_ratios`` has at least one entry per layer; those past ``num_hidden_layers`` belong to MTP and DSpark
    layers, as many as the checkpoint has (a model cut to its first layers may keep the whole list). In generation
    ``"v4"`` 0 and 1 mean "no compressor"; in ``"v4.1"`` 0 does, and only ``kv_source_layers`` own a compressor.
    ``overlap_ratios`` are the ratios whose windows overlap. ``eps`` has no default: V4 uses 1e-6, V4.1 uses 1e-20.
    """

    name: str
    generation: str
    hidden_size: int
    num_hidden_layers: int
    compress_ratios: tuple[int, ...]
    eps: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_positions: int
    head_dim: int
    rope_dim: int
    index_head_dim: int
    overlap_ratios: tuple[int, ...]
    kv_source_layers: tuple[int, ...] | None = None

    DEMO: ClassVar[ModelConfig]
    FLASH: ClassVar[ModelConfig]
    PRO: ClassVar[ModelConfig]
    V41_FLASH: ClassVar[ModelConfig]

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_hidden_layers", "max_positions", "head_dim", "index_head_dim"):
            whole(field, getattr(self, field))
        if whole("rope_dim", self.rope_dim, low=0) % 2 or self.rope_dim > self.head_dim:
            raise RangeError("rope_dim", f"an even number up to head_dim {self.head_dim}", self.rope_dim)
        number("eps", self.eps, EPS)
        number("compress_rope_theta", self.compress_rope_theta, THETA)
        if self.generation not in ("v4", "v4.1"):
            raise UnsupportedError("generation", "'v4' or 'v4.1'", short(self.generation))
        if len(self.compress_ratios) < self.num_hidden_layers:
            raise ShapeError(
                "compress_ratios", f"at least {self.num_hidden_layers} entries", f"{len(self.compress_ratios)} entries"
            )
        for i, ratio in enumerate(self.compress_ratios):
            whole(f"compress_ratios[{i}]", ratio, 0, MAX_RATIO)
        for layer in self.kv_source_layers or ():
            if not 0 <= layer < len(self.compress_ratios) or self.compress_ratios[layer] == 0:
                raise RangeError("kv_source_layers", "layers with a compress ratio above 0", layer)

    def owns_compressor(self, layer: int) -> bool:
        """True if ``layer`` has compressor weights of its own; MTP layers are numbered on from the main ones."""
        if not 0 <= layer < len(self.compress_ratios):
            raise RangeError("layer", f"0..{len(self.compress_ratios) - 1}", layer)
        if self.kv_source_layers is not None:
            return layer in self.kv_source_layers
        return self.compress_ratios[layer] > 1

    @property
    def compressor_layers(self) -> tuple[int, ...]:
        """Main layers that own a compressor, in order."""
        return tuple(i for i in range(self.num_hidden_layers) if self.owns_compressor(i))

    @property
    def mtp_compressor_layers(self) -> tuple[int, ...]:
        """Layers past the main ones whose entry says that they own a compressor, if the checkpoint has them."""
        return tuple(i for i in range(self.num_hidden_layers, len(self.compress_ratios)) if self.owns_compressor(i))

    def mtp_index(self, layer: int) -> int | None:
        """Which MTP layer ``layer`` is, from 0 on; None for a main layer."""
        return layer - self.num_hidden_layers if layer >= self.num_hidden_layers else None

    @classmethod
    def from_json(cls, path: str | Path) -> ModelConfig:
        """Read ``config.json`` of a DeepSeek-V4 or V4.1 model, or the one in a model's folder, in any known spelling.

        DeepSeek's own, transformers', engines' that save it again, a multimodal model's ``text_config``, and
        DeepSeek's ``inference/config.json`` (of a folder: where there is no other). Raises a ``KvCondenseError`` that
        names file and key when one is missing, malformed, not understood or contradicts another.
        """
        from kvcondense.config.reader import read

        return read(Path(path))
