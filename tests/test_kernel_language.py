"""The Triton kernels are written in the part of the language that Triton 3.2, of Ascend, and 3.9 share."""

import ast
from pathlib import Path

import pytest

import kvcondense

KERNELS = sorted((Path(kvcondense.__file__).parent / "backends" / "triton" / "kernels").glob("*.py"))


def _operands(node):
    if isinstance(node, ast.BoolOp):
        return node.values
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    return [node.operand] if isinstance(node, ast.UnaryOp) else []


def _of_a_record(node):
    """Whether this is ``c.value.name``: a number of Python's to Triton 3.2, which computes with constexpr alone."""
    return isinstance(node, ast.Attribute) and ".value." in ast.unparse(node)


def wrong(source):
    """What Triton 3.2 does not compile of these kernels, as far as their text shows it."""
    functions = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef) and f.decorator_list]
    nodes = [node for function in functions for node in ast.walk(function)]
    chained = [node for node in nodes if isinstance(node, ast.BoolOp) and len(node.values) > 2]
    computed = [node for node in nodes if any(map(_of_a_record, _operands(node)))]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in (*chained, *computed)]


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_are_in_the_language_of_the_oldest_triton(path):
    assert not wrong(path.read_text())


def test_it_finds_what_failed():
    head = "@triton.jit\ndef f(c: tl.constexpr):\n    "
    for line in ("A = c.value.splits > 0", "A = x and y and z", "A = c.value.blocks // 2", "A = not c.value.stored"):
        assert wrong(head + line)
    assert not wrong(head + "A: tl.constexpr = c.value.splits\n    B = A > 0 and (C or D)")
