"""Triton's interpreter without most of its cost: it patches triton.language anew at every call of a device function.

That is a walk over hundreds of names, several times what the functions themselves take. It is left out where all of it
is patched already: the results are the same. A signal waits until a patch is whole, since half of one breaks what
comes after it.

What is left is not numpy's either: each operation makes the types of its operands and of its result from names and
lists, once more and always the same ones. They are kept.
"""

import signal
from functools import cache, wraps
from inspect import ismodule
from math import prod

import numpy as np

MOST = 4096
"""Numbers of kernels that are kept as tensors: none of them is ever written to."""


def patch_once():
    """Teach this process's interpreter, if Triton is installed."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return

    patch, builtin = _undisturbed(interpreter._patch_lang), tl.core.is_builtin

    @cache
    def languages(fn):
        return [m for m in fn.__globals__.values() if ismodule(m) and m in (tl, tl.core)]

    def patch_lang(fn):
        spoken = languages(fn)
        if not spoken or builtin(tl.tensor.__add__) or any(builtin(language.load) for language in spoken):
            scope = patch(fn)
            scope.restore = _undisturbed(scope.restore)
            return scope
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_lang
    if hasattr(interpreter.interpreter_semantic, "_cast_to_computation_type"):  # older ones: slow, as they are
        _keep_types(tl, interpreter)


def _keep_types(tl, interpreter):
    """Types, and what is asked of them, are made once; checks that say nothing are left out."""
    semantic, core = interpreter.interpreter_semantic, tl.core
    block, blocks, arrays, numbers = core.block_type.__init__, {}, {}, {}

    def block_type(self, element_ty, shape):
        key = element_ty.name, *(s.value if isinstance(s, core.constexpr) else s for s in shape)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])
        self.element_ty = element_ty

    def tensor(self, handle, type):
        kept = vars(type).get("of_tensors")
        if kept is None:
            shape = type.shape if type.is_block() else ()
            kept = core.constexpr(prod(shape)), core.tuple([core.constexpr(s) for s in shape])
            vars(type)["of_tensors"] = kept
            if type.is_block():
                blocks[(type.element_ty.name, *shape)]["of_tensors"] = kept
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = kept

    def np_dtype(tt_dtype, known=interpreter._get_np_dtype):
        if tt_dtype.name not in arrays:
            arrays[tt_dtype.name] = known(tt_dtype)
        return arrays[tt_dtype.name]

    def broadcast(lhs, rhs, full=semantic.broadcast_impl_value):
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block():
            return (lhs, rhs) if a.shape.values == b.shape.values else full(lhs, rhs)
        if not a.is_block() and not b.is_block():
            return lhs, rhs
        number, shape = (rhs, a.shape) if a.is_block() else (lhs, b.shape)
        splats = vars(number).get("splats")
        if splats is None:
            return full(lhs, rhs)
        shape = *shape.values, lhs is number
        if shape not in splats:
            splats[shape] = full(lhs, rhs)[rhs is number]
        return (splats[shape], rhs) if lhs is number else (lhs, splats[shape])

    def computed(value, dtype, full=semantic._cast_to_computation_type):
        if isinstance(value, core.tensor):
            return value if value.dtype is dtype else full(value, dtype)
        key = type(value), repr(value), dtype.name
        if (found := numbers.get(key)) is None:
            found = full(value, dtype)
            if len(numbers) < MOST:
                found.splats = {}
                numbers[key] = found
        return found

    def operands(lhs, rhs, *args, full=semantic.binary_op_type_checking_impl, **kwargs):
        """Where all are of one type, or a number takes that of a tensor, that is what they are computed in."""
        a, b = isinstance(lhs, core.tensor), isinstance(rhs, core.tensor)
        if a and b:
            if lhs.dtype is rhs.dtype and lhs.dtype.name in whole:
                return broadcast(lhs, rhs)
        elif (a or b) and type(rhs if a else lhs) in whole.get((dtype := (lhs if a else rhs).dtype).name, ()):
            return broadcast(computed(lhs, dtype), computed(rhs, dtype))
        return full(lhs, rhs, *args, **kwargs)

    def unwrap(o, full=core._unwrap_if_constexpr):
        return o if type(o) in plain else full(o)

    def equal(self, other, full=core.tuple.__eq__):
        plain = other.values if isinstance(other, core.tuple) else other
        if isinstance(plain, list) and all(type(x) is int for x in plain):
            return core.constexpr(self.values == plain)
        return full(self, other)

    def item(self, index, full=core.tuple.__getitem__):
        return self.values[index] if type(index) is int else full(self, index)

    def convert(data, source, target, rounding, full=interpreter._convert_float):
        """bf16 to fp32 is a shift; what the interpreter makes of subnormal numbers stays its own."""
        if (source.name, target.name) == ("bf16", "fp32") and not ((data - 1 & 0x7FFF) < 0x7F).any():
            return data.astype(np.uint32) << 16
        return full(data, source, target, rounding)

    def patch_attr(obj, name, member, _, scope):
        inner = member.__wrapped__ if member.__code__ is checked else member

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        scope.set_attr(obj, name, call)

    def same_type(self, other, full=core.dtype.__eq__):
        return self is other or full(self, other)

    checked = core.builtin(lambda: None).__code__  # that there is a _semantic
    whole = {"fp32": (float, int), "fp64": (float, int), "int32": (int,), "int64": (int,), "int1": (bool,)}
    plain = {core.tensor, int, float, bool}
    integers = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
    core.dtype.__eq__ = same_type
    core.dtype.is_int = lambda self: self.name in integers
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core._unwrap_if_constexpr = unwrap
    core.tuple.__eq__, core.tuple.__getitem__ = equal, item
    interpreter._convert_float = convert
    interpreter._get_np_dtype, interpreter._patch_attr = np_dtype, patch_attr
    semantic.broadcast_impl_value, semantic.binary_op_type_checking_impl = broadcast, operands
    semantic._cast_to_computation_type = computed
    semantic.computation_type_impl = cache(semantic.computation_type_impl)
    if not semantic.builder.options.debug:  # an overflow, once computed, is asserted in debug mode alone
        semantic.binary_op_sanitize_overflow_impl = lambda *_: None


def _undisturbed(call):
    """``call`` with the signals of tests held back meanwhile."""

    @wraps(call)
    def inner(*args):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM, signal.SIGINT})
        try:
            return call(*args)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return inner
