"""Hidden states of one layer, from a file, through its compressors: chunked, resumable, with a self-describing result.

A result is a safetensors file: ``<part>.rows`` [n, head_dim] in the cache format, ``<part>.state`` [live, state_dim]
fp32 (the rows that the next token needs), and a JSON header. It depends on the tokens alone, not on how they were cut
into chunks or runs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvcondense.api import compress
from kvcondense.config import ModelConfig
from kvcondense.errors import CheckpointError, KvCondenseError, RangeError, ShapeError
from kvcondense.formats import get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights, open_safetensors

SCHEMA = 1
_HEADER = "kvcondense"
_MAX_HEADER_BYTES = 1 << 20


@dataclass
class Compressor:
    """One compressor on its way through a sequence."""

    spec: CompressorSpec
    weights: CompressorWeights
    weights_sha256: str
    state: StatePool
    rows: torch.Tensor


@dataclass(frozen=True)
class HiddenFile:
    """Hidden states [T, D] or [1, T, D] of consecutive positions, read in slices."""

    path: Path
    name: str
    tokens: int
    hidden_size: int
    first_position: int | None
    """Position of the first token; None if nobody says so, see :meth:`Sequence.feed`."""
    batched: bool

    @classmethod
    def open(cls, path: Path, layer: int, first_position: int | None = None, tensor: str | None = None) -> HiddenFile:
        """Find the tensor: ``tensor``, or layers.<layer>.hidden_states, hidden_states, or the only one in the file.

        The first position is the argument, or the file's metadata entry ``first_position``, or open.
        """
        with open_safetensors(path) as handle:
            names = list(handle.keys())
            wanted = [tensor] if tensor else [f"layers.{layer}.hidden_states", "hidden_states"]
            name = next((n for n in wanted if n in names), None)
            if name is None and tensor is None and len(names) == 1:
                name = names[0]
            if name is None:
                raise CheckpointError(str(path.name), f"a tensor called {' or '.join(wanted)}", ", ".join(names[:8]))
            shape = list(handle.get_slice(name).get_shape())
            metadata = handle.metadata() or {}
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
            raise ShapeError(name, "shape [T, D] or [1, T, D]", f"shape {shape}")
        if first_position is None:
            text = metadata.get("first_position")
            if text is not None and not text.isdecimal():
                raise CheckpointError("first_position in the file's metadata", "a whole number", repr(text))
            first_position = None if text is None else int(text)
        if first_position is not None and first_position < 0:
            raise RangeError("first_position", "at least 0", first_position)
        return cls(path, name, shape[-2], shape[-1], first_position, len(shape) == 3)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Hidden states of tokens start .. end - 1 of the file: [end - start, D]."""
        with open_safetensors(self.path) as handle:
            view = handle.get_slice(self.name)
            return view[0, start:end] if self.batched else view[start:end]


@dataclass
class Sequence:
    """The compressors of a layer after ``position`` tokens."""

    config: ModelConfig
    layer: int
    format: str
    parts: dict[str, Compressor]
    position: int = 0
    last_hidden: str = ""
    """Digest of the hidden state at position - 1, to notice a file that does not continue the sequence."""

    @classmethod
    def start(
        cls,
        checkpoint: Path,
        layer: int,
        *,
        format: str = "bf16",
        rotate: bool = True,
        rounding: Rounding = Rounding.REFERENCE,
    ) -> Sequence:
        """Load the compressors that ``layer`` of a model directory owns; ``rotate`` concerns the indexer's alone."""
        config_file = checkpoint / "config.json"
        if not config_file.is_file():
            raise CheckpointError(str(checkpoint), "a model directory with config.json", "none there")
        config = ModelConfig.from_json(config_file)
        element = get_format(format).element
        loaded = {}
        for part in CompressorSpec.parts_of_layer(config, layer):
            spec = CompressorSpec.for_layer(config, layer, part, rounding=rounding)
            if part == "indexer":
                spec = replace(spec, rotate=rotate)
            weights = CompressorWeights.load(checkpoint, spec, layer, hidden_size=config.hidden_size, part=part)
            digest = _digest(*(t for t in (weights.w, weights.ape, weights.norm) if t is not None))
            rows = torch.empty(0, spec.head_dim, dtype=element)
            loaded[part] = Compressor(spec, weights, digest, StatePool.ring(spec, 1), rows)
        return cls(config, layer, format, loaded)

    def header(self) -> dict[str, Any]:
        """What a file needs to say so that somebody else can go on with it."""

        def describe(c: Compressor) -> dict[str, Any]:
            spec = {**asdict(c.spec), "rounding": c.spec.rounding.value}
            return {"spec": spec, "weights_sha256": c.weights_sha256, "state_dtype": "float32"}

        return {
            "schema": SCHEMA,
            "layer": self.layer,
            "format": self.format,
            "position": self.position,
            "last_hidden_sha256": self.last_hidden,
            "parts": {name: describe(c) for name, c in self.parts.items()},
        }

    def save(self, path: Path) -> None:
        """Write rows, live state and header to ``path``, which keeps its old content until the new one is complete."""
        from safetensors.torch import save_file

        tensors = {}
        for name, c in self.parts.items():
            tensors[f"{name}.rows"] = c.rows[: c.spec.visible_rows(self.position)].contiguous()
            tensors[f"{name}.state"] = export_live(c.spec, c.state, self._at(self.position))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, temporary, metadata={_HEADER: json.dumps(self.header(), sort_keys=True)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        """Take over rows, state and position of a saved sequence; raises if it is not one of these compressors."""
        with open_safetensors(path) as handle:
            found = _read_header(path, handle.metadata() or {})
            position = found.get("position")
            if isinstance(position, bool) or not isinstance(position, int) or position < 0:
                raise CheckpointError(f"{path.name} position", "a whole number", repr(position))
            wanted = {**self.header(), "position": position, "last_hidden_sha256": found.get("last_hidden_sha256")}
            for key, value in wanted.items():
                if found.get(key) != value:
                    raise KvCondenseError(f"{path.name} {key}", _short(value), _short(found.get(key)))
            batch = self._at(position)
            expected = {}
            for name, c in self.parts.items():
                live = position - c.spec.live_start(position)
                expected[f"{name}.rows"] = ([c.spec.visible_rows(position), c.spec.head_dim], c.rows.dtype)
                expected[f"{name}.state"] = ([live, c.spec.state_dim], c.state.data.dtype)
            tensors = {}
            for name, (shape, dtype) in expected.items():
                if name not in handle.keys():  # noqa: SIM118 - a handle is no dict
                    raise CheckpointError(f"{path.name} {name}", "a tensor", "nothing")
                got = list(handle.get_slice(name).get_shape())
                if got != shape:
                    raise CheckpointError(f"{path.name} {name}", f"shape {shape}", f"shape {got}")
                tensors[name] = handle.get_tensor(name)
                if tensors[name].dtype != dtype:
                    raise CheckpointError(f"{path.name} {name}", dtype, tensors[name].dtype)
        for name, c in self.parts.items():
            c.rows = tensors[f"{name}.rows"]
            import_live(c.spec, c.state, batch, tensors[f"{name}.state"])
        self.position, self.last_hidden = position, found["last_hidden_sha256"]

    def feed(
        self,
        hidden: HiddenFile,
        *,
        chunk: int = 1024,
        limit: int | None = None,
        impl: str = "auto",
        progress: Callable[[int], object] = id,
    ) -> int:
        """Compress the tokens of ``hidden`` from ``position`` on, at most ``limit`` of them; returns how many.

        A file that does not say where it starts holds the whole sequence if the token before ``position`` stands in it
        at its place, and further tokens otherwise. ``progress`` is called between chunks with the tokens done; if it
        raises, everything up to there is kept and can be saved.
        """
        offset = self.locate(hidden)
        for name, value in (("chunk", chunk), ("limit", limit)):
            if value is not None and value < 1:
                raise RangeError(name, "at least 1", value)
        first, end = self.position, offset + hidden.tokens
        if limit is not None:
            end = min(end, first + limit)
        if end > self.config.max_positions:
            raise RangeError("tokens", f"positions below {self.config.max_positions}", end)
        rope = RopeTable.build(self.config, end)
        for c in self.parts.values():
            c.rows = _grown(c.rows, c.spec.visible_rows(end))
        while self.position < end:
            stop = min(end, self.position + chunk)
            x = hidden.read(self.position - offset, stop - offset)
            for c in self.parts.values():
                self._compress(c, x, stop, rope, impl)
            self.last_hidden = _digest(x[-1])
            done, self.position = stop - self.position, stop
            progress(done)
        return end - first

    def _compress(self, c: Compressor, x: torch.Tensor, stop: int, rope: RopeTable, impl: str) -> None:
        batch = RaggedBatch.build(
            [0, stop - self.position], start_positions=[self.position], state_slots=[0], block_table=[[0]]
        )
        # One page that is as long as the sequence: slot and row index are the same number.
        cache = PagedCache.wrap(c.rows[None]) if c.rows.shape[0] else None
        if cache is None:
            batch = replace(batch, block_table=None)
        compress(c.spec, x, c.weights, rope, batch, state=c.state, cache=cache, impl=impl)

    def locate(self, hidden: HiddenFile) -> int:
        """Position of the file's first token; raises unless the file goes on where the sequence stands."""
        if hidden.hidden_size != self.config.hidden_size:
            raise ShapeError(hidden.name, f"{self.config.hidden_size} channels", f"{hidden.hidden_size}")
        if hidden.first_position is None:
            return 0 if self._holds_last(hidden, 0) else self.position
        first, end = hidden.first_position, hidden.first_position + hidden.tokens
        if not first <= self.position <= end:
            raise RangeError("hidden states", f"positions that reach {self.position}", f"{first}..{end - 1}")
        if self.position > first and not self._holds_last(hidden, first):
            raise KvCondenseError(
                "hidden states",
                f"the sequence that was compressed up to position {self.position}",
                f"another hidden state at position {self.position - 1}",
            )
        return first

    def _holds_last(self, hidden: HiddenFile, first: int) -> bool:
        """True if the file, when it starts at ``first``, has the last compressed token where it belongs."""
        at = self.position - first
        if not 0 < at <= hidden.tokens:
            return False
        return _digest(hidden.read(at - 1, at)[0]) == self.last_hidden

    @staticmethod
    def _at(position: int) -> RaggedBatch:
        return RaggedBatch.build([0, 0], start_positions=[position], state_slots=[0])


def _grown(rows: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(size - rows.shape[0], rows.shape[1])])


def _digest(*tensors: torch.Tensor) -> str:
    """sha256 of the bytes of ``tensors``, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    text = metadata.get(_HEADER)
    if text is None or len(text) > _MAX_HEADER_BYTES:
        raise CheckpointError(path.name, f"a {_HEADER!r} header of at most {_MAX_HEADER_BYTES} bytes", "none")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path.name} header", "a JSON object", error) from error
    if not isinstance(header, dict) or header.get("schema") != SCHEMA:
        raise CheckpointError(f"{path.name} header", f"an object of schema {SCHEMA}", _short(header))
    return header


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
