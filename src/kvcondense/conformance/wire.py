"""Messages between the kit and an adapter in another process: a length, then a safetensors file that says what it is.

``docs/protocol.md`` has them all. Nothing that comes in is trusted: sizes, types and names are checked, and errors name
what is wrong. Nothing is executed on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvcondense.conformance.adapter import Setup
from kvcondense.errors import CheckpointError, KvCondenseError, UnsupportedError, require_known
from kvcondense.files.reading import clipped
from kvcondense.files.tensors import unpacked
from kvcondense.formats import FORMATS
from kvcondense.layout.batch import RaggedBatch
from kvcondense.rope_table import RopeTable
from kvcondense.spec import CompressorSpec, Rounding
from kvcondense.weights import CompressorWeights

VERSION = "1"
LENGTH_BYTES = 8
MAX_BYTES = 1 << 31
"""Of a message."""
MAX_HEADER_BYTES = 1 << 20
KINDS = ("hello", "init", "step", "rows", "state", "load", "reset", "done", "error")
_VERSION_KEY, _KIND_KEY = "kvcondense", "kind"
_SIZES = ("num_slots", "max_draft", "num_pages", "page_rows", "max_positions")
_STEP = {"query_start_loc": 1, "start_positions": 1, "draft_rows": 1, "state_slots": 1}
INTEGERS, FLOATS = (torch.int64,), (torch.float32,)


@dataclass(frozen=True)
class Message:
    """What came in: ``name`` is what errors call it."""

    name: str
    kind: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor]

    def tensor(self, name: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        """A tensor of this shape (None: any size), one of these types."""
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.name} {name}", "a tensor", "nothing")
        if found.dtype not in dtypes:
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(f"{self.name} {name}", wanted, str(found.dtype).removeprefix("torch."))
        pairs = zip(shape, found.shape, strict=False)
        if found.dim() != len(shape) or any(want not in (None, got) for want, got in pairs):
            wanted = ", ".join("any" if s is None else str(s) for s in shape)
            raise CheckpointError(f"{self.name} {name}", f"shape [{wanted}]", f"shape {list(found.shape)}")
        return found

    def integer(self, name: str) -> int:
        """The one value of an integer."""
        return int(self.tensor(name, (1,), INTEGERS))

    def text(self, name: str) -> str:
        """An entry of the metadata."""
        if name not in self.metadata:
            raise CheckpointError(f"{self.name} metadata {name}", "a text", "nothing")
        return self.metadata[name]

    def only(self, *names: str) -> None:
        """Raise for a tensor that is none of these."""
        for name in self.tensors:
            if name not in names:
                wanted = f"none but {', '.join(names)}" if names else "no tensor"
                raise CheckpointError(f"{self.name} {clipped(name)}", wanted, "another tensor")


def pack(kind: str, tensors: Mapping[str, torch.Tensor] | None = None, **metadata: str) -> bytes:
    """A message, its length included."""
    from safetensors.torch import save

    held = {name: t.detach().cpu().contiguous() for name, t in (tensors or {}).items()}
    body = save(held, metadata={_VERSION_KEY: VERSION, _KIND_KEY: kind, **metadata})
    if len(body) > MAX_BYTES:
        raise UnsupportedError(kind, f"a message of at most {MAX_BYTES} bytes", len(body))
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def length(head: bytes, name: str) -> int:
    """The length that a message begins with; raises CheckpointError for one that none can have."""
    size = int.from_bytes(head, "little")
    if not LENGTH_BYTES <= size <= MAX_BYTES:
        hint = "is something else printed on stdout?"
        raise CheckpointError(name, f"a length of {LENGTH_BYTES} to {MAX_BYTES} bytes", f"bytes {head!r}", hint)
    return size


def unpack(body: bytes, name: str) -> Message:
    """The message of these bytes; raises CheckpointError, which begins with ``name``, for what is none."""
    metadata, tensors = unpacked(body, name, MAX_HEADER_BYTES, "message")
    if metadata.get(_VERSION_KEY) != VERSION:
        got = clipped(metadata.get(_VERSION_KEY, "nothing"))
        raise CheckpointError(f"{name} metadata {_VERSION_KEY}", f"version {VERSION} of the protocol", got)
    kind = metadata.get(_KIND_KEY, "")
    require_known(f"{name} metadata {_KIND_KEY}", kind, KINDS, error=CheckpointError)
    return Message(name, kind, metadata, tensors)


def of_setup(setup: Setup) -> bytes:
    """init."""
    spec, weights = setup.spec, setup.weights
    if not spec.has_gate:
        raise UnsupportedError("spec", "a compressor with a gate", "one without")
    integers = {
        "ratio": spec.ratio,
        "head_dim": spec.head_dim,
        "rope_dim": spec.rope_dim,
        "overlap": int(spec.overlap),
        "rotate": int(spec.rotate),
        **{name: getattr(setup, name) for name in _SIZES},
    }
    tensors = {name: integer(value) for name, value in integers.items()}
    tensors |= {"eps": torch.tensor([spec.eps], dtype=torch.float64)}
    tensors |= {"norm": weights.norm, "cos": setup.rope.cos, "sin": setup.rope.sin}
    if weights.ape is not None:
        tensors["ape"] = weights.ape
    return pack("init", tensors, format=setup.format.name, rounding=spec.rounding.value)


def to_setup(message: Message) -> Setup:
    """The other way around."""
    flags = {name: bool(message.integer(name)) for name in ("overlap", "rotate")}
    dims: dict[str, Any] = {name: message.integer(name) for name in ("ratio", "head_dim", "rope_dim")}
    rounding, form = message.text("rounding"), message.text("format")
    require_known("rounding", rounding, [r.value for r in Rounding])
    require_known("format", form, FORMATS)
    spec = CompressorSpec(
        **dims,
        **flags,
        eps=float(message.tensor("eps", (1,), (torch.float64,))),
        has_ape="ape" in message.tensors,
        rounding=Rounding(rounding),
    )
    message.only(*dims, *flags, *_SIZES, "eps", "norm", "cos", "sin", "ape")
    norm = message.tensor("norm", (spec.head_dim,), FLOATS)
    ape = message.tensor("ape", (spec.ratio, spec.width), FLOATS) if spec.has_ape else None
    cos, sin = (message.tensor(name, (None, spec.rope_dim // 2), FLOATS) for name in ("cos", "sin"))
    sizes = {name: message.integer(name) for name in _SIZES}
    return Setup(spec, CompressorWeights(norm=norm, ape=ape), RopeTable(cos, sin), **sizes, format=FORMATS[form])


def of_step(kv_score: torch.Tensor, batch: RaggedBatch) -> bytes:
    """step."""
    if batch.state_slots is None:
        raise KvCondenseError("state_slots", "a slot of each request", "None")
    rows = {name: getattr(batch, name) for name in ("block_table", "slot_mapping")}
    given = {name: t for name, t in rows.items() if t is not None}
    if len(given) != 1:
        raise KvCondenseError("slot_mapping", "slot_mapping or block_table", "neither")
    tokens = kv_score.shape[0]
    if (mapping := given.get("slot_mapping")) is not None:  # a batch may have another number of spare tokens
        given["slot_mapping"] = torch.cat([mapping, mapping.new_full((tokens,), -1)])[:tokens]
    return pack("step", {"kv_score": kv_score.float(), **{name: getattr(batch, name) for name in _STEP}, **given})


def to_step(message: Message) -> tuple[torch.Tensor, RaggedBatch]:
    """The other way around."""
    found = {name: message.tensor(name, (None,) * dims, INTEGERS) for name, dims in _STEP.items()}
    for name, dims in (("block_table", 2), ("slot_mapping", 1)):
        if name in message.tensors:
            found[name] = message.tensor(name, (None,) * dims, INTEGERS)
    message.only("kv_score", *found)
    return message.tensor("kv_score", (None, None), FLOATS), RaggedBatch.build(**found)


def of_place(kind: str, batch: RaggedBatch, **more: torch.Tensor) -> bytes:
    """state and load: where the one request of ``batch`` stands."""
    if batch.state_slots is None or batch.start_positions.shape[0] != 1:
        raise KvCondenseError("batch", "one request, with a state slot", "another batch")
    return pack(kind, {"position": batch.start_positions, "slot": batch.state_slots, **more})


def to_place(message: Message) -> RaggedBatch:
    """The other way around."""
    return RaggedBatch.at(message.integer("position"), state_slot=message.integer("slot"))


def integer(value: int) -> torch.Tensor:
    """int64 [1]."""
    return torch.tensor([value], dtype=torch.int64)
