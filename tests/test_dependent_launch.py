"""Kernels that start before the one ahead has ended: in machine code, no program looks at memory, or ends, unwaited."""

import json
import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from kvcondense.backends.triton import tuning

pytest.importorskip("triton")

COMPILED = """
import contextlib, json, sys
from kvcondense.backends.triton import aot, tuning
from kvcondense.backends.triton.variants import launches, variants

arch, ordered, *names = sys.argv[1:]
found = []
for variant in variants():
    if variant.name in names:
        with tuning.in_full_order() if ordered == "ordered" else contextlib.nullcontext():
            asked = launches(variant, arch)
        for launch in asked:
            built = launch.compile(arch)
            sass = aot._asked("cuobjdump", ["--dump-sass"], built) if arch.startswith("sm_") else ""
            text = built.asm["ptx" if sass else "amdgcn"]
            found.append({"kernel": launch.name, "variant": variant.name, "text": text, "sass": sass,
                          "pdl": launch.options.get("launch_pdl", False),
                          "cooperative": launch.options["launch_cooperative_grid"]})
print(json.dumps(found))
"""
NAMES = (
    "hca-ring-fp32-1048576rows-fp8_model1", "hca-online-fp32-1048576rows-fp8_model1",
    "csa-tiles-ring-fp32-fp8_model1", "hca-project-stateless-fp32-rows", "hca-decode-ring-fp32-fp8_model1",
    "csa-together-ring-fp32-fp8_model1", "plan",
)  # fmt: skip
KERNELS = {
    "condense_kernel": 1, "online_kernel": 1, "tiles_kernel": 1, "finish_kernel": 1,
    "project_kernel": 1, "decode_kernel": 2, "plan_kernel": 1,
}  # fmt: skip


def compiled(arch, *names, ordered=False):
    """Kernels of these variants, as a process makes them that compiles: this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-c", COMPILED, arch, "ordered" if ordered else "", *names]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Code(NamedTuple):
    """An assembly's instructions, and which names wait, touch memory, ask for it, leave."""

    instructions: list  # (guard, name, number of the instruction that it may jump to, or None)
    wait: str
    touches: str
    asks: str
    leaves: str


def ptx(text):
    body, places, lines = text[text.index("\n{") :], {}, []
    for line in body.splitlines():
        if label := re.match(r"(\$L__BB\w+):", line):
            places[label[1]] = len(lines)
        elif found := re.match(r"\s+(?:@(!?%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);", line):
            lines.append(found.groups())
    jumps = [(re.search(r"\$L__BB\w+", rest) if name.startswith("bra") else None) for _, name, rest in lines]
    code = [(guard, name, jump and places[jump[0]]) for (guard, name, _), jump in zip(lines, jumps, strict=True)]
    memory = r"(ld|st|atom|red|cp|multimem)\.(?!param|shared|local|const)"
    return Code(code, "griddepcontrol.wait", memory, r"prefetch\.global\.L2$", r"ret|exit|trap|brx|call")


def sass(text):
    lines = re.findall(
        r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[\dT]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", text, re.MULTILINE
    )
    places = {int(at, 16): number for number, (at, *_) in enumerate(lines)}
    code = []
    for _, guard, name, rest in lines:
        jump = re.search(r"0x([0-9a-f]+)$", rest) if name.startswith(("BRA", "CALL")) else None
        code.append((guard, name, jump and places[int(jump[1], 16)]))
    memory = r"(LD|LDG|ST|STG|ATOM|ATOMG|RED|REDG|LDGSTS|UBLKCP|UBLKRED|UTMA\w*|UTMALDG|UTMASTG)(\.|$)"
    return Code(code, "ACQBULK", memory, r"CCTL\.E\.PF2$", r"EXIT|BRX|JMP")


def before_the_wait(code):
    """Names of all instructions that a thread may come to before it waits."""
    found, seen, left = [], set(), [0]
    while left:
        at = left.pop()
        if at in seen:
            continue
        seen.add(at)
        guard, name, target = code.instructions[at]
        if name == code.wait and not guard:
            continue
        found.append(name)
        unconditional = not guard or guard in ("PT", "UPT")
        if target is not None:
            left.append(target)
        # SASS has branches with a predicate among their operands: they fall through, too. A call comes back to what is
        # behind it (a subroutine looks at sm_100's tensor memory, by some assemblers).
        ends = re.match(code.leaves, name) or name.startswith("RET")
        if ends or (target is not None and unconditional and name == "bra.uni"):
            continue
        left.append(at + 1)
    return found


def check(code, asks):
    early = before_the_wait(code)
    assert sum(name == code.wait for _, name, _ in code.instructions) == 1
    assert not [name for name in early if re.match(code.touches, name)], "looks at memory before it waits"
    assert not [name for name in early if re.match(code.leaves, name)], "ends, or goes elsewhere, without waiting"
    asked = [name for _, name, _ in code.instructions if re.match(code.asks, name)]
    assert len(asked) == sum(bool(re.match(code.asks, name)) for name in early), "asks for memory after it waited"
    assert bool(asked) == asks
    after = [name for _, name, _ in code.instructions if re.match(code.touches, name)]
    assert len(after) > 3


@pytest.fixture(scope="module", params=["sm_90", "sm_100"])
def kernels(request):
    return compiled(request.param, *NAMES)


def test_no_program_looks_at_memory_or_ends_before_it_waits(kernels):
    names = [kernel["kernel"] for kernel in kernels]
    assert {name: names.count(name) for name in names} == KERNELS
    for kernel in kernels:
        decodes = kernel["kernel"] == "decode_kernel"
        assert kernel["pdl"]
        assert kernel["cooperative"] == decodes
        for code in (ptx(kernel["text"]), sass(kernel["sass"])):
            check(code, decodes)


def test_the_next_kernel_starts_when_all_programs_wait_or_have_their_products(kernels):
    for kernel in kernels:
        lines = [line for line in kernel["text"].splitlines() if not line.lstrip().startswith(("//", ".loc"))]
        text = "\n".join(lines)
        assert text.count("griddepcontrol.launch_dependents") == 1
        assert text.count("tcgen05.alloc") <= 1
        # Were it taken later, the next kernel might have it all, and wait for this one.
        assert "tcgen05.alloc" not in text[text.index("griddepcontrol.wait") :]
        between = text[text.index("griddepcontrol.wait") : text.index("griddepcontrol.launch_dependents")]
        products = re.findall(r"wgmma\.mma_async|tcgen05\.mma", text)
        within = re.findall(r"wgmma\.mma_async|tcgen05\.mma", between)
        if kernel["kernel"] == "decode_kernel":
            assert within == products != []
            assert ("tcgen05.alloc" in text) == ("tcgen05.mma" in text)
            assert "bar.sync" in text[text.index("griddepcontrol.launch_dependents") :]
        else:
            assert not within
            assert not re.search(r"\b(ld|st)\.global|\batom\.|\bbra\b", between)


def test_wrong_orders_would_be_seen():
    right = """
.visible .entry k(
)
{
	ld.param.b64 	%rd1, [k_param_0];
	setp.gt.s32 	%p1, %r1, 255;
	@%p1 bra 	$L__BB0_2;
$L__BB0_1:
	prefetch.global.L2 [%rd1]; // %r3
	@%p2 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_2;
$L__BB0_2:
	griddepcontrol.wait ;
	ld.global.b32 	%r2, [%rd1];
	ld.global.b32 	%r3, [%rd1];
	st.global.b32 	[%rd1], %r2;
	atom.global.add.u32 	%r2, [%rd1], 1;
	ret;
}
"""
    check(ptx(right), asks=True)
    load = "\tld.global.b32 \t%r2, [%rd1];\n"
    for old, new, why in (
        ("\tgriddepcontrol.wait ;\n" + load, load + "\tgriddepcontrol.wait ;\n", "looks at memory"),
        ("\tbra.uni \t$L__BB0_2;\n", "\tret;\n", "without waiting"),
        ("\tgriddepcontrol.wait ;\n", "\t@%p1 griddepcontrol.wait ;\n", "looks at memory"),
        ("\tprefetch.global", "\tst.global", "looks at memory"),
        ("\tret;", "\tprefetch.global.L2 [%rd1];\n\tret;", "after it waited"),
    ):
        assert old in right
        with pytest.raises(AssertionError, match=why):
            check(ptx(right.replace(old, new, 1)), asks=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "gfx942"])
def test_other_chips_have_none_of_it(arch):
    found = compiled(arch, *(n for n in NAMES if n.startswith(("hca-ring", "csa-together")) or n == "plan"))
    assert len(found) == 3
    for kernel in found:
        assert not kernel["pdl"]
        assert not re.search(r"griddepcontrol|prefetch", kernel["text"])


def test_it_can_be_switched_off():
    for kernel in compiled("sm_90", NAMES[0], NAMES[-2], NAMES[-1], ordered=True):
        assert not kernel["pdl"]
        assert not re.search(r"griddepcontrol|prefetch", kernel["text"])


def test_flag_and_option_come_and_go_together(monkeypatch):
    device = torch.device("cpu")
    early = {"PDL": True, "launch_pdl": True}
    assert tuning.launch_options(device) == {}, "the interpreter runs one program after the other"
    for arch, expected in (
        ("sm_80", {}), ("sm_89", {}), ("sm_90", early), ("sm_100", early), ("sm_120", early),
        ("gfx942", {}), ("gfx950", {}), ("Ascend", {}),
    ):  # fmt: skip
        with tuning.stand_in(arch):
            assert tuning.launch_options(device) == expected, arch
            with tuning.in_full_order():
                assert tuning.launch_options(device) == {}
    part = {**tuning.table()[tuning.ANY], "dependent_launch": False}
    monkeypatch.setattr(tuning, "table", lambda: {tuning.ANY: part, "sm_90": part})
    with tuning.stand_in("sm_90"):
        assert tuning.launch_options(device) == {}
