"""What launches ask Triton's JIT to compile: nothing that counts is specialised on, and what is made ahead is found."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

STEPS = """
import functools, json, random, sys
from dataclasses import replace
import torch
from collections import Counter
from kvcondense import CompressorSpec, ModelConfig, PagedCache, RaggedBatch, RopeTable, StatePool
from kvcondense.backends import Step
from kvcondense.backends.triton import BACKEND, decode, fused
from kvcondense.backends.triton.launches import recorded
from kvcondense.layout.plan import KEEP_FIELDS, WINDOW_FIELDS, Plan

count, chance = int(sys.argv[1]), random.Random(4)
flash = ModelConfig.FLASH
specs = {k: getattr(CompressorSpec, k)(flash) for k in ("hca", "csa", "indexer")}
hidden, most, slots = 256, 200, 64
x = torch.zeros(most, hidden, dtype=torch.bfloat16)
weights = {k: torch.zeros(s.projected, hidden, dtype=torch.bfloat16) for k, s in specs.items()}
scores = {k: torch.zeros(most, s.projected) for k, s in specs.items()}
gammas = {k: torch.ones(s.head_dim) for k, s in specs.items()}
apes = {k: torch.zeros(s.ratio, s.width) for k, s in specs.items()}
rope = RopeTable.build(flash, 8192)
rings = {k: StatePool.ring(s, slots, s.required_ring_rows(8)) for k, s in specs.items()}
pages = {k: StatePool.paged(s, 4096, 16) for k, s in specs.items()}
caches = {k: PagedCache.allocate(s.head_dim, 256, 64, format="mxfp4_indexer" if k == "indexer" else "fp8_model1")
          for k, s in specs.items()}

@functools.cache
def base(kind, paged, small, number):
    # A step of up to eight requests; number: one of several.
    spec, state = specs[kind], (pages if paged else rings)[kind]
    lengths = [chance.randrange(1, 8 if small else 25) for _ in range(chance.randrange(2, 9))]
    starts = [chance.randrange(0, 4000) for _ in lengths]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    table = None
    if paged:
        table = torch.arange(len(lengths) * 300).view(len(lengths), 300)[:, : 280 + number]
    batch = RaggedBatch.build(offsets, start_positions=starts, state_slots=None if paged else list(range(len(lengths))),
                              state_block_table=table, slot_mapping=list(range(offsets[-1])))
    plan = Plan.build(spec, batch, state_layout=state.layout, page_rows=64)
    return Step(spec, plan, scores[kind], apes[kind], gammas[kind], rope, state, caches[kind], None, None)

def step_of(kind, paged, small):
    # Some of its windows and kept rows, as if it had fewer, and padding behind.
    step = base(kind, paged, small, chance.randrange(8))
    plan, some = step.plan, {}
    for names, size in ((WINDOW_FIELDS, plan.num_windows), (KEEP_FIELDS, plan.keep_token.shape[0])):
        part = chance.randrange(size + 1)
        some |= {name: getattr(plan, name)[:part] for name in names}
    plan = replace(plan, **some, overwrites=chance.random() < 0.2)
    if chance.random() < 0.3:
        plan = plan.padded(plan.num_windows + chance.randrange(4), plan.keep_token.shape[0] + chance.randrange(4))
    return replace(step, plan=plan, kv_score=step.kv_score[: chance.randrange(1, most)],
                   rows=torch.empty(plan.num_windows, step.spec.head_dim))

taken = Counter()
with recorded("sm_90") as launches:
    for _ in range(count):
        way, paged = chance.choice(("step", "tiles", "decode", "together")), chance.random() < 0.5
        small = way in ("decode", "together")
        kinds = ["csa", "indexer"] if way == "together" else [chance.choice(list(specs))]
        steps = [step_of(kind, paged, small) for kind in kinds]
        tokens = x[: chance.randrange(1, 65 if small else most)]
        if way == "step":
            BACKEND.run(steps[0])
        elif way == "tiles":
            fused.run(steps[0], tokens, weights[kinds[0]])
        else:
            decode.run(steps, tokens, [weights[kind] for kind in kinds])
        taken[way] += 1
forms = Counter((l.name, id(l.constants), id(l.constexprs.get((l.kernel.arg_names.index("c_2"),)) if "c_2" in l.kernel.arg_names else None))
                for l in launches)
print(json.dumps({"steps": sum(taken.values()), "ways": taken, "forms": len(forms), "worst": max(forms.values()),
                  "kernels": sorted({l.name for l in launches})}))
"""


def run(code, *words, **more):
    """A process in which kernels would be compiled: this one interprets them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_mixed_steps_compile_each_form_once_or_twice():
    found = json.loads(run(STEPS, "10000"))
    assert found["steps"] == 10_000
    assert min(found["ways"].values()) > 2000
    kernels = ["condense_kernel", "decode_kernel", "finish_kernel", "tiles_kernel"]
    assert found["kernels"] == kernels
    assert found["worst"] <= 2, found
    assert found["forms"] >= 20


PLANS = """
import json, random, sys
from dataclasses import replace
import torch
from kvcondense import CompressorSpec, ModelConfig, RaggedBatch
from kvcondense.backends.triton.launches import recorded
from kvcondense.backends.triton.planning import StaticPlanner
from kvcondense.layout.addresses import PagedLayout, RingLayout
from kvcondense.layout.extremes import Bounds

chance, flash = random.Random(4), ModelConfig.FLASH
specs = [CompressorSpec.hca(flash), CompressorSpec.csa(flash)]
memory = torch.zeros(1 << 16, dtype=torch.int64)

def some(*shape):
    at = chance.randrange(64)
    count = 1
    for size in shape:
        count *= size
    return memory[at : at + count].view(shape)

steps = 0
with recorded("sm_90") as launches:
    while steps < 10_000:
        requests, paged, pages = chance.randrange(1, 65), chance.random() < 0.5, chance.randrange(1, 90)
        batch = RaggedBatch(
            some(requests + 1), some(requests), some(requests),
            state_slots=None if paged else some(requests), state_block_table=some(requests, pages) if paged else None,
            slot_mapping=some(chance.randrange(1, 99)) if chance.random() < 0.5 else None,
            block_table=some(requests, pages),
        )
        jobs = [(s, PagedLayout(16, 16) if paged else RingLayout(8, s.required_ring_rows(8)), 64) for s in specs]
        jobs = chance.sample(jobs + [(s, None, 64) for s in specs], chance.randrange(1, 5))
        bounds = Bounds(chance.randrange(1, 999), chance.randrange(1, 999), chance.randrange(9), 4096)
        planner = StaticPlanner.of(jobs, batch, bounds, [chance.randrange(999) for _ in jobs])
        for _ in range(5):
            planner.fill()
            steps += 1
print(json.dumps({"steps": steps, "compiled": [l.name for l in launches]}))
"""


def test_plans_of_every_shape_compile_one_kernel_once():
    assert json.loads(run(PLANS)) == {"steps": 10_000, "compiled": ["plan_kernel"]}


COMPILES = """
import sys
from pathlib import Path
from triton.runtime import JITFunction, driver
from kvcondense.backends.triton import launches, tuning, variants
from kvcondense.capacity import compressors, kind_of
from kvcondense.config import PRESETS

real, config, made = JITFunction._do_compile, PRESETS["v41"], []

def compile_only(kernel, key, signature, device, *rest):
    made.append(real(kernel, key, signature, device, *rest))
    kernel.device_caches[device][0][key] = launches._NoKernel()
    return kernel.device_caches[device][0][key]

def files():
    return {p for p in Path(sys.argv[1]).rglob("*.cubin")}

before = files()
named = {kind_of(config, spec): spec for spec in compressors(config)}
for step in variants.of_model(named, ("fp4_v41", "mxfp4_indexer"), "ring", 0, 256):
    recorder = launches.recorded("sm_90")
    with recorder:
        JITFunction._do_compile = compile_only  # the JIT's own way, up to the chip
        variants._launch(step, "sm_90")
print(len(made), len(before), len(files() - before))
"""


def test_what_is_warm_is_not_compiled_again(tmp_path):
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    words = ("warm", "--model", "v41", "--format", "fp4_v41", "--arch", "sm_90", "--jobs", "1", "--json", "-")
    report = json.loads(run("from kvcondense.cli import main; main()", *words, **cache))
    assert report["failed"] == 0
    kernels = {k["kernel"] for k in report["kernels"]}
    assert kernels >= {"condense_kernel", "decode_kernel", "tiles_kernel", "finish_kernel", "plan_kernel"}
    made, before, new = map(int, run(COMPILES, str(tmp_path), **cache).split())
    assert made >= 8
    assert before >= 8
    assert new == 0


def test_warm_says_what_it_needs():
    call = "from kvcondense.cli import main; main()"
    for words, reason in (
        (("--arch", "sm_x"), "arch"),
        (("--model", "none"), "--model"),
        (("--state", "x", "--arch", "sm_90"), "--state"),
        (("--backend", "reference"), "--backend"),
        ((), "--arch: expected an architecture, as there is no GPU here"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", call, "warm", *words],
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done
        assert reason in done.stderr, done.stderr
