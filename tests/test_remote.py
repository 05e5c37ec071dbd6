"""Adapters in another process: the C example passes, what is wrong is found as in-process, faults are told apart."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcondense import KvCondenseError
from kvcondense.conformance import wire
from kvcondense.conformance.cases import Case, Op
from kvcondense.conformance.invariants import INVARIANTS, check, first_failure, play, whole
from kvcondense.conformance.own import load_factory
from kvcondense.conformance.play import Player
from kvcondense.conformance.process import RemoteError
from kvcondense.conformance.remote import exec_factory
from kvcondense.layout.batch import RaggedBatch
from remote_drivers import faulty, running

HERE = Path(__file__).parent
C = HERE.parent / "examples" / "c"
BY_NAME = {i.name: i for i in INVARIANTS}
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
PYTHON = f"{sys.executable} -m kvcondense.conformance.driver"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")


def compiled(folder, name, changes=()):
    """The C driver, with texts of its source exchanged."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc)")
    sources = {path.name: path.read_text() for path in C.iterdir()}
    for old, new in changes:
        found = [key for key, text in sources.items() if old in text]
        assert len(found) == 1, old
        assert sources[found[0]].count(old) == 1, old
        sources[found[0]] = sources[found[0]].replace(old, new)
    target = folder / name
    for key, text in sources.items():
        (target.with_suffix(".src") / key).parent.mkdir(exist_ok=True)
        (target.with_suffix(".src") / key).write_text(text)
    source = target.with_suffix(".src") / "driver.c"
    subprocess.run(["cc", *FLAGS, str(source), "-lm", "-o", str(target)], check=True)
    return str(target)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("c"), "driver")


def only(make, *specs):
    """The same adapters, asked for these compressors."""

    def narrow():
        adapter = make()
        adapter.capabilities = replace(adapter.capabilities, specs=specs)
        return adapter

    return narrow


@pytest.fixture
def environment(monkeypatch):
    """For drivers that are Python."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent / "src"), str(HERE)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def gone(marker):
    gc.collect()
    end = time.monotonic() + 2  # grandchildren end in a moment of their own
    while (left := running(marker)) and time.monotonic() < end:
        time.sleep(0.01)
    return not left


@pytest.mark.parametrize("name", BY_NAME)
def test_the_c_example_keeps_every_promise(driver, name):
    specs = ("csa", "hca", "indexer", "fused", "r2", "r2 rounding=latent")
    outcome = check(BY_NAME[name], only(exec_factory(driver), *specs))
    assert outcome.passed, (outcome.detail, outcome.case)
    assert bool(outcome.skipped) == (name in ("I9 bytes", "I9 codes"))
    assert gone(driver)


def test_the_c_example_at_real_head_sizes(driver):
    make = exec_factory(driver)
    declared = make().capabilities.specs
    assert {"csa head_dim=512 rope_dim=64", "hca head_dim=512 rope_dim=64"} <= set(declared)
    for name in ("I9 numerics", "I2 rollback", "I7 address"):
        outcome = check(BY_NAME[name], only(make, *declared[-3:]))
        assert outcome.passed, (name, outcome.detail, outcome.case)


BEGIN = "const char *wrong = kvc_check(c, b);\n  if (wrong)"
BROKEN = {
    "I9 numerics": ("csa", [("kvc_finish(c, position / r * r, c->scratch);", "kvc_finish(c, position, c->scratch);")]),
    "I2 rollback": (  # a ring one row short, and nobody who looks
        "r2",
        [
            ("(s.max_draft ? s.max_draft : 1)", "(s.max_draft > 1 ? s.max_draft - 1 : 1)"),
            ("if (*kvc_tag(c, slot, p) != p)", "if (0 && *kvc_tag(c, slot, p) != p)"),
        ],
    ),
    "I3 isolation": ("csa", [("return c->state + (slot * c->ring", "return c->state + (0 * slot * c->ring")]),
    "I4 inertness": (  # a spare token has no weight, and is added all the same
        "csa",
        [
            (
                "row[i] = from[i],",
                "row[i] = from[i] + (b->tokens > b->query_start_loc[b->requests]"
                " ? 0 * b->kv_score[(b->tokens - 1) * 2 * n] : 0),",
            )
        ],
    ),
    "I7 address": ("csa", [("bf16[at * d + i] =", "bf16[(at * d & 0x7fffffff) + i] =")]),
    "I12 fail closed": (  # refused, but the state is gone
        "csa",
        [(BEGIN, BEGIN.replace("if", "for (int64_t i = 0; wrong && i < c->s.num_slots; i++) kvc_forget(c, i);\n  if"))],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_c_driver_is_found_by_the_right_invariant(tmp_path, name):
    spec, changes = BROKEN[name]
    outcome = first_failure(only(exec_factory(compiled(tmp_path, "broken", changes)), spec))
    assert outcome is not None
    assert outcome.invariant == name, outcome
    assert not outcome.raised or "I12" in name, "a wrong answer, not a crash"
    assert (outcome.case is None) == ("I12" in name)


REFUSED = {
    "query_start_loc: expected at least 3, got 2": {"query_start_loc": [0, 3, 2], "start_positions": [0, 0]},
    "kv_score: expected rows 9, got 3": {"query_start_loc": [0, 9]},
    "state_slots: expected a slot below 5, got 5": {"state_slots": [5]},
    "state_slots: expected a slot below 5, got -2": {"state_slots": [-2]},
    "state_slots: expected every slot once": {"query_start_loc": [0, 1, 3], "start_positions": [0, 0]},
    "which lacks position 8, got 12": {"start_positions": [12]},
    "expected a position up to 49, got 1099511627776": {"start_positions": [1 << 40]},
    "start_positions: expected to end at 49, got 51": {"start_positions": [0], "tokens": 51},
    "draft_rows: expected from 0 to 2, got 3": {"draft_rows": [3]},
    "block_table: expected more pages than 1": {"tokens": 20, "block_table": [[1]]},
    "block_table: expected a page from 0, below": {"tokens": 4, "block_table": [[1 << 40]]},
    "slot_mapping: expected -1, or a row below": {"tokens": 4, "slot_mapping": [0, 0, 0, 1 << 40]},
    "slot_mapping: expected a cache row of its own": {"tokens": 8, "slot_mapping": [4] * 8},
}


@pytest.mark.parametrize("text", REFUSED)
def test_the_c_example_says_what_it_refuses(driver, text):
    player = Player(Case("csa", 1, (Op("step", (6,), drafts=2), Op("step", (42,)))), exec_factory(driver))
    adapter, change = player.adapter, REFUSED[text]
    # What a batch of kvcondense's would refuse itself is sent all the same.
    tokens = torch.zeros(change.get("tokens", 3), player.spec.projected)
    requests = len(change.get("start_positions", [0]))
    fields = {
        "query_start_loc": [0, tokens.shape[0]],
        "start_positions": [0],
        "draft_rows": [0] * requests,
        "state_slots": [1] * requests,
        **({} if "slot_mapping" in change else {"block_table": [[1] * 20] * requests}),
        **{key: value for key, value in change.items() if key != "tokens"},
    }
    if text.startswith("draft"):
        fields["draft_rows"], fields["query_start_loc"] = [3], [0, 3]
    batch = RaggedBatch(**{key: torch.tensor(value) for key, value in fields.items()})
    with pytest.raises(RemoteError) as caught:
        adapter.step(tokens, batch)
    assert text in str(caught.value)
    assert caught.value.place.startswith("refusal in step: ")
    good = RaggedBatch.build([0, 3], start_positions=[0], state_slots=[1], block_table=[[1]])
    adapter.step(tokens[:3], good)  # it goes on


@pytest.mark.usefixtures("environment")
def test_the_python_driver_passes_with_the_reference():
    make = only(exec_factory(f"{PYTHON} reference:ring"), "csa")
    names = [n for n in BY_NAME if n not in ("I7 position", "I10 determinism")]
    quantised = only(make, "csa head_dim=512 rope_dim=64 format=fp8_model1 page_rows=64")
    for name, adapters in [*((name, make) for name in names), ("I9 numerics", quantised)]:
        outcome = check(BY_NAME[name], adapters)
        assert outcome.passed, (name, outcome.detail, outcome.case)


def test_a_mapping_is_as_long_as_the_tokens():
    batch = RaggedBatch.build([0, 2], start_positions=[0], state_slots=[0], slot_mapping=[3, 4])
    for tokens in (2, 5):
        message = wire.unpack(wire.of_step(torch.zeros(tokens, 8), batch)[8:], "step")
        assert message.tensors["slot_mapping"].tolist() == [3, 4, -1, -1, -1][:tokens]


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("name", "spec", "invariant"),
    [("overlap-ignored", "csa", "I9 numerics"), ("stale-draft-row", "r2", "I5 only-written reads")],
)
def test_a_mutant_is_found_as_in_process(name, spec, invariant):
    here = check(BY_NAME[invariant], only(load_factory(f"mutant:{name}"), spec))
    there = check(BY_NAME[invariant], only(exec_factory(f"{PYTHON} mutant:{name}"), spec))
    assert (there.detail, there.case) == (here.detail, here.case)
    assert here.case is not None


TOLD = {
    ("hang", "step"): ("hang in step", "an answer within 0.2 s, got nothing; stderr: waiting for a lock"),
    ("endless", "step"): ("hang in step", "of 1073741832 bytes"),
    ("segv", "step"): ("crash in step", "signal SIGSEGV; stderr: about to fall"),
    ("leaves", "init"): ("crash in init", "exit status 3; stderr: "),
    ("prints", "step"): ("garbage in step", "b'Hello, w' (is something else printed on stdout?)"),
    ("empty", "step"): ("garbage in step", "a length of 8 to 2147483648 bytes"),
    ("huge", "step"): ("garbage in step", "a length of 8 to 2147483648 bytes"),
    ("noise", "step"): ("garbage in step", "a safetensors header of at most 1048576 bytes"),
    ("long_header", "step"): ("garbage in step", "1073741824 bytes in a message of 64"),
    ("no_json", "step"): ("garbage in step", "the answer header to be a JSON object"),
    ("outside", "rows"): ("garbage in rows", "a safetensors file"),
    ("version", "init"): ("garbage in init", "version 1 of the protocol, got 2"),
    ("kind", "step"): ("garbage in step", "the answer's kind to be done or error, got step"),
    ("missing", "rows"): ("garbage in rows", "the answer rows to be a tensor, got nothing"),
    ("surplus", "step"): ("garbage in step", "the answer extra to be no tensor"),
    ("dtype", "rows"): ("garbage in rows", "bfloat16 or float32, got int64"),
    ("shape", "rows"): ("garbage in rows", "shape [1, 65]"),
    ("twice", "step"): ("garbage in step", "nothing after the answer"),
    ("refuses", "step"): ("refusal in step: not on a Friday", "got not on a Friday"),
}


@pytest.mark.parametrize("what", TOLD, ids="-".join)
def test_a_fault_is_told_as_what_it_is_with_its_history(what):
    place, text = TOLD[what]
    marker = f"marker-{what[0]}-{os.getpid()}"
    make = exec_factory(faulty(*what, marker), timeout=0.2 if "hang" in place else 30)
    outcome = check(BY_NAME["I6 emission"], make)
    assert outcome.raised.startswith(place)
    assert text in outcome.detail
    assert len(outcome.detail) < 4000
    assert outcome.case is not None
    assert outcome.case.size <= 400
    del make
    assert gone(marker)


def test_a_driver_that_does_not_read_hangs():
    case = Case("csa", 1, (Op("step", (1000,)),))
    found, _ = play(case, exec_factory(faulty("deaf"), timeout=0.3), whole)
    assert found.place == "hang in step"
    assert "bytes of the request still unread" in found


def test_a_driver_that_has_failed_says_so_again_and_is_not_used_again():
    make = exec_factory(faulty("leaves"))
    player = Player(Case("csa", 1, (Op("step", (1,)),)), make)
    for _ in range(2):
        with pytest.raises(RemoteError, match="no more memory") as caught:
            player.run()
        assert caught.value.place == "crash in step"
    with pytest.raises(RemoteError, match="exit status 3"):
        player.adapter.rows(torch.tensor([0]))
    Player(player.case, make)  # another process


def test_processes_are_used_again_and_stderr_may_be_full():
    marker = f"marker-chatters-{os.getpid()}"
    make = exec_factory(faulty("chatters", "step", marker))
    first = Player(Case("csa", 1, (Op("step", (3,)),)), make)
    first.run()
    held = running(marker)
    assert len(held) == 1
    del first
    gc.collect()
    two = [Player(Case("csa", 1, (Op("step", (3,)),)), make) for _ in range(2)]
    assert len(running(marker)) == 2
    assert held[0] in running(marker)
    del two, make
    assert gone(marker)


HELLO = {
    ("no-such-program-here",): "a program that starts",
    ("hang",): "hang: nothing",
    ("leaves",): "crash: exit status 3",
    ("prints",): "garbage: bytes b'Hello, w'",
    ("version",): "garbage: 2",
    ("missing",): "metadata name to be a text, got nothing",
    ("refuses",): "refusal: not on a Friday",
    ("fine", '{"speed": 3}'): "capabilities speed to be one of",
    ("fine", '{"max_draft": "many"}'): "capabilities max_draft to be int, got str",
    ("fine", '{"max_draft": -1}'): "capabilities max_draft to be at least 0, got -1",
    ("fine", '{"specs": ["csa of=4"]}'): "to be field=value, once",
    ("fine", '{"formats": true}'): "capabilities formats to be false",
    ("fine", "[]"): "capabilities to be a JSON object",
}


@pytest.mark.parametrize("what", HELLO, ids="-".join)
def test_a_driver_that_does_not_say_hello_is_refused_before_anything_runs(monkeypatch, what):
    if len(what) > 1:
        monkeypatch.setenv("CAPABILITIES", what[1])
    marker = f"marker-hello-{os.getpid()}"
    command = f"./{what[0]}" if "program" in what[0] else faulty(what[0], "hello", marker)
    with pytest.raises(KvCondenseError) as caught:
        exec_factory(command, timeout=0.5 if what[0] == "hang" else 30)
    assert str(caught.value).startswith("--exec: expected ")
    assert HELLO[what] in str(caught.value)
    del caught
    assert gone(marker)


@pytest.mark.parametrize("command", ["", "  ", "'half", "a\0b"])
def test_a_command_that_is_none_is_refused(command):
    with pytest.raises(KvCondenseError, match="--exec: expected a "):
        exec_factory(command)


def test_a_shell_is_not_asked_and_a_whole_group_ends(tmp_path):
    marker = f"marker-group-{os.getpid()}"
    with pytest.raises(KvCondenseError, match="--exec"):
        exec_factory(f"true; touch {tmp_path}/made", timeout=5)
    assert not list(tmp_path.iterdir())
    make = exec_factory(f"sh -c '{faulty('hang', 'step', marker)}; true'", timeout=2)
    with pytest.raises(RemoteError, match="within 2 s"):
        Player(Case("csa", 1, (Op("step", (1,)),)), make).run()
    assert gone(marker)
    sleep = f"{7 * 10**8 + os.getpid()}"
    make = exec_factory(f"sh -c 'sleep {sleep} & exec {faulty('fine', '-', sleep)}'")
    assert len(running(sleep)) == 2
    del make
    assert gone(sleep)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_the_end_of_the_program_is_the_end_of_its_drivers(number):
    """Ctrl-C in the middle of a request; of those that wait for one, too, and of what they have started."""
    marker = f"marker-end-{os.getpid()}"
    hangs = f"sh -c '{faulty('hang', 'step', marker)}; true'"
    program = textwrap.dedent(f"""
        import signal
        from kvcondense.conformance.remote import exec_factory
        from kvcondense.conformance.play import Player
        from kvcondense.conformance.cases import Case, Op
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it
        make = exec_factory({hangs!r})
        players = [Player(Case("csa", 1, (Op("step", (1,)),)), make) for _ in range(2)]
        idle = exec_factory({faulty("fine", "step", marker)!r})
        print("started", flush=True)
        players[0].run()
    """)
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(0.2)
        assert len(running(marker)) == 6  # itself among them
        process.send_signal(number)
        _, complaints = process.communicate(timeout=20)
    assert ("KeyboardInterrupt" in complaints) == (number == signal.SIGINT)
    assert gone(marker)


@pytest.mark.usefixtures("environment")
def test_a_child_of_the_kit_that_goes_on_does_not_keep_a_hung_driver():
    program = textwrap.dedent("""
        import os, signal, sys, time
        from kvcondense.conformance.process import Process
        held = Process([sys.executable, "-c", "import time; time.sleep(1000)", f"marker-forks-{os.getppid()}"])
        if (child := os.fork()) == 0:
            time.sleep(1000)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        try:
            process.wait(20)
            assert gone(f"marker-forks-{os.getpid()}")
            os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.usefixtures("environment")
def test_the_python_driver_keeps_its_stdout_to_itself(tmp_path, monkeypatch):
    (tmp_path / "printing.py").write_text(
        "import os\nfrom kvcondense.conformance.own import BackendAdapter\nprint('imported')\n"
        "def make():\n    os.system('echo from a shell')\n    print(input() if False else 'made')\n"
        "    return BackendAdapter('reference', 'online')\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    asked = wire.pack("hello") + wire.pack("rows", {"slots": torch.tensor([0])}) + wire.pack("done")
    done = subprocess.run(
        [*PYTHON.split(), "printing:make"], input=asked, capture_output=True, timeout=60, check=True
    )  # fmt: skip
    answers, data = [], done.stdout
    while data:
        size = wire.length(data[:8], "answer")
        answers.append(wire.unpack(data[8 : 8 + size], "answer"))
        data = data[8 + size :]
    assert [a.kind for a in answers] == ["done", "error", "error"]
    able = json.loads(answers[0].text("capabilities"))
    assert able["exports"] is False
    assert able["returns_state"] is False
    assert "init first" in answers[1].text("error")
    assert done.stderr.decode().split() == ["imported", "from", "a", "shell", "made"]
