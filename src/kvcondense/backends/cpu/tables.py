"""Blocks of integers for kernels: what a spec and a cache format look like from inside. Made once each, then reused."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import fields

from kvcondense.backends.cpu import params
from kvcondense.errors import UnsupportedError
from kvcondense.formats import integers
from kvcondense.formats.descriptor import CacheFormat
from kvcondense.formats.integers import Part, float_bits, row_map
from kvcondense.formats.scales import POW2, Scale
from kvcondense.spec import CompressorSpec

_SCALES = {
    "": -1,
    **{kind.name: params.POW2 for kind in POW2},
    Scale.PLAIN_FP32.name: params.PLAIN_FP32,
    Scale.E4M3_BYTE.name: params.E4M3_BYTE,
    Scale.E4M3_TIMES.name: params.E4M3_TIMES,
    Scale.E4M3_INVERSE.name: params.E4M3_INVERSE,
    Scale.INVERSE_FP32.name: params.INVERSE_FP32,
    Scale.TENSOR.name: params.TENSOR,
}
_ELEMENTS = {
    integers.SMALL_FLOAT: params.SMALL_FLOAT,
    integers.WHOLE: params.WHOLE,
    integers.PLAIN16: params.PLAIN16,
    integers.PLAIN32: params.PLAIN32,
}

_MOST = 256
_blocks: dict[tuple[object, ...], tuple[object, array[int]]] = {}


def _reuse(key: tuple[object, ...], owner: object, make: Callable[[], array[int]]) -> array[int]:
    """The block under ``key``, which has the id of ``owner``: hashing a spec or format would take longer than a launch.

    The entry keeps its owner alive, so that the id stays its own.
    """
    known = _blocks.get(key)
    if known is None:
        if len(_blocks) >= _MOST:
            _blocks.clear()
        known = _blocks[key] = (owner, make())
    return known[1]


def spec_block(spec: CompressorSpec) -> array[int]:
    """What a compressor computes."""
    return _reuse((id(spec),), spec, lambda: _spec_block(spec))


def format_block(form: CacheFormat, head_dim: int, page_rows: int, tensor_scale: float | None) -> array[int]:
    """How rows of ``form`` are encoded and lie in pages of ``page_rows`` rows."""
    key = (id(form), head_dim, page_rows, tensor_scale)
    return _reuse(key, form, lambda: _format_block(form, head_dim, page_rows, tensor_scale))


def _spec_block(spec: CompressorSpec) -> array[int]:
    block = params.Spec()
    block.ratio, block.window, block.head_dim, block.width = spec.ratio, spec.window, spec.head_dim, spec.width
    block.has_gate = spec.has_gate
    block.round_pooled, block.round_latent = spec.rounding.pooled, spec.rounding.latent
    block.round_rotated, block.round_row = spec.rounding.rotated, spec.rounding.row
    block.rotate, block.rope_dim = spec.rotate, spec.rope_dim
    block.rounded = spec.rounded
    block.eps = float_bits(spec.eps)
    block.hadamard_scale = float_bits(spec.head_dim**-0.5)
    return block.pack()


def _format_block(form: CacheFormat, head_dim: int, page_rows: int, tensor_scale: float | None) -> array[int]:
    rows = row_map(form, head_dim, page_rows)  # whether a profile rounds rows first is the spec's, see Spec.round_row
    block = params.Format()
    block.page_rows = page_rows
    block.round_row = 2 if rows.round_row and not form.keeps_row(exact=True) else rows.round_row
    block.inner_count = len(rows.inner)
    block.pad_base, block.pad_stride, block.pad_bytes = rows.pad_base, rows.pad_stride, rows.pad_bytes
    block.part_count = len(rows.inner) + len(rows.parts)
    packed = block.pack()
    for part in (*rows.inner, *rows.parts):
        packed += _part(part, tensor_scale)
    return packed


def _part(part: Part, tensor_scale: float | None) -> array[int]:
    if part.scale and part.block % params.CHANNELS:
        raise UnsupportedError("format", f"blocks of a multiple of {params.CHANNELS} channels", part.block)
    if part.first % params.CHANNELS or part.last % params.CHANNELS:
        raise UnsupportedError("format", f"channels in multiples of {params.CHANNELS}", f"{part.first}..{part.last}")
    block = params.Part()
    for field in fields(part):
        setattr(block, field.name, getattr(part, field.name))
    block.element, block.scale = _ELEMENTS[part.element], _SCALES[part.scale]
    block.tensor_scale = 0 if tensor_scale is None else float_bits(tensor_scale)
    return block.pack()
