"""What config.json says of quantised matrices: the block of FP8 scales, and bits and groups of MLX."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcondense.config import config_of, json_of
from kvcondense.errors import CheckpointError


@dataclass(frozen=True)
class Settings:
    """Of one model. block: (rows, columns) that share an FP8 scale, None if nothing is said; mlx: its quantization."""

    block: tuple[int, int] | None = None
    mlx: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Settings:
        """From ``quantization_config.weight_block_size`` and ``quantization`` of the folder's config.json.

        Both are looked for in its text_config, too. Raises CheckpointError when they are not what they should be.
        """
        path = config_of(folder)
        if path is None:
            return cls()
        data = json_of(path)
        block, mlx = _mapping(path, data, "quantization_config"), _mapping(path, data, "quantization")
        return cls(_block(path, block.get("weight_block_size")), mlx)

    def groups(self, module: str) -> tuple[int, int]:
        """(group size, bits) of an MLX matrix; ``module`` is its name without ``.weight``, which may have its own."""
        own = self.mlx.get(module)
        entry = own if isinstance(own, dict) else self.mlx
        group, bits = entry.get("group_size"), entry.get("bits")
        mode = entry.get("mode", self.mlx.get("mode", "affine"))
        if mode != "affine":
            raise CheckpointError(module, "quantization mode affine in config.json", repr(mode)[:80])
        if type(group) is not int or type(bits) is not int or bits not in (2, 3, 4, 5, 6, 8) or not 8 <= group <= 1024:
            wanted = "quantization {group_size, bits} in config.json, bits 2, 3, 4, 5, 6 or 8"
            raise CheckpointError(module, wanted, f"group_size {group!r:.80}, bits {bits!r:.80}")
        return group, bits


def _mapping(path: Path, data: dict[str, Any], key: str) -> dict[str, Any]:
    for where in (data, data.get("text_config")):
        value = where.get(key) if isinstance(where, dict) else None
        if value is not None:
            if not isinstance(value, dict):
                raise CheckpointError(f"{path} {key}", "an object", type(value).__name__)
            return value
    return {}


def _block(path: Path, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, list) and len(value) == 2 and all(type(v) is int and 0 < v <= 1 << 20 for v in value)
    if not whole:
        raise CheckpointError(f"{path} weight_block_size", "two whole numbers above 0", f"{value!r:.80}")
    return value[0], value[1]
