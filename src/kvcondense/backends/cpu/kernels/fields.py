"""Blocks of the host as kernels read them: ``call.kv_stride`` is a field, ``call.window_request[e]`` an entry.

A block is its address, with a type that knows the list of fields, so that an access is one load or store at the address
plus a constant. Blocks and tables take an index, and are false if their address is 0.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typeconv.castgraph import Conversion
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, Signature, infer_global, signature
from numba.extending import (
    infer_getattr,
    lower_builtin,
    lower_cast,
    lower_getattr_generic,
    lower_setattr_generic,
    models,
    register_model,
)

from kvcondense.backends.cpu import blocks
from kvcondense.backends.cpu.kernels import simd

_I64 = ir.IntType(64)
_typing: Any = infer_global  # its own annotation says that it may give None


class _Address(types.Type):
    """Where items of ``size`` bytes lie. Functions of other objects take it as an integer."""

    size = 8

    def can_convert_to(self, typingctx: Any, other: types.Type) -> Any:  # noqa: ARG002 - as Numba calls it
        return Conversion.safe if other == types.int64 else None


class _Table(_Address):
    """int64 values."""


class _At(_Address):
    """A block, or several in a row."""

    def __init__(self, block: type[blocks.Block]) -> None:
        self.block, self.size = block, block.size
        super().__init__(name=f"at({block.__name__})")

    def kind(self, field: str) -> types.Type:
        """What a kernel gets for a field."""
        kind = self.block.kinds[field]
        kind = kind.of if isinstance(kind, blocks.Behind) else kind
        if isinstance(kind, type):
            return _At(kind)
        return {None: types.int64, blocks.TABLE: _TABLE, blocks.FP32_BITS: types.float32}[kind]


_TABLE = _Table("table")


def view(block: type[blocks.Block]) -> Any:
    """For kernels: a function that takes an address as that of a block."""

    @simd.operation(_At(block), types.int64)
    def at(b: Any, address: Any) -> Any:  # noqa: ARG001 - every operation gets a builder
        return address

    return at


@simd.operation(_TABLE, types.int64)
def integers(b: Any, address: Any) -> Any:  # noqa: ARG001
    """An address as that of int64 values."""
    return address


@register_model(_Table)
@register_model(_At)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: _Address) -> None:
        super().__init__(manager, fe_type, _I64)


@lower_cast(_Address, types.int64)
def _as_integer(context: Any, builder: Any, of: Any, to: Any, address: Any) -> Any:  # noqa: ARG001
    return address


@infer_getattr
class _Fields(AttributeTemplate):
    key = _At

    def generic_resolve(self, value: _At, attr: str) -> types.Type | None:
        return value.kind(attr) if attr in value.block.kinds else None


def _field(builder: Any, at: _At, address: Any, name: str) -> Any:
    return builder.add(address, ir.Constant(_I64, at.block.offsets[name]), flags=["nsw"])


@lower_getattr_generic(_At)
def _get(context: Any, builder: Any, at: _At, address: Any, name: str) -> Any:  # noqa: ARG001 - as Numba calls it
    field = _field(builder, at, address, name)
    if isinstance(at.block.kinds[name], blocks.Behind):
        return field
    value = simd.read(builder, field, _I64, 8)
    if at.kind(name) is not types.float32:
        return value
    return builder.bitcast(builder.trunc(value, ir.IntType(32)), ir.FloatType())


@lower_setattr_generic(_At)
def _set(context: Any, builder: Any, sig: Signature, operands: Any, name: str) -> None:  # noqa: ARG001
    address, value = operands
    simd.write(builder, _field(builder, sig.args[0], address, name), value, 8)


@_typing(operator.getitem)
class _Item(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Signature | None:  # noqa: ARG002
        where, _ = args
        if not isinstance(where, _Address):
            return None
        return signature(types.int64 if where is _TABLE else where, where, types.int64)


@_typing(operator.setitem)
class _SetItem(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Signature | None:  # noqa: ARG002
        return signature(types.void, _TABLE, types.int64, types.int64) if args[0] is _TABLE else None


@_typing(bool)
@_typing(operator.not_)
class _Truth(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Signature | None:  # noqa: ARG002
        return signature(types.boolean, *args) if isinstance(args[0], _Address) else None


def _item(builder: Any, where: _Address, address: Any, index: Any) -> Any:
    return builder.add(address, builder.mul(index, ir.Constant(_I64, where.size), flags=["nsw"]), flags=["nsw"])


@lower_builtin(operator.getitem, _Address, types.int64)
def _get_item(context: Any, builder: Any, sig: Signature, operands: Any) -> Any:  # noqa: ARG001
    item = _item(builder, sig.args[0], *operands)
    return simd.read(builder, item, _I64, 8) if sig.args[0] is _TABLE else item


@lower_builtin(operator.setitem, _Table, types.int64, types.int64)
def _set_item(context: Any, builder: Any, sig: Signature, operands: Any) -> Any:
    address, index, value = operands
    simd.write(builder, _item(builder, sig.args[0], address, index), value, 8)
    return context.get_dummy_value()


@lower_builtin(bool, _Address)
def _is_true(context: Any, builder: Any, sig: Signature, operands: Any) -> Any:  # noqa: ARG001
    return builder.icmp_signed("!=", operands[0], ir.Constant(_I64, 0))


@lower_builtin(operator.not_, _Address)
def _is_false(context: Any, builder: Any, sig: Signature, operands: Any) -> Any:  # noqa: ARG001
    return builder.icmp_signed("==", operands[0], ir.Constant(_I64, 0))
