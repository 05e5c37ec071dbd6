"""Blocks of integers for kernels: what a spec and a cache format look like from inside. Made once each, then reused."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import torch

from kvcondense.backends.cpu import params
from kvcondense.errors import UnsupportedError
from kvcondense.formats.descriptor import PAD, SCALES, CacheFormat, Channels
from kvcondense.formats.elements import INT8, Plain, SmallFloat, ceil_log2_ratio, fp32_bits
from kvcondense.formats.scales import Scale
from kvcondense.spec import CompressorSpec, Rounding

_SCALES = {
    Scale.POW2_BYTE: params.POW2_BYTE,
    Scale.POW2_FP32: params.POW2_FP32,
    Scale.PLAIN_FP32: params.PLAIN_FP32,
    Scale.E4M3_BYTE: params.E4M3_BYTE,
    Scale.INVERSE_FP32: params.INVERSE_FP32,
    Scale.TENSOR: params.TENSOR,
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
        (params.EPS, _bits(spec.eps)),
        (params.HADAMARD_SCALE, _bits(spec.head_dim**-0.5)),
        (params.STAGED, staged),
    ):
        block[index] = value
    return block


def _format_block(form: CacheFormat, head_dim: int, page_rows: int, tensor_scale: float | None) -> array[int]:
    fields = {f.name: f for f in form.fields(head_dim)}
    inner = form.through or form
    block = array("q", bytes(8 * (params.FORMAT_HEAD + params.PART_SIZE * len(inner.channels))))
    pad = fields.get(PAD)
    exact = form.plain is not None and form.plain.dtype == torch.float32
    for index, value in (
        (params.FORMAT_PAGE_ROWS, page_rows),
        (params.ROUND_ROW, int(not exact)),
        (params.THROUGH, int(form.through is not None)),
        (params.PAD_BASE, pad.base * page_rows + pad.offset if pad else 0),
        (params.PAD_STRIDE, pad.stride if pad else 0),
        (params.PAD_BYTES, pad.count if pad else 0),
        (params.PARTS, len(inner.channels)),
    ):
        block[index] = value
    for k, part in enumerate(inner.channels):
        at = params.FORMAT_HEAD + params.PART_SIZE * k
        entries = _part(part, head_dim, tensor_scale)
        code = fields[form.channels[0].name if form.through else part.name]
        entries[params.CODE_BASE], entries[params.CODE_STRIDE] = code.base * page_rows + code.offset, code.stride
        if SCALES in fields and part.scale is not None and form.through is None:
            scales = fields[SCALES]
            entries[params.SCALE_BASE] = scales.base * page_rows + scales.offset
            entries[params.SCALE_STRIDE] = scales.stride
        for index, value in entries.items():
            block[at + index] = value
    return block


def _bits(x: float) -> int:
    return int(fp32_bits(torch.tensor(x)))


def _part(part: Channels, head_dim: int, tensor_scale: float | None) -> dict[int, int]:
    last = head_dim if part.stop is None else part.stop
    entries = {
        params.FIRST: part.start,
        params.LAST: last,
        params.NAN_CODE: -1,
        params.SCALE: -1,
        params.FLOOR_EXPONENT: -127,
        **_element(part),
    }
    rule = part.scale
    if rule is not None:
        size = last - part.start if rule.block is None else rule.block
        entries |= {
            params.SCALE: _SCALES[rule.kind],
            params.BLOCK: size,
            params.FLOOR: 0 if rule.floor_on_scale else _bits(rule.floor),
            params.TENSOR_SCALE: 0 if tensor_scale is None else _bits(tensor_scale),
        }
        if rule.floor_on_scale:
            entries[params.FLOOR_EXPONENT] = int(ceil_log2_ratio(torch.tensor(rule.floor), 1.0))
        if size % params.LANES:
            raise UnsupportedError("format", f"blocks of a multiple of {params.LANES} channels", size)
    if part.start % params.LANES or last % params.LANES:
        raise UnsupportedError("format", f"channels in multiples of {params.LANES}", f"{part.start}..{last}")
    return entries


def _element(part: Channels) -> dict[int, int]:
    element = part.element
    if isinstance(element, SmallFloat):
        return {
            params.ELEMENT: params.SMALL_FLOAT,
            params.BITS: element.bits,
            params.MANTISSA: element.mantissa,
            params.BIAS: element.bias,
            params.MAX_CODE: element.max_code,
            params.NAN_CODE: -1 if element.nan_code is None else element.nan_code,
            params.TIES_TO_EVEN: int(element.ties_to_even),
            params.LARGEST: _bits(element.largest),
        }
    if element == INT8:
        return {params.ELEMENT: params.WHOLE, params.LARGEST: _bits(element.largest)}
    if isinstance(element, Plain) and element.dtype in (torch.bfloat16, torch.float32):
        return {params.ELEMENT: params.PLAIN16 if element.bits == 16 else params.PLAIN32, params.NAN_CODE: 0}
    raise UnsupportedError("format", "elements that the kernels know", element.name)
