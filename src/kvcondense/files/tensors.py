"""Safetensors files: opened with bounds, every tensor by name, and whatever is wrong with one is a CheckpointError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvcondense.errors import CheckpointError
from kvcondense.files.reading import clipped, parsed, require_file
from kvcondense.files.schema import typed

MAX_HEADER_BYTES = 32 << 20
"""Of any file; safetensors itself would take 100 MB."""
_WHAT = "a valid safetensors file"


class TensorFile:
    """An open safetensors file, for ``with``. Raises CheckpointError for one that is none, or whose header is too long.

    No tensor is read before it is asked for; that all of them lie within the file is known from the start.
    """

    def __init__(self, path: Path, device: torch.device | str = "cpu", most: int = MAX_HEADER_BYTES) -> None:
        from safetensors import safe_open

        self.path = require_file(path, "a safetensors file")
        with told(str(path)):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
            if size > most:
                raise CheckpointError(str(path), f"a safetensors header of at most {most} bytes", size)
            self._handle: Any = safe_open(str(path), framework="pt", device=str(device))
            self.names = dict.fromkeys(self._handle.keys())  # in the file's order
            self.metadata: dict[str, str] = self._handle.metadata() or {}

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.__exit__(None, None, None)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        with self._of(name):
            return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Of a tensor, in safetensors' spelling (BF16, F8_E4M3), without reading it."""
        with self._of(name):
            return str(self._handle.get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""
        with self._of(name):
            return self._handle.get_tensor(name)

    def slice(self, name: str, *at: int | slice) -> torch.Tensor:
        """A part of a tensor; no more than that is read."""
        with self._of(name):
            return self._handle.get_slice(name)[at]

    @contextlib.contextmanager
    def _of(self, name: str) -> Iterator[None]:
        if name not in self.names:
            raise CheckpointError(name, f"to be in {self.path}", "a missing tensor")
        with told(f"{self.path} {name}"):
            yield


def unpacked(data: bytes, name: str, most: int, whole: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of the bytes of a safetensors file; the header's size is checked before anything is read.

    Raises CheckpointError, which begins with ``name``, for what is none, or has a header of more than ``most`` bytes.
    ``whole``: what the bytes are, to people.
    """
    from safetensors.torch import load

    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    if not 2 <= size <= min(most, len(data) - 8):
        got = f"{size} bytes in a {whole} of {len(data)}"
        raise CheckpointError(name, f"a safetensors header of at most {most} bytes, and within the {whole}", got)
    with told(name, "a safetensors file"):
        metadata = parsed(data[8 : 8 + size].decode(), f"{name} header").get("__metadata__", {})
        tensors = load(data)
    return typed(metadata, dict[str, str], f"{name} metadata"), tensors


@contextlib.contextmanager
def told(name: str, what: str = _WHAT) -> Iterator[None]:
    """What safetensors and torch raise of a file, as CheckpointError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, ValueError, TypeError, OverflowError, KeyError, AttributeError) as error:
        raise CheckpointError(name, what, clipped(error)) from error
    except OSError as error:
        raise CheckpointError(name, what, error.strerror or error) from error
