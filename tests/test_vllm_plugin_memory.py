"""What the vLLM plugin is bound to: memory, weights and angles that vLLM moves, loads anew or changes in place."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_stand_ins as stand_ins
from engine_tensors import CSA, ROPE, tokens, weights
from kvcondense import RopeTable
from kvcondense.bound import bind
from kvcondense.errors import KvCondenseError, ShapeError
from kvcondense.integrations import vllm as engine
from kvcondense.integrations.vllm_plugin import install, layers, steps
from vllm_stand_ins import BLOCKS, step

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed: make vllm")


@pytest.fixture
def vllm(monkeypatch):
    made = stand_ins.install(monkeypatch)
    assert install().why == ""
    return made


def test_memory_that_moves_and_weights_that_are_loaded_anew(vllm):
    first, second = (torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8) for _ in range(2))
    module, rope = stand_ins.layer(vllm, CSA, first)
    moved, _ = stand_ins.layer(vllm, CSA, second)
    tables = stand_ins.Engine.of(CSA, 1, 64, BLOCKS)
    step(vllm, module, rope, tables, tokens(CSA, 8), [0], [8])
    module.state_cache, module._static_forward_context = moved.state_cache, moved._static_forward_context
    with torch.no_grad():
        module.norm.weight.mul_(2)
    step(vllm, module, rope, tables, tokens(CSA, 8), [0], [8])
    block = tables.cache_table[0, 0]
    rows = [engine.cache(m.as_strided((BLOCKS, 64, 584), (stand_ins.PAGE, 584, 1))) for m in (first, second)]
    once, twice = (r.decode_rows(torch.arange(2) + 64 * block) for r in rows)
    assert torch.allclose(twice, 2 * once, rtol=2**-6)
    assert float(once.abs().max()) > 0.1


class Copied(TorchDispatchMode):
    """Addresses of what is copied within, (to, from): operators that a capture would put into its graph."""

    def __init__(self):
        super().__init__()
        self.said = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.said.append((args[0].data_ptr(), args[1].data_ptr()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("narrow", ["norm", "ape"])
def test_a_captured_step_widens_weights_from_where_vllm_has_them(vllm, monkeypatch, narrow):
    """A replay runs none of this code: what it reads is what the graph itself has copied from vLLM's own memory."""
    monkeypatch.setattr(steps, "captured", lambda device: True)
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    module, rope = stand_ins.layer(vllm, CSA, memory)
    if narrow == "ape":
        module.ape.data = module.ape.data.bfloat16()
    tables = stand_ins.Engine.of(CSA, 1, 64, BLOCKS)
    step(vllm, module, rope, tables, tokens(CSA, 8), [0], [8])  # what a capture comes after
    with Copied() as copied:
        step(vllm, module, rope, tables, tokens(CSA, 8), [0], [8])
    ours = layers._layers[module].bound.weights
    mine, theirs = (ours.norm, module.norm.weight) if narrow == "norm" else (ours.ape, module.ape)
    assert mine.data_ptr() != theirs.data_ptr()
    assert (mine.data_ptr(), theirs.data_ptr()) in copied.said


@pytest.mark.parametrize("how", ["in place", "another", "another where the first one was"])
def test_a_table_of_angles_that_vllm_changes(vllm, how):
    memory, plain = (torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8) for _ in range(2))
    module, rope = stand_ins.layer(vllm, CSA, memory)
    fresh, _ = stand_ins.layer(vllm, CSA, plain)
    tables = stand_ins.Engine.of(CSA, 1, 64, BLOCKS)
    step(vllm, module, rope, tables, tokens(CSA, 8), [0], [8])
    before, table = memory.clone(), layers._layers[module].bound.rope
    angles = rope.cos_sin_cache.flip(0)
    if how == "another":
        rope.cos_sin_cache = angles
    elif how == "in place":
        rope.cos_sin_cache.copy_(angles)
    else:
        rope.cos_sin_cache.data.copy_(angles)
        rope.cos_sin_cache = rope.cos_sin_cache.data
    step(vllm, module, rope, tables, tokens(CSA, 8), [0], [8])
    step(vllm, fresh, SimpleNamespace(cos_sin_cache=angles), tables, tokens(CSA, 8), [0], [8])
    assert torch.equal(memory, plain)
    assert not torch.equal(memory, before)
    if how == "in place":
        assert layers._layers[module].bound.rope is table, "which captured graphs read"


def test_layers_share_one_table_of_angles(vllm):

    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    modules = [stand_ins.layer(vllm, CSA, memory.clone(), f"layers.{i}")[0] for i in range(2)]
    rope = SimpleNamespace(cos_sin_cache=torch.cat([ROPE.cos, ROPE.sin], 1))
    tables = stand_ins.Engine.of(CSA, 1, 64, BLOCKS)
    for module in modules:
        step(vllm, module, rope, tables, tokens(CSA, 4), [0], [4])
    one, other = (layers._layers[m].bound for m in modules)
    assert one.rope is other.rope


def test_blocks_of_one_memory_have_one_stride():
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    state = engine.state(
        memory.view(torch.float32).as_strided((BLOCKS, 4, CSA.state_dim), (stand_ins.PAGE // 4, CSA.state_dim, 1))
    )
    w = weights(CSA)
    cache = engine.cache(memory.as_strided((BLOCKS, 64, 584), (stand_ins.PAGE, 584, 1)))
    with pytest.raises(KvCondenseError, match="memory of state"):
        bind(CSA, w, ROPE, state=state, cache=cache)
    assert bind(CSA, w, ROPE, state=state, cache=cache, shared_blocks=True).cache is cache
    other = engine.cache(memory.as_strided((BLOCKS // 2, 64, 584), (2 * stand_ins.PAGE, 584, 1)))
    with pytest.raises(ShapeError, match=f"{stand_ins.PAGE} bytes apart"):
        bind(CSA, w, ROPE, state=state, cache=other, shared_blocks=True)
    late = memory.view(torch.float32).as_strided(
        (BLOCKS - 1, 4, 2048), (stand_ins.PAGE // 4, 2048, 1), stand_ins.PAGE // 8
    )
    with pytest.raises(ShapeError, match="bytes of the memory's first"):
        bind(CSA, w, ROPE, state=engine.state(late), cache=cache, shared_blocks=True)
    angles = memory.view(torch.float32).flatten()[: ROPE.cos.numel()].view(ROPE.cos.shape)
    with pytest.raises(KvCondenseError, match="no step writes"):
        bind(CSA, w, RopeTable(angles, ROPE.sin), state=state, cache=cache, shared_blocks=True)
