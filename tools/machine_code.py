"""What LLVM makes of the CPU kernels: instructions, spills and prefetches of their inner loops, for any processor.

Example: python tools/machine_code.py --target avx2 --json build/machine_code.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

TARGETS = {
    "host": ("", "", ""),
    "avx512": (
        "x86_64-unknown-linux-gnu", "icelake-server",
        "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd",
    ),
    "avx2": ("x86_64-unknown-linux-gnu", "haswell", "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"),
    "neon": ("aarch64-unknown-linux-gnu", "neoverse-n1", "+neon,+fp-armv8"),
}  # fmt: skip
"""Triple, processor and features, as LLVM calls them; host: this machine's."""
KERNELS = ("condense", "encode", "online", "project")
_VECTOR = re.compile(r"%[xyz]mm\d|\b[vq]\d+\.|\bq\d+\b")
_STACK = re.compile(r"\(%r[sb]p\)|\[sp")
_JUMP = re.compile(r"^\s*(?:j[a-z]+|b(?:\.[a-z]+)?|cbn?z|tbn?z)\s.*?(\.LBB\d+_\d+)")
_LABEL = re.compile(r"^(\.LBB\d+_\d+):")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, those that compute on vectors, what goes to the stack and comes from it."""

    kernel: str
    instructions: int
    arithmetic: int
    multiplies: int
    prefetches: int
    spilled: int
    reloaded: int


def assembly(name: str) -> dict[str, str]:
    """Machine code of all kernels for a target, as text. One target in a process: kernels are made for it when read."""
    import llvmlite.binding as llvm

    from kvcondense.backends.cpu import native, target

    triple, cpu, flags = TARGETS[name]
    if triple:
        other = target.Target(cpu, flags, target.lanes_of(flags))
        target.target = lambda: other  # before a kernel asks; Numba itself goes on with this machine
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        machine = llvm.Target.from_triple(triple).create_target_machine(
            cpu=cpu, features=flags, opt=3, reloc="pic", codemodel="default"
        )
    else:
        machine = native.machine(llvm)
    return {k: machine.emit_assembly(native.optimised(k, machine, triple)) for k in KERNELS}


def loops(kernel: str, text: str) -> list[Loop]:
    """The innermost loops that compute on vectors."""
    lines = [line for line in text.splitlines() if _LABEL.match(line) or re.match(r"^\s+[a-z]", line)]
    at = {m[1]: i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    spans = [(at[m[1]], i) for i, line in enumerate(lines) if (m := _JUMP.match(line)) and at.get(m[1], i) < i]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    found = []
    for first, last in sorted(inner):
        body = [line.strip() for line in lines[first : last + 1] if not _LABEL.match(line)]
        vectors = [line for line in body if _VECTOR.search(line)]
        moves = [line for line in vectors if re.match(r"v?mov|v?broadcast|ld|st|v?insert|v?extract|dup", line)]
        stack = [line for line in vectors if _STACK.search(line)]
        spilled = sum(line.startswith("st") or bool(re.search(r"\(%r[sb]p\)$", line)) for line in stack)
        multiplies = sum(bool(re.match(r"vf?n?m|fmla|fmul|vdp", line)) and "mov" not in line for line in vectors)
        found.append(
            Loop(kernel, len(body), len(vectors) - len(moves), multiplies,
                 sum(line.startswith(("prefetch", "prfm")) for line in body), spilled, len(stack) - spilled)
        )  # fmt: skip
    return [loop for loop in found if loop.arithmetic]


def measured(name: str) -> list[Loop]:
    """The loops of all kernels for one of the targets."""
    run = subprocess.run([sys.executable, __file__, "--inside", name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return [Loop(**loop) for loop in json.loads(run.stdout)]


def main() -> None:
    """Print a table, or write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", choices=TARGETS, default="host", help="whose machine code (default: this machine's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the loops there, too")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        found = [loop for kernel, text in assembly(options.inside).items() for loop in loops(kernel, text)]
        print(json.dumps([asdict(loop) for loop in found]))
        return
    found = measured(options.target)
    names = ("instructions", "arithmetic", "multiplies", "prefetches", "spilled", "reloaded")
    print(f"{'kernel':<10}" + "".join(f"{name:>13}" for name in names))
    for loop in found:
        print(f"{loop.kernel:<10}" + "".join(f"{getattr(loop, name):>13}" for name in names))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(loop) for loop in found], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
