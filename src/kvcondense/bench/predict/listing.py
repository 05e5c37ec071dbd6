"""Machine code as text, read: SASS as nvdisasm prints it, GCN as the compiler does, with the functions it came from.

Both say of each instruction which line of which kernel's source it is for, and which lines that was inlined at.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "backends" / "triton" / "kernels"
"""Where the kernels' sources are."""
KINDS = (
    "fp32", "integer", "special", "uniform", "load", "store", "atomic", "shared_load", "shared_store", "shuffle",
    "matrix", "barrier", "other",
)  # fmt: skip
"""special: exponentials, roots, reciprocals, conversions. uniform: one result for all lanes. other: branches, waits."""
_MOVING = ("load", "store", "atomic", "shared_load", "shared_store", "shuffle")

_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LINE = re.compile(r'"([^"]+)", line (\d+)')
_SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
_GCN = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)")
_GCN_LINE = re.compile(r"([\w.]+):(\d+):\d+")
_GCN_LABEL = re.compile(r"^(\.LBB\w+):")
_SASS_KINDS = (
    (r"LDGSTS|LDG|LD|LDL|UBLKCP|UTMALDG", "load"),
    (r"STG|ST|STL", "store"),
    (r"ATOM|ATOMG|RED|REDG", "atomic"),
    (r"LDS|LDSM", "shared_load"),
    (r"STS|STSM|ATOMS", "shared_store"),
    (r"SHFL", "shuffle"),
    (r"HMMA|HGMMA|IMMA|QMMA|UTC\w*MMA", "matrix"),
    (r"BAR", "barrier"),
    (r"MUFU|F2I|I2F|F2F|FCHK|I2I", "special"),
    (r"FADD|FMUL|FFMA|IMAD|FADD2|FFMA2|FMUL2", "fp32"),
    (r"U\w+|R2UR|S2UR", "uniform"),
    (r"BRA|EXIT|BSSY|BSYNC|CALL|RET|WARPSYNC|NOP|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|LDC|CCTL|ERRBAR|SYNCS|NANOSLEEP"
     r"|S2R|ACQBULK|PREEXIT|WARPGROUP|BREAK|YIELD|CGAERRBAR|BMOV|ELECT|LDTM|STTM", "other"),
    (r"\w+", "integer"),
)  # fmt: skip
_GCN_KINDS = (
    (r"v_mfma\w*|v_smfmac\w*", "matrix"),
    (r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+", "special"),
    (r"v_\w*f(32|16|64)\w*", "fp32"),
    (r"v_\w+", "integer"),
    (r"ds_(bpermute|permute|swizzle)\w*", "shuffle"),
    (r"ds_read\w*", "shared_load"),
    (r"ds_\w+", "shared_store"),
    (r"(buffer|global|flat|scratch)_load\w*", "load"),
    (r"s_(load|buffer_load)\w*", "load"),
    (r"(buffer|global|flat|scratch)_store\w*", "store"),
    (r"\w*atomic\w*", "atomic"),
    (r"s_barrier\w*", "barrier"),
    (r"s_(waitcnt|cbranch|branch|endpgm|nop|setprio|sleep)\w*|buffer_\w+", "other"),
    (r"s_\w+", "uniform"),
)


@dataclass(frozen=True)
class Instruction:
    """One of them. chain: the functions that it is in, the kernel first; target: the label that it may jump to.

    width: bytes of a lane that it moves, if it moves any. guard: the predicate that it runs under, "" for always.
    """

    name: str
    operands: tuple[str, ...]
    guard: str
    kind: str
    width: int
    chain: tuple[str, ...]
    target: str = ""

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(m, n, k) of a product, where the name says it: of a warp, or (m = 64) of the four warps of a group."""
        found = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)|v_mfma_\w*?_(\d+)x(\d+)x(\d+)", self.name)
        if found:
            m, n, k = (int(g) for g in found.groups() if g)
            return m, n, k
        small = re.match(r"HMMA\.(\d\d)(\d)(\d\d?)\b", self.name)
        return (int(small[1]), int(small[2]), int(small[3])) if small else None


@dataclass(frozen=True)
class Label:
    """A place that branches go to."""

    name: str


def read(text: str, arch: str) -> list[Instruction | Label]:
    """A listing's instructions and labels, in order. text: nvdisasm's with -c -gi, or the compiler's amdgcn.

    Subroutines behind a kernel's end are among them; nothing leads there but calls.
    """
    return list(_gcn(text) if arch.startswith("gfx") else _sass(text))


def _sass(text: str) -> Iterator[Instruction | Label]:
    chain: tuple[str, ...] = ()
    lines: list[tuple[str, str]] = []
    fresh = True
    for line in text.splitlines():
        if "//## File" in line:
            places = _SASS_LINE.findall(line)
            if fresh:  # the innermost line comes first; those that follow repeat where it was inlined
                lines, fresh = [], False
            lines = [*(lines or places[:1]), *places[1:]]
            chain = _chain(tuple(lines))
            continue
        label = _SASS_LABEL.match(line)
        if label:
            yield Label(label[1])
        found = _SASS.match(line)
        if found is None:
            continue
        fresh = True
        guard, name, rest = found[1] or "", found[2], found[3]
        base = name.split(".")[0]
        kind = _kind(base, _SASS_KINDS)
        target = re.search(r"`\((\.L_x_\d+)\)", rest) if base == "BRA" else None
        operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
        yield Instruction(name, operands, guard, kind, _sass_width(name, kind), chain, target[1] if target else "")


def _sass_width(name: str, kind: str) -> int:
    if kind not in _MOVING:
        return 0
    if name.startswith(("LDSM", "STSM")):
        count = re.search(r"\.([124])$", name)
        return 4 * int(count[1]) if count else 4
    bits = re.search(r"\.(128|64|U?S?16|U?S?8)\b", name)
    return {None: 4, "128": 16, "64": 8}.get(bits and bits[1], 2 if bits and "16" in bits[1] else 1)


def _gcn(text: str) -> Iterator[Instruction | Label]:
    chain: tuple[str, ...] = ()
    for line in text.splitlines():
        if line.lstrip().startswith(".loc"):
            places = [p for p in _GCN_LINE.findall(line.partition(";")[2]) if p[1] != "0"]
            chain = _chain(tuple(places)) if places else chain
            continue
        label = _GCN_LABEL.match(line)
        if label:
            yield Label(label[1])
        found = _GCN.match(line)
        if found is None:
            continue
        name, rest = found[1], found[2].strip()
        kind = _kind(name, _GCN_KINDS)
        branch = name.startswith(("s_branch", "s_cbranch"))
        guard = name.removeprefix("s_cbranch_") if name.startswith("s_cbranch") else ""
        operands = tuple(part.strip() for part in re.split(r",\s*|\s+", rest)) if rest else ()
        yield Instruction(name, operands, guard, kind, _gcn_width(name, kind), chain, rest if branch else "")


def _gcn_width(name: str, kind: str) -> int:
    if kind not in _MOVING:
        return 0
    words = re.search(r"dwordx(\d+)", name)
    if words:
        return 4 * int(words[1])
    bits = re.search(r"_b(8|16|32|64|96|128)", name)
    if bits:
        return max(1, int(bits[1]) // 8) * (2 if re.match(r"ds_(read|write)2", name) else 1)
    return 1 if "byte" in name else 2 if "short" in name else 4


def _kind(name: str, kinds: tuple[tuple[str, str], ...]) -> str:
    return next((kind for pattern, kind in kinds if re.fullmatch(pattern, name)), "other")


@functools.cache
def _chain(places: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Functions of places (file, line), the innermost first; where a caller calls one twice, the second is name#2."""
    names = [_function(*place) for place in places]
    for at in reversed(range(len(places) - 1)):  # callers first
        called = _called(names[at + 1], int(places[at + 1][1])) & {f[2] for f in _functions_of(places[at][0])}
        if len(called) == 1:  # the line may be off: Triton says too much of augmented sums in loops that it unrolls
            names[at] = next(iter(called))
    for at, (path, line) in enumerate(places[1:]):
        calls = [span for span in _calls().get((names[at + 1], names[at]), ()) if span[0] <= int(line)]
        if len(calls) > 1 and _functions_of(path):
            names[at] += f"#{len(calls)}"
    return tuple(reversed(names))


def _called(caller: str, line: int) -> set[str]:
    """Functions that one of the kernels' functions calls in a line."""
    return {
        called
        for (function, called), spans in _calls().items()
        if function == caller and any(first <= line <= last for first, last in spans)
    }


@functools.cache
def _sources() -> tuple[tuple[str, ast.FunctionDef], ...]:
    """The kernels' functions, each with the name of its file."""
    return tuple(
        (file.name, node)
        for file in KERNELS.glob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    )


@functools.cache
def _calls() -> dict[tuple[str, str], list[tuple[int, int]]]:
    """By caller and called, among the kernels' functions: first and last lines of the calls, in order."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for _, function in _sources():
        for n in ast.walk(function):
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name):
                key = (function.name, n.func.id)
                found.setdefault(key, []).append((n.lineno, n.end_lineno or n.lineno))
    return {key: sorted(set(spans)) for key, spans in found.items()}


def _function(path: str, line: str | int) -> str:
    """The function of a kernel's source that a line is in; of other files, the file's name."""
    for first, last, function in _functions_of(path):
        if first <= int(line) <= last:
            return function
    return Path(path).name.removesuffix(".py")


def _functions_of(path: str) -> list[tuple[int, int, str]]:
    """A file's functions: first line, last, name; none of files that are not the kernels'."""
    return _functions().get(Path(path).name, [])


@functools.cache
def looping() -> frozenset[str]:
    """Functions of the kernels with a loop that machine code has, too; ``static_range`` leaves none."""

    def stays(n: ast.AST) -> bool:
        return isinstance(n, ast.While) or (isinstance(n, ast.For) and "static_range" not in ast.unparse(n.iter))

    return frozenset(function.name for _, function in _sources() if any(map(stays, ast.walk(function))))


@functools.cache
def _functions() -> dict[str, list[tuple[int, int, str]]]:
    """By file of the kernels: first and last lines of functions, and their names."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    for file, n in _sources():
        first = min([n.lineno, *(d.lineno for d in n.decorator_list)])
        found.setdefault(file, []).append((first, n.end_lineno or first, n.name))
    return found
