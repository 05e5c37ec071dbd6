"""Safetensors whose header and tensors are bound together by digests: cache files and snapshots.

The metadata entry ``kvcondense`` is a JSON object, the header. Its ``tensors`` holds the digest of each tensor (dtype,
shape and bytes), its ``digest`` that of the header itself, ``tensors`` included: an edited or exchanged header is
noticed as a changed byte is. Digests are XXH3, 128 bits: here 8 GB/s, where BLAKE2b takes 0.9 and a copy 1.3. They
notice damage and mistakes. They are no signature: who can write the file can write its digests, too.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kvcondense.errors import CheckpointError, IntegrityWarning
from kvcondense.files.reading import clipped, parsed
from kvcondense.files.schema import typed
from kvcondense.files.tensors import TensorFile, told
from kvcondense.files.tensors import unpacked as from_bytes
from kvcondense.files.whole import replacing

_KEY = "kvcondense"
MAX_HEADER_BYTES = 1 << 20


def save(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write a sealed file; ``path`` keeps its old content until the new one is complete."""
    # safetensors' save_file writes another file, which takes the locked one's place, and which a killed process leaves.
    with replacing(path) as made, told(str(path), "room for the file"):
        made.write_bytes(pack(header, tensors))


def pack(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """The bytes of such a file."""
    from safetensors.torch import save as to_bytes

    return to_bytes(tensors, metadata=_seal(header, tensors))


class Sealed:
    """A sealed file or payload: ``header`` is as it was sealed; each tensor is checked as it is read.

    One of before there were digests (a schema in ``unsealed``) is read with an IntegrityWarning, and so is any with
    ``verify`` off, whose header is checked all the same.
    """

    def __init__(
        self,
        name: str,
        metadata: Mapping[str, str],
        source: TensorFile | dict[str, torch.Tensor],
        *,
        unsealed: tuple[int, ...] = (),
        verify: bool = True,
    ) -> None:
        self.name, self._source, self._digests = name, source, {}
        text = metadata.get(_KEY)
        if text is None or len(text) > MAX_HEADER_BYTES:
            wanted = f"a {_KEY!r} header of at most {MAX_HEADER_BYTES} bytes"
            raise CheckpointError(name, wanted, "none" if text is None else len(text))
        header = parsed(text, f"{name} header")
        self.names = frozenset(source.names if isinstance(source, TensorFile) else source)
        if header.get("schema") in unsealed and "digest" not in header:
            _note(f"{name} is of schema {header['schema']}, without digests: damage to it is not noticed")
        else:
            found, digests = header.pop("digest", None), header.get("tensors")
            if found != _of_header(header):
                raise CheckpointError(f"{name} header", "the digest that it was written with", "another header")
            self._digests = typed(digests, dict[str, str], f"{name} tensors")
            if set(self._digests) != self.names:
                got = clipped(", ".join(sorted(self.names)))
                raise CheckpointError(name, f"the tensors {', '.join(sorted(self._digests))}", got)
            if not verify:
                _note(f"digests of the {len(self.names)} tensors of {name} are not checked")
                self._digests = {}
        header.pop("tensors", None)
        self.header = header

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it; raises CheckpointError if it is not there."""
        if name not in self.names:
            raise CheckpointError(f"{self.name} {name}", "a tensor", "nothing")
        return self._source.shape(name) if isinstance(self._source, TensorFile) else tuple(self._source[name].shape)

    def tensor(self, name: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape and dtype; raises CheckpointError, the shape before anything is read."""
        label, got = f"{self.name} {name}", list(self.shape(name))
        if got != shape:
            raise CheckpointError(label, f"shape {shape}", f"shape {got}")
        tensor = self._source.read(name) if isinstance(self._source, TensorFile) else self._source[name]
        if tensor.dtype != dtype:
            raise CheckpointError(label, str(dtype), tensor.dtype)
        if self._digests and digest(tensor) != self._digests[name]:
            raise CheckpointError(label, "the bytes that its digest was made of", "others: the file is damaged")
        return tensor


@contextlib.contextmanager
def opened(path: Path, *, unsealed: tuple[int, ...] = (), verify: bool = True) -> Iterator[Sealed]:
    """A sealed file, its tensors read as they are asked for. Raises CheckpointError if it is none."""
    with TensorFile(path, most=2 * MAX_HEADER_BYTES) as file:
        yield Sealed(str(path), file.metadata, file, unsealed=unsealed, verify=verify)


def unpacked(payload: bytes, name: str, *, unsealed: tuple[int, ...] = ()) -> Sealed:
    """The bytes of ``pack``; sizes are checked before anything is read. Raises CheckpointError for any others."""
    if not isinstance(payload, bytes):
        raise CheckpointError(name, "bytes", type(payload).__name__)
    metadata, tensors = from_bytes(payload, name, 2 * MAX_HEADER_BYTES, "payload")
    return Sealed(name, metadata, tensors, unsealed=unsealed)


def digest(tensor: torch.Tensor) -> str:
    """XXH3 (128 bits) of dtype, shape and bytes, in hex."""
    import xxhash

    tensor = tensor.detach().cpu().contiguous()
    found = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _seal(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    # One entry: safetensors writes several in no fixed order.
    whole = {**header, "tensors": {name: digest(t) for name, t in tensors.items()}}
    return {_KEY: json.dumps({**whole, "digest": _of_header(whole)}, sort_keys=True)}


def _of_header(header: dict[str, Any]) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(header, sort_keys=True).encode())


def _note(text: str) -> None:
    warnings.warn(text, IntegrityWarning, stacklevel=4)
