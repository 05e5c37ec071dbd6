"""Ahead of time, without a GPU: every variant compiles everywhere, spills nothing, and failures are loud."""

import json
import os
import subprocess
import sys

import pytest

from kvcondense.backends.triton import aot, tuning
from kvcondense.backends.triton.aot import ARCHITECTURES
from kvcondense.backends.triton.variants import variants
from kvcondense.formats import FORMATS

pytest.importorskip("triton")


def kvcondense(*words, code=""):
    """The command in a process that compiles: this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    call = f"import sys; from kvcondense.cli import app\n{code}\nif __name__ == '__main__': app(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", call, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )


def test_variants_cover_what_there_is():
    names = [v.name for v in variants()]
    assert len(names) == len(set(names))
    assert {v.format for v in variants()} == {"", *FORMATS}
    for kind in ("hca", "csa", "indexer", "r2", "r1"):
        mine = [v for v in variants() if v.kind == kind]
        assert {v.state for v in mine} >= {"", "ring", "paged"}
        assert {v.tokens for v in mine} == {"fp32", "bf16", "fp16"}
        assert {v.state_type for v in mine} == {"fp32", "bf16"}
        assert {v.rounding.value for v in mine} == {"reference", "fused"}
        assert any(v.latent for v in mine)
    assert {v.kind for v in variants() if v.state == "online"} == {"hca", "r2", "r1"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_variant_compiles_and_none_spills(arch, tmp_path):
    done = kvcondense("aot", "--arch", arch, "--jobs", 1, "--quiet", "--json", tmp_path / "j")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "j").read_text())
    assert (report["failed"], report["spilling"]) == (0, 0)
    assert [k["variant"] for k in report["kernels"]] == [v.name for v in variants()]
    for kernel in report["kernels"]:
        assert kernel["registers"] > 8
        assert kernel["shared"] is not None
    multiply = {v.name for v in variants() if v.multiplies}
    assert len(multiply) > 50
    for kernel in report["kernels"]:
        # On sm_90 those counted are wgmma alone.
        assert (kernel["matrix"] > 0) == (kernel["variant"] in multiply)
        if kernel["kernel"] == "decode_kernel":
            assert all(a <= b for a, b in zip(occupy(kernel, arch), PROCESSORS[arch], strict=True)), kernel


def occupy(kernel, arch):
    """(32-bit registers, bytes of shared memory) that the programs of a processor take which wait for one another."""
    each = tuning.table()["any"]["decode_programs"]
    lanes = kernel["num_warps"] * (64 if arch.startswith("gfx") else 32)
    return each * lanes * -(-kernel["registers"] // 8) * 8, each * (kernel["shared"] + 1024)


# A processor's registers and shared memory, by architecture (CUDA's programming guide, AMD's CDNA 3 and 4 papers).
PROCESSORS = {
    "sm_80": (65536, 164 << 10),
    "sm_90": (65536, 228 << 10),
    "sm_100": (65536, 228 << 10),
    "gfx942": (131072, 64 << 10),
    "gfx950": (131072, 160 << 10),
}


def test_a_kernel_that_does_not_compile_is_a_failure():
    code = """
import dataclasses
from kvcondense.backends.triton import variants
real = variants.constants
variants.constants = lambda *args, **more: dataclasses.replace(real(*args, **more), block=3)
"""
    done = kvcondense("aot", "--arch", "sm_80", "--jobs", 1, "--variant", "r1-stateless", code=code)
    assert done.returncode != 0
    assert "FAILED CompilationError" in done.stdout
    assert "power of 2" in done.stdout


def test_it_refuses():
    for words, reason in (
        (("--arch", "sm_x"), "arch"),
        (("--arch", "gfx1100"), "arch"),
        (("--variant", "none"), "--variant"),
        (("--jobs", "0"), "--jobs"),
    ):
        done = kvcondense("aot", *words)
        assert done.returncode != 0
        assert reason in done.stderr, done.stderr
    listed = kvcondense("aot", "--list", "--variant", "hca-online")
    assert listed.stdout.split() == [v.name for v in variants() if v.name.startswith("hca-online")]
    assert aot.target("gfx942").backend == "hip"
