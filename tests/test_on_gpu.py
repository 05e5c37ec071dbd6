"""tools/on_gpu.py without a GPU: its plan, deadlines that end whole groups, results that no kill can take away."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from on_gpu import probes, runner, steps, timings  # noqa: E402
from on_gpu.runner import FAILED, KILLED, NOT_REACHED, OK, RUNNING, SKIPPED, TIMED_OUT, Step  # noqa: E402

from kvcondense.bench.cases import DEVICE_CASES  # noqa: E402
from kvcondense.bench.fused import LAYERS  # noqa: E402

WRITES = """
import json, sys, time
def record(**what):
    with open({out!r} + "/records.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")
"""


def step(out, name, code, seconds=30.0, **more):
    command = [sys.executable, "-c", WRITES.format(out=str(out)) + code]
    return Step(name, "", seconds, command, lambda r: f"{len(r)} records", **more)


def run(out, planned, budget=None):
    said = []
    budget = budget or sum(s.seconds for s in planned)
    return runner.run(planned, out, budget, {"stage": "first"}, said.append), said


def results(out):
    return json.loads((out / "results.json").read_text())


def command(*words, **more):
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "on_gpu.py", *map(str, words)], capture_output=True, text=True, timeout=300,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""}, check=False, **more,
    )  # fmt: skip


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("name", steps.STAGES)
@pytest.mark.parametrize("stand_in", [False, True])
def test_a_stage_fits_into_a_call_of_ten_minutes(tmp_path, name, stand_in):
    planned = steps.stage(name, steps.Asked(tmp_path, stand_in))
    assert len({s.name for s in planned}) == len(planned)
    assert sum(s.seconds for s in planned) <= 570
    assert planned[0].vital
    assert {s.environment["TRITON_INTERPRET"] for s in planned} == {"1" if stand_in else "0"}
    files = {s.records for s in planned}
    assert len(files | {"results.json", "results.json.new", "log.txt"}) <= 8


def test_the_timings_that_decide_are_cases_of_the_bench():
    for names, known in ((timings.CASES, DEVICE_CASES), (timings.LAYERS, LAYERS)):
        assert len(names) == len(set(names)) >= 6
        for name in names:
            assert [k for k in known if name in k] == [name], "a part of one name alone"
    assert set(timings.FEW_CASES) <= set(timings.CASES)
    assert set(timings.FEW_LAYERS) <= set(timings.LAYERS)
    assert set(probes.COUNTED) <= set(DEVICE_CASES)
    assert set(probes.COUNTED_LAYERS) <= set(LAYERS)


def test_the_plan_is_printed_and_nothing_runs(tmp_path):
    done = command("--plan", "--stage", "second", "--budget", 57, "--json", tmp_path / "p.json")
    assert done.returncode == 0, done.stderr
    planned = json.loads((tmp_path / "p.json").read_text())
    assert list(planned["steps"]) == [s.name for s in steps.stage("second", steps.Asked(tmp_path, False))]
    assert sum(planned["steps"].values()) == pytest.approx(57, abs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("words", "word"), [(["--step", "nothing"], "--step"), (["--budget", "0"], "--budget"), ([], "--out")]
)
def test_bad_arguments_are_errors(tmp_path, words, word):
    done = command(*words, *(["--out", tmp_path] if words else []))
    assert done.returncode == 2
    assert f"error: {word}: expected" in done.stdout


def test_a_dry_run_says_in_every_record_that_it_is_one(tmp_path):
    words = [w for name in ("machine", "rates", "barrier", "tests") for w in ("--step", name)]
    done = command("--stand-in", "--out", tmp_path, *words)
    assert done.returncode == 0, done.stdout
    found = results(tmp_path)
    assert found["stand_in"] is True
    assert [s["status"] for s in found["steps"]] == [OK] * 4
    made = [r for s in found["steps"] for r in s["records"]]
    assert len(made) > 100
    assert all(r["stand_in"] is True for r in made)
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == made
    assert len(list(tmp_path.iterdir())) <= 8
    assert "a stand-in's times mean nothing" in done.stdout
    assert made[-1]["outcome"] == "skipped"


def test_a_dry_run_goes_through_the_commands(tmp_path):
    words = [w for name in ("tune", "all timings") for w in ("--step", name)]
    done = command("--stand-in", "--stage", "second", "--out", tmp_path, *words)
    assert done.returncode == 0, (done.stdout, (tmp_path / "log.txt").read_text())
    tuned, timed = (s["records"] for s in results(tmp_path)["steps"])
    assert any(r.get("us") for r in tuned if "block" in r)
    assert "table" in tuned[-1]
    assert {r["complete"] for r in timed if "complete" in r} == {"decode 16 on a boundary, ratio 4"}
    assert all(r["stand_in"] for r in [*tuned, *timed])


def test_without_a_gpu_it_fails_loudly(tmp_path):
    done = command("--out", tmp_path)
    assert done.returncode == 1
    assert "there is no GPU" in done.stdout
    first, *others = results(tmp_path)["steps"]
    assert first["status"] == FAILED
    assert {s["status"] for s in others} == {SKIPPED}


def test_every_end_of_a_step_is_told_apart(tmp_path):
    planned = [
        step(tmp_path, "good", "record(n=1)"),
        step(tmp_path, "bad", "record(n=2); print('what went wrong'); sys.exit(3)"),
        step(tmp_path, "slow", "record(n=3); time.sleep(60)", seconds=1.0),
        step(tmp_path, "shot", "record(n=4); import os; os.kill(os.getpid(), 9)"),
        step(tmp_path, "absent", "", skip="no such program"),
        step(tmp_path, "vital", "sys.exit(1)", vital=True),
        step(tmp_path, "last", ""),
    ]
    planned[0] = Step(**{**vars(planned[0]), "seconds": 0.2})
    planned[1] = Step(**{**vars(planned[1]), "seconds": 2.0})
    found, said = run(tmp_path, planned)
    status = {s["name"]: s["status"] for s in found.steps}
    assert status == {
        "good": status["good"], "bad": FAILED, "slow": TIMED_OUT, "shot": KILLED, "absent": SKIPPED, "vital": FAILED,
        "last": SKIPPED,
    }  # fmt: skip
    assert [r["n"] for s in found.steps[1:4] for r in s["records"]] == [2, 3, 4], "of steps that failed, too"
    assert found.steps[1]["exit"] == 3
    assert "what went wrong" in found.steps[1]["tail"]
    assert found.steps[6]["reason"] == "vital failed"
    assert results(tmp_path) == found.whole()
    assert "absent: skipped, no such program" in said


def test_time_that_a_step_leaves_is_its_followers(tmp_path):
    planned = [step(tmp_path, "quick", "", seconds=8.0), step(tmp_path, "slow", "time.sleep(1)", seconds=0.01)]
    found, _ = run(tmp_path, planned)
    assert [s["status"] for s in found.steps] == [OK, OK]


GROUP = """
import os, signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(90)"
child = subprocess.Popen([sys.executable, "-c", deaf])
record(pids=[os.getpid(), child.pid])
time.sleep(90)
"""


def test_a_deadline_ends_the_whole_group(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE_S", 0.3)
    found, _ = run(tmp_path, [step(tmp_path, "deaf", GROUP, seconds=3.0)])
    assert found.steps[0]["status"] == TIMED_OUT
    pids = found.steps[0]["records"][0]["pids"]
    assert len(pids) == 2
    wait_for(lambda: not any(map(alive, pids)))


def test_what_a_step_leaves_running_is_ended(tmp_path):
    code = "import subprocess; c = subprocess.Popen(['sleep', '90']); record(pid=c.pid)"
    found, _ = run(tmp_path, [step(tmp_path, "leaves", code)])
    assert found.steps[0]["status"] == OK
    wait_for(lambda: not alive(found.steps[0]["records"][0]["pid"]))


LONG = """
import sys
from pathlib import Path
sys.path.insert(0, {tools!r})
from on_gpu.runner import Step, run
out = Path({out!r})
code = "import json, pathlib, time; f = open({out!r} + '/records.jsonl', 'a');"
code += "print(json.dumps(dict(n=%d)), file=f, flush=True); time.sleep(0.1);"
code += "pathlib.Path({out!r} + '/ended', '%d').touch(); time.sleep(0.05)"
(out / "ended").mkdir()
steps = [Step(str(i), "", 60.0, [sys.executable, "-c", code % (i, i)], lambda r: "") for i in range(200)]
run(steps, out, 12000.0, dict(stage="first"), lambda text: None)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_any_moment_it_leaves_what_had_ended(tmp_path, number):
    words = [sys.executable, "-c", LONG.format(tools=str(ROOT / "tools"), out=str(tmp_path))]
    moment = random.Random().uniform(0.5, 2.5)
    with subprocess.Popen(words) as child:
        wait_for(lambda: (tmp_path / "results.json").exists())
        time.sleep(moment)
        assert child.poll() is None
        child.send_signal(number)
    found = results(tmp_path)["steps"]
    done = [int(s["name"]) for s in found if s["status"] == OK]
    ended = sorted(int(p.name) for p in (tmp_path / "ended").iterdir())
    assert done == list(range(len(done))), moment
    assert len(done) >= len(ended) - 1, f"all but one that ended as the kill came ({moment})"
    assert all(s["records"] == [{"n": int(s["name"])}] for s in found if s["status"] == OK)
    current = found[len(done)]
    assert current["status"] in (KILLED if number == signal.SIGTERM else RUNNING, NOT_REACHED)
    assert len(found) == 200
    assert {s["status"] for s in found[len(done) + 1 :]} == {NOT_REACHED}


@pytest.mark.parametrize(("code", "count"), [("sys.exit(2)", 0), ("open(sys.argv[1], 'a').write('{}\\n')", 2)])
def test_a_file_that_a_step_refuses_gives_it_no_records(tmp_path, code, count):
    (tmp_path / "bench.jsonl").write_text('{"case": "of another machine"}\n')
    planned = step(tmp_path, "timings", code, records="bench.jsonl")
    command = [*planned.command, str(tmp_path / "bench.jsonl")]
    found, _ = run(tmp_path, [Step(**{**vars(planned), "command": command})])
    assert len(found.steps[0]["records"]) == count


def test_another_stages_steps_are_kept(tmp_path):
    run(tmp_path, [step(tmp_path, "one", "record(n=1)")])
    planned = [step(tmp_path, "two", "record(n=2)")]
    found = runner.run(planned, tmp_path, 30.0, {"stage": "second"}, lambda _: None)
    assert [(s["stage"], s["name"], s["records"]) for s in found.whole()["steps"]] == [
        ("first", "one", [{"n": 1}]), ("second", "two", [{"n": 2}]),
    ]  # fmt: skip


def test_only_what_nobody_asked_for_may_be_skipped():
    spec = importlib.util.spec_from_file_location("on_gpu_command", ROOT / "tools" / "on_gpu.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.good({"status": OK}, False)
    assert not tool.good({"status": SKIPPED, "excused": False}, False)
    assert tool.good({"status": SKIPPED, "excused": False}, True)
    assert tool.good({"status": SKIPPED, "excused": True}, False)
    for status in (FAILED, TIMED_OUT, KILLED, NOT_REACHED, RUNNING):
        assert not tool.good({"status": status, "excused": True}, True)


def test_ncus_page_is_read():
    text = '==PROF== Connected\n{"steps": 1}\n"ID","Kernel Name","gpu__time_duration.sum","other"\n"","","us","%"\n'
    text += '"0","condense_kernel","12.5","3"\n"1","decode_kernel","20","4"\n==PROF== Disconnected\n'
    assert list(probes.of_csv(text)) == [
        {"kernel": "condense_kernel", "gpu__time_duration.sum": "12.5 us"},
        {"kernel": "decode_kernel", "gpu__time_duration.sum": "20 us"},
    ]
    assert list(probes.of_csv("==ERROR== no permission\n")) == []


def test_timings_stand_beside_what_was_expected():
    case = timings.CASES[0]
    records = [
        {"case": case, "runner": "triton, bare", "cache": c, "us": us, "floor_us": 10.0}
        for c, us in (("warm", 15.0), ("cold", 20.0))
    ]
    for device, expected in (("NVIDIA H100 80GB HBM3", "19"), ("NVIDIA H200", "15"), ("another", "-")):
        assert timings.table(records, device)[1].split()[-4:] == ["10.0", expected, "15.0", "20.0"]
    assert "at most 2.0 x floor" in timings.worst(records)
