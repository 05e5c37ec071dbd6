"""The C program on test vectors: right on all it can do, wrong programs are caught, damaged files are refused."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import alterations
from kvcondense import KvCondenseError
from kvcondense.conformance.mutants import mutant
from kvcondense.conformance.vectors import made, schema
from kvcondense.conformance.vectors.compared import wrong
from kvcondense.conformance.vectors.schema import Vector

C = Path(__file__).parent.parent / "examples" / "c"
FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
DONE, REFUSED, NO_VECTOR, UNABLE = range(4)
COUNT = 200

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc)")


def compiled(folder, changes=(), flags=()):
    """The program, with texts of its compressor exchanged."""
    for path in C.iterdir():
        text = path.read_text()
        if path.name == "compressor.h":
            for old, new in changes:
                assert text.count(old) == 1, old
                text = text.replace(old, new)
        (folder / path.name).write_text(text)
    target = folder / "vectors"
    subprocess.run(["cc", *FLAGS, *flags, str(folder / "vectors.c"), "-lm", "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """With the sanitizers, if the compiler has them."""
    folder = tmp_path_factory.mktemp("sanitized")
    (folder / "probe.c").write_text("int main(void) { return 0; }\n")
    probe = ["cc", *SANITIZERS, str(folder / "probe.c"), "-o", str(folder / "probe")]
    works = subprocess.run(probe, capture_output=True).returncode == 0
    works = works and subprocess.run([folder / "probe"], capture_output=True).returncode == 0
    return compiled(folder, flags=SANITIZERS if works else ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All vectors: where they are, and what is in there."""
    found = tmp_path_factory.mktemp("vectors")
    vectors = list(made.vectors())
    schema.write(found, vectors, "a test")
    return found, vectors


def run(program, path, out):
    """Its exit status, and what it says; there is a file if it is 0, else one line."""
    out.unlink(missing_ok=True)
    options = {"ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0:exitcode=99"}
    done = subprocess.run(
        [program, path, out], capture_output=True, timeout=20, env={**os.environ, **options}, check=False
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode in (DONE, REFUSED, NO_VECTOR, UNABLE), said
    assert out.exists() == (done.returncode == DONE)
    assert len(said.splitlines()) == (done.returncode != DONE), said
    return done.returncode, said


def test_every_vector_without_a_format_of_its_own_passes(program, folder, tmp_path):
    path, vectors = folder
    left = []
    for vector, expected in vectors:
        status, said = run(program, path / f"{vector.name}.json", tmp_path / "out.safetensors")
        if status == UNABLE:
            left.append(vector.name)
            assert said == f"needs {next(need for need in vector.needs if need.startswith('format'))}\n"
            continue
        assert status == DONE, (vector.name, said)
        got = schema.tensors(tmp_path / "out.safetensors")
        assert wrong(vector, expected, got) == [], vector.name
        assert ("pages" in got) == vector.exact
    asked = {vector.name: [need for need in vector.needs if need.startswith("format ")] for vector, _ in vectors}
    assert left == [name for name, needs in asked.items() if needs and needs[0].split()[1] not in ("bf16", "fp32")]
    assert len(vectors) - len(left) > 150


BEGIN = "const char *wrong = kvc_check(c, b);\n  if (wrong)"
FORGETS = "for (int64_t i = 0; wrong && i < c->s.num_slots; i++) kvc_forget(c, i);\n  if"
END = "b->query_start_loc[q + 1]"
WRONG = {
    "a ring one row short, and nobody who looks": (
        mutant.SPECULATION,
        [
            ("(s.max_draft ? s.max_draft : 1)", "(s.max_draft > 1 ? s.max_draft - 1 : 1)"),
            ("if (*kvc_tag(c, slot, p) != p)", "if (0 && *kvc_tag(c, slot, p) != p)"),
        ],
    ),
    "addresses of 31 bits": (
        mutant.BOUNDS,
        [("bf16[at * d + i] =", "bf16[(at * d & 0x7fffffff) + i] =")],
    ),
    "a spare token counts": (
        mutant.PADDING,
        [(f"t < {END}; t++", f"t < (q + 1 < b->requests ? {END} : b->tokens); t++")],
    ),
    "one state for all": (
        mutant.BATCH,
        [("return c->state + (slot * c->ring", "return c->state + (0 * slot * c->ring")],
    ),
    "refused, but the state is gone": (
        mutant.BOUNDS,
        [(BEGIN, BEGIN.replace("if", FORGETS))],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_caught_by_a_vector_of_its_class(name, folder, tmp_path):
    bug_class, changes = WRONG[name]
    program = compiled(tmp_path, changes)
    path, vectors = folder
    caught = []
    for vector, expected in vectors:
        if vector.bug_class != bug_class:
            continue
        status, _ = run(program, path / f"{vector.name}.json", tmp_path / "out.safetensors")
        assert status != UNABLE
        if status != DONE or wrong(vector, expected, schema.tensors(tmp_path / "out.safetensors")):
            caught.append(vector.name)
    assert caught


def test_a_cache_that_no_memory_holds_is_a_need(program, folder, tmp_path):
    limited = tmp_path / "limited"
    limited.write_text(f'#!/bin/sh\nulimit -v 2000000\nexec "{program}" "$@"\n')
    limited.chmod(0o755)
    status, said = run(limited, folder[0] / "I7-address-csa-0.json", tmp_path / "out.safetensors")
    assert status == UNABLE
    assert said.startswith("needs huge_cache: init: expected room for state and cache")


def test_outputs_of_other_shapes_are_told(folder, program, tmp_path):
    vector, expected = next(pair for pair in folder[1] if pair[0].invariant == "I12 fail closed")
    run(program, folder[0] / f"{vector.name}.json", tmp_path / "out.safetensors")
    got = schema.tensors(tmp_path / "out.safetensors")
    assert wrong(vector, expected, got) == []
    for name, t in got.items():
        for other in (t[:-1], torch.cat([t, t]), t.flatten()[:3], t[..., :0]):
            assert wrong(vector, expected, {**got, name: other}), (name, other.shape)
        assert wrong(vector, expected, {k: v for k, v in got.items() if k != name})


def altered(chance, data, kind, others):
    """A file of a vector as damage or another's writer may have it."""
    if kind == "safetensors":
        return alterations.of_safetensors(chance, data, others)
    if chance.random() < 0.3:
        return alterations.of_bytes(chance, data, others)
    return alterations.rendered(alterations.tree(chance, json.loads(data))).encode("utf-8", "surrogatepass")


def refused_by_python(data):
    """By what an entry may be; what a machine can hold is another question, and C has its own bounds."""
    try:
        Vector.from_json(data.decode(), "vector")
    except (KvCondenseError, UnicodeDecodeError):
        return True
    return False


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_altered_files_are_refused_or_done_and_nothing_falls(kind, sanitized, folder, tmp_path, monkeypatch):
    path, vectors = folder
    monkeypatch.setattr("kvcondense.conformance.vectors.bounds.check", lambda *_: None)
    chance = random.Random(5)
    names = [v.name for v, _ in vectors if v.format == "bf16" and len(v.ops) < 40]
    every = {i: [n for n in names if n.startswith(i)] for i in sorted({n.split("-")[0] for n in names})}
    tally = [0] * 4
    for _ in range(COUNT):
        name = chance.choice(every[chance.choice(sorted(every))])
        for suffix in ("json", "safetensors"):
            shutil.copy(path / f"{name}.{suffix}", tmp_path / f"v.{suffix}")
        file = tmp_path / f"v.{kind}"
        data = altered(chance, file.read_bytes(), kind, [b"[1]", b'{"op": "reset", "slot": 1}'])
        file.write_bytes(data)
        status, said = run(sanitized, tmp_path / "v.json", tmp_path / "out.safetensors")
        tally[status] += 1
        if kind == "json" and refused_by_python(data):
            assert status == NO_VECTOR, (name, said, data[:2000])
    assert tally[NO_VECTOR] > COUNT / 3, tally
    assert tally[DONE] > 0, tally


MALFORMED = {
    "nothing": "",
    "no object": "[]",
    "two values": "{} {}",
    "words in one": '{"name": truefalse}',
    "a comma too many": '{"name": "a",}',
    "a comma too few": '{"name": "a" "b": 1}',
    "open": '{"name": "a"',
    "open string": '{"name": "a',
    "a bare escape": '{"name": "\\x"}',
    "half a character": '{"name": "\\ud800"}',
    "a line break in a string": '{"name": "a\nb"}',
    "a number of another notation": '{"seed": 0x7}',
    "a leading zero": '{"seed": 07}',
    "no number": '{"scale": NaN}',
    "no fraction": '{"scale": 1.}',
    "deep": '{"ops": ' + "[" * 100_000,
    "a byte 0": '{"name": "a\0"}',
}


@pytest.mark.parametrize("what", MALFORMED)
def test_what_is_no_json_is_refused(what, program, tmp_path):
    (tmp_path / "v.json").write_text(MALFORMED[what])
    status, said = run(program, tmp_path / "v.json", tmp_path / "out.safetensors")
    assert status == NO_VECTOR
    assert "expected JSON (see byte" in said or what == "no object"


ENTRIES = {
    "an entry more": lambda v: v.update(extra=1),
    "an entry less": lambda v: v.pop("seed"),
    "another schema": lambda v: v.update(schema=schema.SCHEMA + 1),
    "a kind that is none": lambda v: v["ops"][0].update(op="stop"),
    "an entry of another op": lambda v: v["ops"][0].update(to=1),
    "a real number for an integer": lambda v: v.update(seed=7.0),
    "a list of words": lambda v: v.update(read=["1"]),
    "a piece of three": lambda v: v["ops"][0]["pieces"][0].pop(),
    "a row beyond the cache": lambda v: v["read"].append(v["num_pages"] * v["page_rows"]),
    "requests of different lengths": lambda v: v["ops"][0]["state_slots"].append(0),
    "too many tokens": lambda v: v["ops"][0]["pieces"].append([2, 0, 1 << 40, 0]),
    "state without end": lambda v: v.update(num_slots=1 << 19, max_draft=1 << 15),
    "a cache without end": lambda v: v.update(num_pages=1 << 30),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_what_is_no_vector_is_refused(what, program, tmp_path):
    vector, expected = next(iter(made.vectors()))
    schema.write(tmp_path, [(vector, expected)], "a test")
    data = json.loads(vector.to_json())
    path = tmp_path / f"{vector.name}.json"
    assert run(program, path, tmp_path / "out.safetensors")[0] == DONE
    ENTRIES[what](data)
    path.write_text(json.dumps(data))
    assert run(program, path, tmp_path / "out.safetensors")[0] == NO_VECTOR
