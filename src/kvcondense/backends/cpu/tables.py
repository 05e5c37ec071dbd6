"""Blocks of integers for kernels: what a spec and a cache format look like from inside. Made once each, then reused."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from kvcondense.backends.cpu import params
from kvcondense.errors import UnsupportedError
from kvcondense.formats import integers
from kvcondense.formats.descriptor import CacheFormat
from kvcondense.formats.integers import Part, float_bits, row_map
from kvcondense.formats.scales import Scale
from kvcondense.spec import CompressorSpec, Rounding

_SCALES = {
    "": -1,
    Scale.POW2_BYTE.name: params.POW2_BYTE,
    Scale.POW2_FP32.name: params.POW2_FP32,
    Scale.PLAIN_FP32.name: params.PLAIN_FP32,
    Scale.E4M3_BYTE.name: params.E4M3_BYTE,
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


def spec_block(spec: CompressorSpec, staged: int) -> array[int]:
    """``staged``: channels that are staged at once, 0 if all rows are fp32."""
    return _reuse((id(spec), staged), spec, lambda: _spec_block(spec, staged))


def format_block(form: CacheFormat, head_dim: int, page_rows: int, tensor_scale: float | None) -> array[int]:
    """How rows of ``form`` are encoded and lie in pages of ``page_rows`` rows."""
    key = (id(form), head_dim, page_rows, tensor_scale)
    return _reuse(key, form, lambda: _format_block(form, head_dim, page_rows, tensor_scale))


def _spec_block(spec: CompressorSpec, staged: int) -> array[int]:
    block = array("q", bytes(8 * params.SPEC_SIZE))
    for index, value in (
        (params.RATIO, spec.ratio),
        (params.WINDOW, spec.window),
        (params.HEAD_DIM, spec.head_dim),
        (params.WIDTH, spec.width),
        (params.HAS_GATE, int(spec.has_gate)),
        (params.ROUND, int(spec.rounding is Rounding.REFERENCE)),
        (params.ROTATE, int(spec.rotate)),
        (params.ROPE_DIM, spec.rope_dim),
        (params.EPS, float_bits(spec.eps)),
        (params.HADAMARD_SCALE, float_bits(spec.head_dim**-0.5)),
        (params.STAGED, staged),
    ):
        block[index] = value
    return block


def _format_block(form: CacheFormat, head_dim: int, page_rows: int, tensor_scale: float | None) -> array[int]:
    rows = row_map(form, head_dim, page_rows)
    block = array("q", bytes(8 * (params.FORMAT_HEAD + params.PART_SIZE * len(rows.parts))))
    for index, value in (
        (params.FORMAT_PAGE_ROWS, page_rows),
        (params.ROUND_ROW, int(rows.round_row)),
        (params.THROUGH, int(rows.through)),
        (params.PAD_BASE, rows.pad_base),
        (params.PAD_STRIDE, rows.pad_stride),
        (params.PAD_BYTES, rows.pad_bytes),
        (params.PARTS, len(rows.parts)),
    ):
        block[index] = value
    for k, part in enumerate(rows.parts):
        at = params.FORMAT_HEAD + params.PART_SIZE * k
        for index, value in _part(part, tensor_scale):
            block[at + index] = value
    return block


def _part(part: Part, tensor_scale: float | None) -> tuple[tuple[int, int], ...]:
    if part.scale and part.block % params.LANES:
        raise UnsupportedError("format", f"blocks of a multiple of {params.LANES} channels", part.block)
    if part.first % params.LANES or part.last % params.LANES:
        raise UnsupportedError("format", f"channels in multiples of {params.LANES}", f"{part.first}..{part.last}")
    return (
        (params.FIRST, part.first),
        (params.LAST, part.last),
        (params.ELEMENT, _ELEMENTS[part.element]),
        (params.BITS, part.bits),
        (params.MANTISSA, part.mantissa),
        (params.BIAS, part.bias),
        (params.MAX_CODE, part.max_code),
        (params.NAN_CODE, part.nan_code),
        (params.TIES_TO_EVEN, part.ties_to_even),
        (params.LARGEST, part.largest),
        (params.SCALE, _SCALES[part.scale]),
        (params.BLOCK, part.block),
        (params.FLOOR, part.floor),
        (params.FLOOR_EXPONENT, part.floor_exponent),
        (params.TENSOR_SCALE, 0 if tensor_scale is None else float_bits(tensor_scale)),
        (params.CODE_BASE, part.code_base),
        (params.CODE_STRIDE, part.code_stride),
        (params.SCALE_BASE, part.scale_base),
        (params.SCALE_STRIDE, part.scale_stride),
    )
