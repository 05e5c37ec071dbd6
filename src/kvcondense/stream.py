"""Hidden states of one layer, from a file, through its compressors: chunked, resumable, with a self-describing result.

A result is a cache file (``cachefile.py``). It depends on the tokens alone, not on how they were cut into chunks or
runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvcondense.api import compress
from kvcondense.cachefile import PAGE_TOKENS, CacheFile, CachePart, empty_cache, first_difference
from kvcondense.config import ModelConfig, config_of
from kvcondense.errors import CheckpointError, KvCondenseError, RangeError, ShapeError, UnsupportedError
from kvcondense.files.reading import short
from kvcondense.files.tensors import TensorFile
from kvcondense.formats import FORMATS, CacheFormat, get_format
from kvcondense.layout.batch import RaggedBatch
from kvcondense.layout.cache import PagedCache
from kvcondense.layout.snapshot import export_live, import_live
from kvcondense.layout.state import StatePool
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights


@dataclass
class Compressor:
    """One compressor on its way through a sequence."""

    spec: CompressorSpec
    weights: CompressorWeights
    weights_sha256: dict[str, str]
    state: StatePool
    cache: PagedCache


@dataclass(frozen=True)
class HiddenFile:
    """Hidden states [T, D] or [1, T, D] of consecutive positions, read in slices."""

    path: Path
    name: str
    tokens: int
    hidden_size: int
    first_position: int | None
    """Position of the first token; None if nobody says so, see ``Sequence.feed``."""
    batched: bool

    @classmethod
    def open(cls, path: Path, layer: int, first_position: int | None = None, tensor: str | None = None) -> HiddenFile:
        """Find the tensor: ``tensor``, or layers.<layer>.hidden_states, hidden_states, or the only one in the file.

        The first position is the argument, or the file's metadata entry ``first_position``, or open.
        """
        with TensorFile(path) as file:
            names = sorted(file.names)
            wanted = [tensor] if tensor else [f"layers.{layer}.hidden_states", "hidden_states"]
            name = next((n for n in wanted if n in names), None)
            if name is None and tensor is None and len(names) == 1:
                name = names[0]
            if name is None:
                raise CheckpointError(str(path), f"a tensor called {' or '.join(wanted)}", ", ".join(names[:8]))
            shape, metadata = list(file.shape(name)), file.metadata
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
            raise ShapeError(f"{path} {name}", "shape [T, D] or [1, T, D]", f"shape {shape}")
        if first_position is None:
            text = metadata.get("first_position")
            if text is not None and not (text.isdecimal() and len(text) < 19):
                raise CheckpointError("first_position in the file's metadata", "a whole number", short(text))
            first_position = None if text is None else int(text)
        if first_position is not None and first_position < 0:
            raise RangeError("first_position", "at least 0", first_position)
        return cls(path, name, shape[-2], shape[-1], first_position, len(shape) == 3)

    def read(self, start: int, end: int) -> torch.Tensor:
        """Hidden states of tokens start .. end - 1 of the file: [end - start, D]."""
        at = slice(start, end)
        with TensorFile(self.path) as file:
            return file.slice(self.name, 0, at) if self.batched else file.slice(self.name, at)


@dataclass
class Sequence:
    """The compressors of a layer after ``position`` tokens."""

    config: ModelConfig
    layer: int
    parts: dict[str, Compressor]
    position: int = 0
    last_hidden: str = ""
    """Digest of the hidden state at position - 1, to notice a file that does not continue the sequence."""
    torn: bool = False
    """True while a chunk is on its way through the compressors: what they hold is then of no one position."""

    @classmethod
    def start(
        cls,
        checkpoint: Path,
        layer: int,
        *,
        format: str = "bf16",
        indexer_format: str | None = None,
        page_tokens: int = PAGE_TOKENS,
        tensor_scale: float | None = None,
        strict: bool = True,
        rotate: bool = True,
        rounding: Rounding = Rounding.REFERENCE,
    ) -> Sequence:
        """Load the compressors that ``layer`` of a model directory owns; ``rotate`` concerns the indexer's alone.

        The indexer's rows are in ``indexer_format``, or in ``format`` if that fits them. ``page_tokens``,
        ``tensor_scale`` and ``strict``: see ``cachefile.empty_cache`` and ``PagedCache``.
        """
        if config_of(checkpoint) is None:
            raise CheckpointError(str(checkpoint), "a model directory with config.json", "none there")
        config = ModelConfig.from_json(checkpoint)
        mtp = config.mtp_index(layer)
        if tensor_scale is not None and not any(get_format(f).tensor_scale for f in (format, indexer_format or format)):
            raise KvCondenseError("tensor_scale", f"None ({format} has no scale for the whole cache)", tensor_scale)
        loaded = {}
        for part in CompressorSpec.parts_of_layer(config, layer):
            spec = CompressorSpec.for_layer(config, layer, part, rounding=rounding)
            fmt = get_format(format)
            if part == "indexer":
                spec, fmt = replace(spec, rotate=rotate), _indexer_format(spec, format, indexer_format)
            cache = empty_cache(spec, fmt, 0, page_tokens=page_tokens, tensor_scale=tensor_scale, strict=strict)
            hidden_size = config.hidden_size
            weights = CompressorWeights.load(checkpoint, spec, layer, hidden_size=hidden_size, part=part, mtp=mtp)
            loaded[part] = Compressor(spec, weights, _digests(weights), StatePool.ring(spec, 1), cache)
        return cls(config, layer, loaded)

    def file(self) -> CacheFile:
        """The sequence as a cache file; rows are shared, not copied. Raises if a chunk was broken off."""
        self._check_whole()
        at = self._at(self.position)
        parts = {
            name: CachePart(c.spec, c.weights_sha256, c.cache, export_live(c.spec, c.state, at))
            for name, c in self.parts.items()
        }
        return CacheFile(self.layer, self.position, self.last_hidden, parts)

    def save(self, path: Path) -> None:
        """Write rows, live state and header to ``path``, which keeps its old content until the new one is complete."""
        self.file().save(path)

    def resume(self, path: Path, *, verify: bool = True) -> None:
        """Take over rows, state and position of a saved sequence; raises if it is not one of these compressors.

        verify: see ``CacheFile.load``.
        """
        file = CacheFile.load(path, verify=verify)
        wanted = {**self.file().header(), "position": file.position, "last_hidden_sha256": file.last_hidden}
        for name, c in self.parts.items():
            if name in file.parts and isinstance(file.parts[name].weights_sha256, str):  # schema 2
                wanted["parts"][name]["weights_sha256"] = _digest(*_tensors(c.weights).values())
        if (difference := first_difference(wanted, file.header())) is not None:
            where, expected, got = difference
            raise KvCondenseError(f"{path} {where}", expected, got)
        self.torn = True
        for name, c in self.parts.items():
            found = file.parts[name].cache
            scales = [None if s is None else float(s) for s in (c.cache.tensor_scale, found.tensor_scale)]
            if scales[0] != scales[1]:
                raise KvCondenseError(f"{path} {name}.scales", str(scales[0]), scales[1])
            c.cache = replace(found, strict=c.cache.strict)
            import_live(c.spec, c.state, self._at(file.position), file.parts[name].state)
        self.position, self.last_hidden, self.torn = file.position, file.last_hidden, False

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
        self._check_whole()
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
            c.cache = _grown(c.cache, c.spec.visible_rows(end))
        while self.position < end:
            stop = min(end, self.position + chunk)
            x = hidden.read(self.position - offset, stop - offset)
            done, last_hidden = stop - self.position, _digest(x[-1])
            self.torn = True
            for number, c in enumerate(self.parts.values()):
                try:
                    self._compress(c, x, stop, rope, impl)
                except KvCondenseError:
                    self.torn = number > 0  # raised before this one wrote anything
                    raise
            self.position, self.last_hidden = stop, last_hidden
            self.torn = False
            progress(done)
        return end - first

    def _compress(self, c: Compressor, x: torch.Tensor, stop: int, rope: RopeTable, impl: str) -> None:
        # The pages of the sequence follow one another: slot and row index are the same number.
        pages = torch.arange(c.cache.data.shape[0], device="cpu")[None]
        batch = RaggedBatch.build(
            [0, stop - self.position],
            start_positions=[self.position],
            state_slots=[0],
            block_table=pages if pages.shape[1] else None,
        )
        cache = c.cache if pages.shape[1] else None
        compress(c.spec, x, c.weights, rope, batch, state=c.state, cache=cache, impl=impl)

    def _check_whole(self) -> None:
        if self.torn:
            raise KvCondenseError(
                "sequence",
                "one whose chunks went through all compressors",
                f"one that was broken off in the chunk from position {self.position}",
                "start again, or resume from the last file that was saved",
            )

    def locate(self, hidden: HiddenFile) -> int:
        """Position of the file's first token; raises unless the file goes on where the sequence stands."""
        if hidden.hidden_size != self.config.hidden_size:
            raise ShapeError(hidden.name, f"{self.config.hidden_size} channels", f"{hidden.hidden_size}")
        if hidden.first_position is None:
            return 0 if self._holds_last(hidden, 0) else self.position
        first, end = hidden.first_position, hidden.first_position + hidden.tokens
        if not first <= self.position <= end:
            raise RangeError("first_position", f"positions that reach {self.position}", f"{first}..{end - 1}")
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


def _indexer_format(spec: CompressorSpec, main: str, indexer: str | None) -> CacheFormat:
    """The format of an indexer's rows: its own, or the main rows' if that fits; the error says which do."""
    fmt = get_format(indexer or main)
    if indexer is None and fmt.head_dim not in (None, spec.head_dim):
        fitting = [f.name for f in FORMATS.values() if f.head_dim in (None, spec.head_dim)]
        raise UnsupportedError(
            "indexer_format",
            f"a format for the indexer's rows of {spec.head_dim} channels",
            f"none, and format {main} is for rows of {fmt.head_dim}",
            f"one of {', '.join(fitting)}",
        )
    return fmt


def _grown(cache: PagedCache, rows: int) -> PagedCache:
    """The same pages and as many zeroed ones as ``rows`` rows need."""
    more = max(0, -(-rows // cache.page_rows) - cache.data.shape[0])
    data = torch.cat([cache.data, cache.data.new_zeros(more, cache.data.shape[1])])
    scales, second = cache.scales, cache.second
    if scales is not None and scales.dim():
        scales = torch.cat([scales, scales.new_zeros(more, cache.page_rows)])
    if second is not None:
        second = torch.cat([second, second.new_zeros(more, *second.shape[1:])])
    return replace(cache, data=data, scales=scales, second=second)


def _tensors(weights: CompressorWeights) -> dict[str, torch.Tensor]:
    found = {"w": weights.w, "ape": weights.ape, "norm": weights.norm}
    return {name: t for name, t in found.items() if t is not None}


def _digests(weights: CompressorWeights) -> dict[str, str]:
    """Of what is computed with: the same for every scheme of names, and for every way to store the same values."""
    return {name: _digest(t) for name, t in _tensors(weights).items()}


def _digest(*tensors: torch.Tensor) -> str:
    """sha256 of the bytes of ``tensors``, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
