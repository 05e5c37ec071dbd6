"""Layers of transformers' cache that kvcondense fills: claimed, followed, copied and pickled, and given back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kvcondense.errors import UnsupportedError
from kvcondense.integrations.memory import Memory

CACHE = "past_key_values (cache)"


def memories(layer: Any) -> dict[str, Memory] | None:
    """What the compressors of a layer remember, by transformers' names of them; None for one that is not ours."""
    return getattr(layer, "kvcondense", None)


def is_new(layer: Any) -> bool:
    """Whether transformers' compressor has not run on this layer."""
    return getattr(layer, "compressed_kv", {}).get("compressor", layer) is None


def claim(layer: Any) -> None:
    """Make a new layer one of ours; mutates it."""
    layer.__class__ = _ours(type(layer))
    layer.kvcondense = {}


def release(layer: Any) -> None:
    """Make one of our layers transformers' own again, with what its compressors would have kept; mutates it.

    Raises UnsupportedError, before anything is written, if its sequences differ in length or its last call broke off.
    """
    held: dict[str, Memory] = layer.kvcondense
    seen = sorted({n for memory in held.values() for n in memory.seen})
    if len(seen) > 1 or any(memory.torn for memory in held.values()):
        got = f"sequences of {seen} tokens" if len(seen) > 1 else "one whose last call was broken off"
        raise UnsupportedError(
            CACHE, "a finished cache of sequences of one length, which transformers can continue", got
        )
    layer.__class__ = type(layer).of
    del layer.kvcondense
    for name, memory in held.items():
        if seen != [0]:
            tail = memory.tail()
            layer.compressed_kv[name], layer.entry_count[name] = memory.visible, memory.visible.shape[1]
            layer.buffer_kv[name], layer.buffer_gate[name] = tail.kv, tail.gate
            if tail.overlap is not None:
                layer.overlap_kv[name], layer.overlap_gate[name] = tail.overlap


def _rebuilt(kind: Any) -> Any:
    """A layer of ours without contents: what unpickling and copying begin with."""
    layer = kind.__new__(kind)
    layer.__class__ = _ours(kind)
    return layer


@functools.cache
def _ours(kind: Any) -> Any:
    """A layer of transformers' cache whose memories follow what is done to it; an object of ``kind`` can become one."""

    class Ours(kind):
        _layer_type = None  # not one that transformers makes by itself
        of = kind
        kvcondense: dict[str, Memory]

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _rebuilt, (kind,), dict(vars(self))

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            with self._select(lambda _: beam_idx):
                super().reorder_cache(beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            with self._select(lambda sequences: sequences.repeat_interleave(repeats)):
                super().batch_repeat_interleave(repeats)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            with self._select(lambda sequences: sequences[indices.cpu()]):
                super().batch_select_indices(indices)

        @contextlib.contextmanager
        def _select(self, chosen: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
            """Sequences of all memories beside those of the layer within; broken off, all of them say so."""
            held = list(self.kvcondense.values())
            was = [memory.torn for memory in held]
            for memory in held:
                memory.torn = True
            yield
            for memory in held:
                memory.select(chosen(torch.arange(len(memory.seen), device="cpu")))
            for memory, torn in zip(held, was, strict=True):
                memory.torn = torn

        def crop(self, tokens_to_remove: int) -> None:
            raise UnsupportedError("crop", "a cache without compressors", f"one to lose {tokens_to_remove} tokens")

        def reset(self) -> None:
            """Back to transformers' own layer, empty: whoever runs next decides anew."""
            self.kvcondense = {}
            release(self)
            self.reset()

        def store_compression_weights(self, name: str, kv: torch.Tensor, gate: torch.Tensor) -> Any:
            """What transformers' own compressor calls first: the layer is its own from here on."""
            release(self)
            return self.store_compression_weights(name, kv, gate)

    Ours.__name__ = f"Kvcondense{kind.__name__}"
    return Ours
