"""Exported states are laid out as kvcondense's: a pair of export and load that only understands itself is found."""

import functools
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from kvcondense.cli import app
from kvcondense.conformance.adapter import Capabilities
from kvcondense.conformance.cases import Case
from kvcondense.conformance.compressors import SMALL, compressor
from kvcondense.conformance.histories import step
from kvcondense.conformance.invariants import INVARIANTS, check, exported, whole
from kvcondense.conformance.own import KINDS, BackendAdapter
from kvcondense.conformance.play import Player
from kvcondense.files import sealed
from kvcondense.files.tensors import unpacked

BY_NAME = {i.name: i for i in INVARIANTS}


def turned(payload, turn, **header):
    """The payload with other tensors, and digests of those."""
    _, tensors = unpacked(payload, "payload", 1 << 20, "payload")
    held = sealed.unpacked(payload, "payload").header
    return sealed.pack({**held, **header}, {name: turn(t).contiguous() for name, t in tensors.items()})


class Private(BackendAdapter):
    """States leave in an order, or in units, that only this adapter's own ``load`` takes back."""

    there, back = staticmethod(lambda rows: rows.flip(0)), staticmethod(lambda rows: rows.flip(0))

    def export(self, batch):
        return turned(super().export(batch), self.there)

    def load(self, batch, payload):
        super().load(batch, turned(payload, self.back))


class Scaled(Private):
    there, back = staticmethod(lambda rows: rows * 2), staticmethod(lambda rows: rows / 2)


ORDER, UNITS = ", but of ", "channel 0 of kv and score + ape is"


@pytest.mark.parametrize(
    ("make", "told", "spec"),  # of r2 there is never more than one row
    [(Private, ORDER, spec) for spec in SMALL if spec != "r2"] + [(Scaled, UNITS, spec) for spec in SMALL],
)
def test_a_state_in_a_layout_of_its_own_is_not_portable(make, told, spec, tmp_path, monkeypatch):
    def narrow():
        return make(capabilities=Capabilities(specs=(spec,)))

    for name in ("I8 portability", "I8 fork"):
        assert check(replace(BY_NAME[name], judge=whole), narrow).passed, "its own load takes it back"
    outcome = check(BY_NAME["I8 portability"], narrow)
    assert re.match(r"exported state of request \d: row \d+ is not that of position \d+", outcome.detail), outcome
    assert told in outcome.detail
    assert sum(sum(op.counts) for op in outcome.case.ops) <= 2 * compressor(spec).spec.window, "it is shrunk"
    (tmp_path / "case.json").write_text(outcome.case.to_json())
    monkeypatch.setattr("kvcondense.cli.work.adapters.load_factory", lambda _: narrow)
    text = CliRunner().invoke(app, ["conformance", "--replay", str(tmp_path / "case.json")]).output
    assert "FAIL  exported state         exported state of request" in text
    assert text.count("FAIL") == 1


def test_running_values_of_something_else_are_not_portable():
    class Swapped(Private):
        there, back = staticmethod(lambda acc: acc[[1, 0, 2]]), staticmethod(lambda acc: acc[[1, 0, 2]])

    outcome = check(
        BY_NAME["I8 portability"],
        lambda: Swapped(kind="online", capabilities=Capabilities(specs=("hca",))),
    )
    assert "running values (m, l, o) of other tokens than those from position" in outcome.detail


class Halved(BackendAdapter):
    """A state of bf16 rows is as good a layout."""

    def export(self, batch):
        return turned(super().export(batch), torch.Tensor.bfloat16, dtype="bfloat16")


@pytest.mark.parametrize("make", [Halved, *(functools.partial(BackendAdapter, "reference", kind) for kind in KINDS)])
def test_states_that_others_can_go_on_with_are_portable(make):
    for spec in make().capabilities.specs:
        player = Player(Case(spec, 2, (step(37, 300), step(3, 1, drafts=2, junk="nan", accepted=1)), first=256), make)
        player.run()
        assert exported(player) is None
