"""A stand-in for pypto.language that checks what a program says and computes nothing: shapes, bounds, types, buffers.

A program's function is run once, in Python, on tensors without values; scalars that it reads are integers given by the
test. Every operation is one that the language documents, with its arguments, and what a scope holds on chip at once
must fit. Whether results are right it cannot know: only a simulator or a chip can.
"""

import inspect
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

UNIFIED_BUFFER = 192 << 10
"""Bytes of a core's vector buffer (A2/A3), which all values of a scope share."""
ACCUMULATOR, LEFT, RIGHT = 128 << 10, 64 << 10, 64 << 10
"""Bytes of L0C, L0A and L0B: a product's result, and its operands a 128-deep slice at a time."""
ALIGNMENT = 32
"""Bytes that a row on chip is a multiple of."""


class Type:
    def __init__(self, name, size):
        self.name, self.size = name, size

    def __repr__(self):
        return self.name


FP32, BF16, INT32, INDEX = Type("FP32", 4), Type("BF16", 2), Type("INT32", 4), Type("INDEX", 8)


class Tensor:
    """Shape, type, whether it may be written, and its contents where a test gives them: nested lists of integers."""

    def __init__(self, shape, dtype, values=None, name="", direction="in", chip=False):
        self.shape, self.dtype, self.values, self.name = list(shape), dtype, values, name
        self.direction, self.chip = direction, chip

    @property
    def nbytes(self):
        rows, columns = (1, *self.shape)[-2:]
        return rows * -(-columns * self.dtype.size // ALIGNMENT) * ALIGNMENT

    def __class_getitem__(cls, item):
        shape, dtype = item
        return cls(shape, dtype)

    def __getitem__(self, item):
        return RECORDER.slice(self, item if isinstance(item, tuple) else (item,))


class Direction:
    def __init__(self, kind):
        self.kind = kind

    def __getitem__(self, tensor):
        tensor.direction = self.kind
        return tensor


class Recorder:
    """What was said, operation by operation."""

    def __init__(self):
        self.operations, self.scopes, self.held, self.scope = [], [], 0, None

    def say(self, name, *shapes):
        self.operations.append((name, *shapes))

    def result(self, name, shape, dtype):
        """A value on chip: what a scope makes."""
        assert self.scope is not None, f"{name} outside pl.at"
        assert len(shape) == 2, f"{name}: {shape}, tiles have two dimensions"
        made = Tensor(shape, dtype, chip=True)
        self.held = max(self.held, made.nbytes)
        self.live[name] = max(self.live.get(name, 0), made.nbytes)
        assert sum(self.live.values()) <= UNIFIED_BUFFER, f"{self.scope}: {self.live}"
        self.say(name, shape, dtype)
        return made

    @contextmanager
    def at(self, *, level, name_hint=""):
        assert level == "core group"
        assert self.scope is None, "a scope inside a scope"
        self.scope, self.live = name_hint, {}
        self.scopes.append(name_hint)
        yield
        self.scope = None

    def slice(self, tensor, item):
        shape = []
        assert len(item) == len(tensor.shape), (item, tensor.shape)
        for part, size in zip(item, tensor.shape, strict=True):
            assert isinstance(part, slice)
            assert part.step is None
            low, high = 0 if part.start is None else part.start, size if part.stop is None else part.stop
            assert 0 <= low < high <= size, f"{tensor.name}: {low}:{high} of {size}"
            shape.append(high - low)
        self.say("slice", shape, tensor.dtype)
        return Tensor(shape, tensor.dtype, name=tensor.name)

    def read(self, tensor, at):
        value = tensor.values
        for index in at:
            assert 0 <= index < len(value)
            value = value[index]
        self.say("read", tensor.name)
        return value

    def assemble(self, target, source, at):
        assert target.direction != "in", f"{target.name} is an input"
        assert target.dtype is source.dtype, f"{target.name}: {source.dtype} into {target.dtype}"
        for offset, part, size in zip(at, source.shape, target.shape, strict=True):
            assert 0 <= offset <= size - part, f"{target.name}: {at} {source.shape} in {target.shape}"
        self.say("assemble", target.name, at)
        return target

    def create_tensor(self, shape, *, dtype):
        assert self.scope is None, "create_tensor inside pl.at"
        self.say("create_tensor", shape, dtype)
        return Tensor(shape, dtype, name="a temporary", direction="inout")

    def full(self, shape, *, dtype, value):
        assert isinstance(value, float)
        return self.result("full", shape, dtype)

    def same(self, name, a, b):
        if isinstance(b, float):
            assert a.dtype is FP32
            return self.result(name, a.shape, a.dtype)
        assert a.shape == b.shape, (name, a.shape, b.shape)
        assert a.dtype is b.dtype is FP32, (name, a.dtype, b.dtype)
        return self.result(name, a.shape, a.dtype)

    def one(self, name, a):
        assert a.dtype is FP32
        return self.result(name, a.shape, a.dtype)

    def cast(self, a, *, target_type):
        if isinstance(a, int):
            assert target_type is INDEX
            return a
        assert {a.dtype, target_type} == {FP32, BF16}
        return self.result("cast", a.shape, target_type)

    def reshape(self, a, shape):
        assert shape[0] * shape[1] == a.shape[0] * a.shape[1]
        assert all(size * a.dtype.size % ALIGNMENT == 0 for size in (max(shape),))
        return self.result("reshape", shape, a.dtype)

    def row_sum(self, a):
        return self.result("row_sum", [a.shape[0], 1], a.dtype)

    def row_expand_mul(self, a, column):
        assert column.shape == [a.shape[0], 1]
        return self.result("row_expand_mul", a.shape, a.dtype)

    def col_expand_mul(self, a, row):
        assert row.shape == [1, a.shape[1]]
        return self.result("col_expand_mul", a.shape, a.dtype)

    def matmul(self, a, b, *, out_dtype, b_trans=False):
        assert a.dtype is b.dtype is BF16
        assert out_dtype is FP32
        (m, k), (n, other) = a.shape, b.shape if b_trans else b.shape[::-1]
        assert k == other, (a.shape, b.shape, b_trans)
        assert all(size % 16 == 0 for size in (m, k, n)), (m, k, n)
        assert m * n * 4 <= ACCUMULATOR
        assert m * min(k, 128) * 2 <= LEFT
        assert n * min(k, 128) * 2 <= RIGHT
        return self.result("matmul", [m, n], FP32)

    def matmul_acc(self, total, a, b, *, b_trans=False):
        made = self.matmul(a, b, out_dtype=FP32, b_trans=b_trans)
        assert total.shape == made.shape
        assert total.chip
        return made

    def range(self, *bounds):
        """The first three turns and the last: others differ from them in numbers alone."""
        turns = range(*bounds)
        self.say("range", len(turns))
        return sorted({turns[i] for i in (0, 1, 2, len(turns) - 1) if i < len(turns)}) if turns else []

    def parallel(self, *bounds):
        assert self.scope is None, "pl.parallel inside pl.at"
        return self.range(*bounds)


RECORDER = Recorder()


def language():
    """The module, fresh; ``recorded`` of it is what a program has said."""
    global RECORDER
    RECORDER = made = Recorder()
    pl = ModuleType("pypto.language")
    vars(pl).update(
        FP32=FP32, BF16=BF16, INT32=INT32, INDEX=INDEX, Tensor=Tensor, Out=Direction("out"), InOut=Direction("inout"),
        Level=SimpleNamespace(CORE_GROUP="core group"), FunctionType=SimpleNamespace(Opaque="opaque"),
        program=lambda cls: cls, inline=lambda f: f, function=lambda type: lambda f: f, recorded=made,
        add=lambda a, b: made.same("add", a, b), sub=lambda a, b: made.same("sub", a, b),
        mul=lambda a, b: made.same("mul", a, b), div=lambda a, b: made.same("div", a, b),
        maximum=lambda a, b: made.same("maximum", a, b), exp=lambda a: made.one("exp", a),
        sqrt=lambda a: made.one("sqrt", a), recip=lambda a: made.one("recip", a),
        **{name: getattr(made, name) for name in (
            "at", "read", "assemble", "create_tensor", "full", "cast", "reshape", "row_sum", "row_expand_mul",
            "col_expand_mul", "matmul", "matmul_acc", "range", "parallel",
        )},
    )  # fmt: skip
    return pl


def say(program, **values):
    """Run a program's function on tensors without values; ``values``: of the integers that it reads, by operand."""
    (function,) = (f for name, f in vars(program).items() if inspect.isfunction(f))
    operands = {}
    for name, tensor in inspect.get_annotations(function).items():
        if name != "return":
            tensor.name, tensor.values = name, values.get(name)
            operands[name] = tensor
    return function(None, **operands), operands


@contextmanager
def installed(pl):
    """As long as it lasts, ``import pypto.language`` finds ``pl``."""
    package = ModuleType("pypto")
    package.language = pl
    before = {name: sys.modules.get(name) for name in ("pypto", "pypto.language")}
    sys.modules |= {"pypto": package, "pypto.language": pl}
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
