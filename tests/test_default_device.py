"""Another default device of torch's than the tensors': steps, planners, formats and tables do not look at it."""

import pytest
import torch

from kvcondense import ModelConfig, RaggedBatch, RopeTable, StatePool, training
from kvcondense.backends.cpu import tables
from kvcondense.formats import FORMATS, get_format
from machine import SPECS
from test_doors import Setting, by_compress, by_condense, by_prepared, by_prepared_compress


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """What the CPU backend keeps of specs and formats is made anew under the other device."""
    monkeypatch.setattr(tables, "_blocks", {})


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["ring", "paged", "online"])
@pytest.mark.parametrize("door", [by_condense, by_compress, by_prepared, by_prepared_compress])
def test_steps_are_the_same(door, kind, impl):
    spec = SPECS["r8" if kind == "online" else "csa"]
    s, other = (Setting(spec, kind, impl) for _ in range(2))
    s.made(), other.made()
    with torch.device("meta"):
        door(s)
    door(other)
    assert all(map(torch.equal, s.held(), other.held()))


def test_tags_are_the_host_s_and_tables_the_cpu_s():
    with torch.device("meta"):
        pool = StatePool.ring(SPECS["csa"], 2, 16, device="cpu")
        table = RopeTable.build(ModelConfig.FLASH, 64, device="cpu")
    assert pool.tags is not None
    assert pool.tags.device.type == "cpu"
    assert torch.equal(table.cos, RopeTable.build(ModelConfig.FLASH, 64).cos)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_give_the_same_bytes(name):
    form = get_format(name)
    rows = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    scale = torch.tensor(0.02) if form.tensor_scale else None
    with torch.device("meta"):
        found = form.encode(rows, scale)
    wanted = form.encode(rows, scale)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[field], wanted[field]) for field in wanted)


def test_training_is_the_same():
    s, batch = Setting(), RaggedBatch.build([0, 8, 16], start_positions=[0, 0])
    rows = []
    for device in ("meta", "cpu"):
        tokens = s.kv_score.clone().requires_grad_()
        with torch.device(device):
            found = training.condense(s.spec, tokens, s.weights, s.rope, batch)
        found.values.sum().backward()
        rows.append((found.values.detach(), tokens.grad))
    assert all(map(torch.equal, *rows))
