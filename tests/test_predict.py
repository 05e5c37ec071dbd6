"""The model of kernels' times: counts that are known by construction, bounds that must decide, and nobody's fudge."""

import json
import runpy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compiling import compiling
from kvcondense.backends import get_backend
from kvcondense.backends.triton.aot import ARCHITECTURES
from kvcondense.bench.cases import DEVICE_CASES, Case, make_inputs
from kvcondense.bench.fused import LAYERS
from kvcondense.bench.predict import table
from kvcondense.bench.predict.flow import Counts, Flow, Runs
from kvcondense.bench.predict.listing import Instruction, read
from kvcondense.bench.predict.machines import MACHINES
from kvcondense.bench.predict.warp import alone, registers
from kvcondense.bench.runners import BARE, Kvcondense
from kvcondense.cli import app

pytest.importorskip("triton")
from kvcondense.backends.triton import fused, tuning
from kvcondense.bench.predict.code import Launched
from kvcondense.bench.predict.model import Answer, Predicted, of_kernel, residents
from kvcondense.bench.predict.work import Kernel, forms_of, plan_of

ROOT = Path(__file__).parents[1]
H100 = MACHINES["sm_90"]
STEPS = [
    *(f"decode {n} on a boundary, ratio 128" for n in (1, 16, 64)),
    "decode 16 within a window, ratio 128", "decode 16 on a boundary, ratio 4",
    "prefill 1 x 8192, ratio 4", "prefill 1 x 65536, ratio 4", "prefill 8 x 8192, ratio 4",
]  # fmt: skip
LAYER = "HCA, decode 16 on a boundary"
PREFILL = "HCA, prefill 8192"


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    """Records by architecture and case."""
    found = {}
    for arch, names in (("sm_90", [*STEPS, LAYER]), ("gfx942", ["prefill 1 x 8192, ratio 4", LAYER, PREFILL])):
        file = tmp_path_factory.mktemp("predicted") / "j"
        words = [word for name in names for word in ("--case", name)]
        text = compiling("-m", "kvcondense", "bench", "--predict", arch, *words, "--json", file)
        assert max(map(len, text[text.index("case  ") :].splitlines())) <= 100, text
        head, *records = map(json.loads, file.read_text().splitlines())
        assert head["predicted_for"] == arch
        found[arch] = {record["case"]: record for record in reversed(records)}  # the backend's form comes first
        forms = [record["form"] for record in records if record["case"] == LAYER]
        assert forms == ["one launch", "library, step", "product, step"][:: 1 if arch == "sm_90" else 2]
        assert set(names) <= set(found[arch])
    return found


def test_the_baseline_is_what_is_predicted_and_what_the_page_says(predicted):
    """Of all architectures as they were written down; of what was compiled here, and where it is this Triton, anew."""
    tool = runpy.run_path(str(ROOT / "tools" / "predicted.py"))
    kept = json.loads((ROOT / "benchmarks" / "baselines" / "predicted.json").read_text())
    assert tuple(kept["predicted"]) == ARCHITECTURES
    assert all(tuple(cases) == tool["CASES"] for cases in kept["predicted"].values())
    assert tool["markdown"](kept) in (ROOT / "docs" / "gpu.md").read_text()
    compared = 0
    for arch, records in predicted.items():
        for name in records.keys() & kept["predicted"][arch].keys():
            old, new = kept["predicted"][arch][name], records[name]
            assert old["floor_us"] == pytest.approx(new["floor_us"], rel=0.01)
            if kept["triton"] == version("triton"):
                assert old["us"] == pytest.approx(new["predicted_us"], rel=0.01), (arch, name)
            compared += 1
    assert compared >= 5


def test_forms_are_the_backends_and_the_benches(monkeypatch):
    """The first is what ``compress`` takes on such a device: the library's product where it is there and faster."""
    of = {(arch, name): forms_of(LAYERS[name], arch) for arch in MACHINES for name in LAYERS}
    for (arch, name), forms in of.items():
        library, short = arch.startswith("sm_"), "prefill" not in name
        expected = {"library, step"} if library else set()
        assert set(forms) == expected | ({"one launch", "product, step"} if short else {"tiles"}), (arch, name)
        late = arch in ("sm_80", "sm_90", "sm_100") and any(many in name for many in ("decode 64", "verify 8 x 8"))
        assert forms[0] == ("library, step" if late or (library and not short) else "one launch" if short else "tiles")

    backend = get_backend("triton")
    part = Kvcondense(make_inputs(Case("few", "hca", 1, 64, 0, hidden=True)), "triton", BARE)
    step = part.primed()["step"]
    monkeypatch.setattr(fused, "by_library", lambda device: True)
    with tuning.stand_in("sm_89"):
        assert backend.fused_forms(step, part.new, part.inputs.w)["one launch"] is None
    forms = {n: backend.fused_forms(step, part.new[:n], part.inputs.w)["one launch"] for n in (16, 17, 64)}
    assert forms[16] is None
    assert forms[17] == "17 tokens; of more than 16 the table has the library's product, then the step"
    assert "64 tokens" in forms[64]
    monkeypatch.undo()
    assert backend.fused_forms(step, part.new, part.inputs.w)["one launch"] is None


def test_every_architecture_has_a_machine():
    assert tuple(MACHINES) == ARCHITECTURES
    assert all(machine.source for machine in MACHINES.values())


def test_bytes_are_the_bench_s(predicted):
    for name in STEPS:
        record, case = predicted["sm_90"][name], DEVICE_CASES[name]
        assert (record["bytes"], record["flops"]) == (case.bytes, case.flops)
        plan = plan_of(case)
        drafts = plan.keep_token.shape[0] * case.row_bytes - case.kept_bytes
        rows = 4 * plan.num_windows * case.spec.head_dim
        moved = sum(kernel["memory_bytes"] for kernel in record["kernels"])
        assert moved == pytest.approx(case.bytes + rows + drafts, rel=1e-3)
    for arch in predicted:
        record, layer = predicted[arch][LAYER], LAYERS[LAYER]
        assert (record["bytes"], record["flops"]) == (layer.bytes, layer.flops)
        assert record["kernels"][0]["memory_bytes"] >= 0.999 * layer.bytes


def test_floors_and_times_grow_with_the_work(predicted):
    for names in (STEPS[:3], STEPS[5:7], STEPS[5:6] + STEPS[7:]):
        times = [predicted["sm_90"][name]["predicted_us"] for name in names]
        assert times == sorted(times)
        assert times[-1] > times[0]
    for records in predicted.values():
        for record in records.values():
            assert record["predicted_us"] > record["floor_us"]
            assert record["predicted_us"] == pytest.approx(sum(k["us"] for k in record["kernels"]), abs=0.1)


def test_launches_are_those_of_the_step(predicted):
    def launched(arch, name):
        return [kernel["kernel"] for kernel in predicted[arch][name]["kernels"]]

    assert launched("sm_90", "decode 16 on a boundary, ratio 128") == ["step"]
    assert launched("sm_90", "decode 16 within a window, ratio 128") == ["kept rows"]
    assert launched("sm_90", "prefill 1 x 8192, ratio 4") == ["step"], "nothing is read that a kept row could overwrite"
    assert launched("sm_90", LAYER) == launched("gfx942", LAYER) == ["one launch"]
    assert launched("gfx942", PREFILL) == ["tiles", "finish"]
    programs = {n: predicted["sm_90"][n]["kernels"][0]["programs"] for n in STEPS}
    assert programs["decode 16 within a window, ratio 128"] == 16
    assert programs["prefill 1 x 8192, ratio 4"] == 2048 + 4


def test_flops_of_the_code_are_those_of_the_tiles(predicted):
    """Each product's instruction and each turn of its loop is counted, or these would differ."""
    kernel = predicted["sm_90"][LAYER]["kernels"][0]
    assert kernel["code_flops"] == pytest.approx(kernel["flops"], rel=1e-3)
    assert kernel["flops"] == pytest.approx(2 * 64 * 4096 * 1024, rel=1e-3), "of 64 rows, however many tokens there are"
    tiles = predicted["gfx942"][PREFILL]["kernels"][0]
    assert tiles["code_flops"] == pytest.approx(tiles["flops"], rel=5e-3), "and a product of zeros (``pinned``)"
    assert tiles["code_flops"] > tiles["flops"]
    assert tiles["flops"] == pytest.approx(LAYERS[PREFILL].flops, rel=1e-3)


KNOWN = """
import triton
import triton.language as tl
from triton.compiler import ASTSource

from kvcondense.backends.triton.aot import listing_of
from kvcondense.backends.triton.launches import target
from kvcondense.bench.predict.flow import Flow, Runs
from kvcondense.bench.predict.listing import read


@triton.jit
def known(x, y):
    at = tl.arange(0, 1024)
    value = tl.load(x + at)
    tl.store(y + at, tl.exp2(value) * 3.0 + value)


signature = {"x": "*fp32", "y": "*fp32"}
for arch in ("sm_90", "gfx942"):
    source = ASTSource(known, signature, {}, {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]})
    built = triton.compile(source, target=target(arch), options={"num_warps": 4})
    flow = Flow(read(listing_of(built, arch.startswith("gfx")), arch))
    counts = flow.count(Runs())
    half = flow.count(Runs({"known": 0.5}))
    print(arch, *(counts.instructions.get(k, 0) for k in ("special", "load", "store", "matrix", "barrier")),
          counts.lane_bytes["load"], half.instructions["special"],
          sum(i.name in ("FFMA", "v_fma_f32", "v_fmac_f32_e32") for b in flow.blocks for i in b.code))
"""


def test_instructions_of_a_known_kernel(tmp_path):
    """1024 elements on 4 warps: 8 a lane on NVIDIA in two loads of 16 bytes, 4 a lane on AMD in one."""
    (tmp_path / "known.py").write_text(KNOWN)
    nvidia, amd = (line.split() for line in compiling(tmp_path / "known.py").splitlines())
    assert nvidia == ["sm_90", "8.0", "2.0", "2.0", "0", "0", "32.0", "4.0", "8"]
    assert amd[:2] == ["gfx942", "4.0"]
    assert amd[3:6] == ["1.0", "0", "0"]
    assert float(amd[7]) == 2


SASS = """
	//## File "/x/mine.py", line 3
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R8, R4, R5 ;
.L_x_1:
        /*0030*/                   FFMA R8, R8, R8, R6 ;
        /*0040*/                   MUFU.EX2 R8, R8 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/              @!P1 BRA `(.L_x_2) ;
        /*0070*/                   MOV R9, 0x80 ;
        /*0080*/                   CALL.REL.NOINC `($slow) ;
.L_x_2:
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP ;
"""


def test_loops_count_by_their_turns_and_slow_paths_not_at_all():
    flow = Flow(read(SASS, "sm_90"))
    assert [loop.function for loop in flow.loops] == ["mine"]
    counts = flow.count(Runs({}, {"mine": 10}))
    assert counts.instructions["special"] == 10
    assert counts.instructions["fp32"] == 11
    assert counts.instructions.get("integer", 0) == 0, "the block that calls"
    assert counts.lane_bytes["load"] == 16
    assert counts.lane_bytes["store"] == 8
    assert counts.instructions["other"] == 10 + 3, "branches, the exit, S2R; what nothing reaches is not there"


def test_a_warp_waits_for_its_operands():
    flow = Flow(read(SASS, "sm_90"))
    ten, twenty = (alone(flow, Runs({}, {"mine": turns}), H100, 4) for turns in (10, 20))
    turn = H100.latency("fp32") + H100.latency("special")
    assert twenty - ten == pytest.approx(10 * turn)
    assert ten > H100.latency("load", 16) + 10 * turn
    far = replace(H100, latencies={**H100.latencies, "memory": 1400.0})
    assert alone(flow, Runs({}, {"mine": 10}), far, 4) - ten == pytest.approx(1000)


def test_registers_are_found_in_operands():
    def of(name, *operands, kind="integer"):
        return registers(Instruction(name, operands, "P3", kind, 0, ()))

    assert of("LDG.E.128", "R4", "desc[UR4][R2.64]", kind="load") == (
        ("R4", "R5", "R6", "R7"), ("UR4", "R2", "R3", "P3"),
    )  # fmt: skip
    assert of("ISETP.GE.AND", "P1", "PT", "R4", "UR10", "PT") == (("P1",), ("R4", "UR10", "P3"))
    assert of("STG.E.64", "desc[UR4][R2.64]", "R8", kind="store")[1] == ("UR4", "R2", "R3", "R8", "R9", "P3")
    assert of("v_fma_f32", "v1", "v[2:3]", "s4", kind="fp32") == (("v1",), ("v2", "v3", "s4", "P3"))
    # Atomics have a result where it was asked for, and REDUX is none of them.
    assert of("REDG.E.ADD.64.STRONG.GPU", "desc[UR4][R2.64]", "R8", kind="atomic")[0] == ()
    assert of("ATOMG.E.ADD.64.STRONG.GPU", "PT", "R4", "desc[UR4][R2.64]", "R8", kind="atomic")[0] == ("R4", "R5")
    assert of("REDUX.MAX.S32", "UR44", "R26") == (("UR44",), ("R26", "P3"))
    plain = of("global_atomic_add_x2", "v1", "v[2:3]", "s[8:9]", kind="atomic")
    assert plain == ((), ("v1", "v2", "v3", "s8", "s9", "P3"))
    assert of("global_atomic_add_x2", "v[0:1]", "v4", "v[2:3]", "s[8:9]", "sc0", kind="atomic")[0] == ("v0", "v1")


def launched(warps=4, registers_=64, shared=0, chain=1000.0, once=None, **instructions):
    return Launched(warps, registers_, shared, Counts(instructions, {}), chain, chain if once is None else once)


@pytest.mark.parametrize("bound", ["memory", "cache", "product", "fp32", "integer", "special", "latency"])
def test_a_kernel_is_bound_by_what_it_has_most_of(bound):
    kernel = Kernel("made up", None, None, 132 * 64, 1e6, 1e6)
    many = {"memory": {"memory": 1e9, "cache": 1e9}, "cache": {"cache": 4e9}, "product": {"flops": 1e12}}
    work = {bound: 1e5} if bound in ("fp32", "integer", "special") else {"fp32": 10}
    it = of_kernel(
        replace(kernel, **many.get(bound, {})),
        launched(chain=1e6 if bound == "latency" else 1000.0, **work),
        H100,
    )
    # Arithmetic that no unit is too slow for is bound by issue.
    assert it.bound in ({"fp32", "issue"} if bound == "fp32" else {bound})
    assert it.us >= max(it.bounds.values()) + it.chain_us + it.launch_us - 1e-6
    if bound == "product":
        assert it.bounds["product"] == pytest.approx(1e6 * 1e12 / H100.product_rate)


def test_turns_of_loops_go_on_beside_what_a_bound_counts():
    """A launch takes its bound and what comes before and after it, or its programs one after the other."""
    kernel = Kernel("made up", None, None, 132, 1e6, 1e6, flops=1e10)
    at = [
        of_kernel(kernel, launched(warps=16, chain=chain, once=1000.0), H100) for chain in (1000.0, 20000.0, 200000.0)
    ]
    assert (
        at[0].us == pytest.approx(at[1].us) == pytest.approx(at[0].launch_us + at[0].once_us + at[0].bounds["product"])
    )
    assert at[2].us == pytest.approx(at[2].launch_us + at[2].chain_us)
    assert [it.bound for it in at] == ["product", "product", "latency"]


def test_a_better_machine_is_never_slower():
    wide = replace(H100, memory=2 * H100.memory, cache=2 * H100.cache)
    for memory in (1e5, 1e7, 1e9):
        for programs in (1, 131, 133, 5000):
            for flops in (0.0, 1e10):
                kernel = Kernel("made up", None, None, programs, memory, 3 * memory, flops)
                for what in (None, launched(fp32=500, integer=500)):
                    now = of_kernel(kernel, what, H100).us
                    assert of_kernel(kernel, what, wide).us <= now
                    assert of_kernel(kernel, what, replace(H100, launch=0.0)).us < now
                    assert of_kernel(replace(kernel, memory=2 * memory), what, H100).us >= now
    assert of_kernel(Kernel("", None, None, 5000, 1e9, 1e9), launched(), wide).us < 0.6e9 / H100.copy_rate * 1e6


def test_as_many_programs_are_resident_as_there_is_room_for():
    assert residents(launched(warps=4, registers_=32), H100) == 16, "threads"
    assert residents(launched(warps=1, registers_=32), H100) == 32, "programs"
    assert residents(launched(warps=8, registers_=129), H100) == 65536 // (256 * 136), "registers, by eights"
    assert residents(launched(shared=75 << 10), H100) == 3, "shared memory, and what each takes beside it"
    assert residents(launched(warps=8, registers_=128), MACHINES["gfx942"]) == 2


def timings(path, device: str | None = "NVIDIA H100 80GB HBM3"):
    machine = {"cpu": "x", **({"device": device} if device else {})}
    rates = {"memory": 2.5e12, "cache": 5e12, "gemm": 7e14, "cached": 5e7}
    case = "prefill 1 x 8192, ratio 4"
    lines = [{"machine": machine, "rates": rates}]
    for runner, cache, us in (
        ("triton, bare", "warm", 20.0), ("triton, bare", "cold", 40.0), ("vllm", "cold", 1.0),
        ("an empty launch", "warm", 1.5), ("an empty launch", "cold", 9.0),
    ):  # fmt: skip
        lines.append({"case": case, "runner": runner, "cache": cache, "us": us, "floor_us": 22.0})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_measured_times_stand_beside(tmp_path):
    machine, found = table.measured(timings(tmp_path / "t"), "--measured", H100)
    assert (machine.copy_rate, machine.product_rate) == (2.5e12, 7e14), "measured rates need no assumed part"
    assert machine.launch == pytest.approx(1.5e-6)
    launch = Predicted("windows", 32.0, "memory", {})
    answer = Answer("prefill 1 x 8192, ratio 4", "step", 32.0, 22.0, "memory", 1, 0, (launch,))
    record = table.record_of(answer, found)
    assert (record["measured_us"], record["cache"], record["ratio"]) == (40.0, "cold", 1.25)
    other = table.record_of(replace(answer, form="tiles"), found)
    assert "ratio" not in other, "another form is another kernel"
    way = {"case": "pair", "cache": "cold", "floor_us": 1.0, "us": 30.0}
    both = [{**way, "runner": "GEMM + step"}, {**way, "runner": "GEMM each + step", "us": 34.0}]
    for products, us in ((1, 30.0), (2, 34.0)):  # two compressors have a product each, not one for both
        kernels = (replace(launch, kernel="library product"),) * products
        of = table.record_of(replace(answer, case="pair", form="library, step", kernels=kernels), both)
        assert of["measured_us"] == us
    head, rows = table.rows([record, other])
    assert head[-2:] == ("measured", "ratio")
    assert [row[-1] for row in rows] == ["1.25", "-"]
    assert len(table.rows([other])[0]) == 5
    longest = [{**record, "case": max(table.CASES, key=len), "form": "library, step", "predicted_us": 12345.6}]
    head, rows = table.rows(longest)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    assert sum(widths) + 2 * (len(widths) - 1) <= 100
    assert "".join(row[0].strip() for row in rows).replace(" ", "") == longest[0]["case"].replace(" ", "")


def test_the_command_shows_measured_times(tmp_path):
    file = timings(tmp_path / "t")
    words = ("--case", "prefill 1 x 8192, ratio 4", "--measured", file, "--json", tmp_path / "j")
    text = compiling("-m", "kvcondense", "bench", "--predict", "sm_90", *words)
    record = json.loads((tmp_path / "j").read_text().splitlines()[1])
    assert record["measured_us"] == 40.0
    assert record["ratio"] == pytest.approx(40 / record["predicted_us"], rel=1e-2)
    assert "copy 2500 GB/s" in text
    assert "ratio" in text


def test_it_refuses(tmp_path):
    old, new = str(timings(tmp_path / "t")), str(timings(tmp_path / "cpu", device=None))
    for words, reason in (
        ("--predict sm_91", "--predict"),
        ("--predict sm_90 --case nothing", "--case"),
        ("--predict sm_90 --resume", "--resume: expected to be left out with --predict"),
        ("--predict sm_90 --backend triton", "--backend"),
        ("--predict sm_90 --training", "--training"),
        ("--predict sm_90 --plot x.png", "--plot"),
        ("--predict sm_90 --list", "--predict: expected to be left out with --list"),
        (f"--measured {old}", "--measured: expected --predict beside it"),
        (f"--predict sm_90 --measured {new}", "--measured: expected timings of a GPU"),
        (f"--predict sm_90 --measured {tmp_path}/none", "--measured"),
        ("--predict sm_90 --case ratio", "TRITON_INTERPRET"),
    ):
        done = CliRunner().invoke(app, ["bench", *words.split()])
        assert done.exit_code == 2, words
        assert reason in " ".join(done.output.split()), done.output
