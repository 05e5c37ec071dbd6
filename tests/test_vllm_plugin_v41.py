"""The vLLM plugin's V4.1: latents and rings beside a plain loop, and steps and modules that stay vLLM's."""

import functools
import random
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vllm_stand_ins as stand_ins
from kvcondense import Plan, planning
from kvcondense.bound import bind
from kvcondense.integrations.vllm_plugin import install, latents, layers, steps

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed: make vllm")
BLOCKS, GAP = 7, 48
"""Rings of a memory; floats between two of them."""


@pytest.fixture
def vllm(monkeypatch):
    made = stand_ins.install(monkeypatch)
    assert install().why == ""
    return made


@pytest.fixture(params=["host", "static", "triton"])
def mode(request, monkeypatch):
    """How steps are planned and run: with values, as on a GPU, and so by Triton's planner and kernels, interpreted."""
    monkeypatch.setattr(steps, "_statics", type(steps._statics)())
    if request.param != "host":
        stand_ins.as_on_a_gpu(monkeypatch)
    if request.param == "triton":
        monkeypatch.setattr(latents, "bind", functools.partial(bind, impl="triton"))
        monkeypatch.setattr(planning, "_launches", lambda _: True)
        for name in ("build", "build_static", "facts"):  # those ask for values
            monkeypatch.setattr(Plan, name, None)
    return request.param


def rings(capacity, seed=0):
    """Rings of a memory with gaps, and the memory: any bytes at first."""
    memory = torch.randn(BLOCKS, capacity * 1024 + GAP, generator=torch.Generator().manual_seed(seed))
    return memory.as_strided((BLOCKS, capacity, 1024), (memory.stride(0), 1024, 1)), memory


def plain(module, rows):
    """The latent of a window's rows [r, 512 or 1024], in fp64 up to its one rounding."""
    kv = pooled = rows.double()
    if module.compress_ratio > 1:
        kv, score = rows.double().chunk(2, 1)
        pooled = kv * score.softmax(0)
    pooled = pooled.sum(0)
    return (pooled * (pooled.square().mean() + module.rms_norm_eps).rsqrt() * module.norm.weight.double()).bfloat16()


class Requests:
    """Who has which ring and which tokens so far: steps at random, as a scheduler makes them."""

    def __init__(self, module, capacity, seed):
        self.module, self.capacity, self.rng = module, capacity, random.Random(seed)
        self.gen = torch.Generator().manual_seed(seed)
        self.free, self.live = list(range(1, BLOCKS)), []

    def step(self):
        """Turns and kv_score of a step, and the latents of tokens that end windows; some requests have no ring."""
        rng, module = self.rng, self.module
        while self.free and rng.random() < 0.4:
            self.live.append(SimpleNamespace(block=self.free.pop(), rows=torch.zeros(0, 512 * module.compress_ratio)))
        rng.shuffle(self.live)
        turns, x, wanted = [], [], {}
        for one in self.live:
            start, count = len(one.rows), rng.choice([0, 1, 1, 2, self.capacity - 1, self.capacity, 21])
            rows = torch.randn(count, one.rows.shape[1], generator=self.gen)
            whole = torch.cat([one.rows, rows])
            for p in range(start, start + count):
                if (p + 1) % module.compress_ratio == 0:
                    token = sum(n for _, _, n in turns) + p - start
                    wanted[token] = plain(module, whole[p + 1 - module.compress_ratio : p + 1])
            turns.append((one.block, start, count))
            x.append(rows)
            # What a step of drafts may lose is all of it, if it and the row before fit in the ring.
            one.rows = whole[: start + count - (rng.randint(0, count) if count < self.capacity else 0)]
            if rng.random() < 0.3:
                turns.append((0, 5, 3))
                x.append(torch.randn(3, rows.shape[1], generator=self.gen))
        for one in [one for one in self.live if rng.random() < 0.1]:
            self.live.remove(one)
            self.free.append(one.block)
        return turns, torch.cat(x) if x else torch.zeros(0, 512 * module.compress_ratio), wanted


def as_vllm_keeps(memory, turns, x):
    """What vLLM's kernel writes to the rings: the last rows of each request, as many as a ring has."""
    capacity, at = memory.shape[1], 0
    for block, start, count in turns:
        for i in range(max(0, count - capacity), count) if block else ():
            memory[block, (start + i) % capacity] = x[at + i]
        at += count


@pytest.mark.parametrize("capacity", [8, 16])
@pytest.mark.parametrize("ratio", [1, 2])
def test_latents_and_rings_of_histories(vllm, mode, ratio, capacity):
    """Prefill, chunks, decode, drafts, rings of others before; requests without tokens or without rings; padding."""
    memory, storage = rings(capacity)
    module = stand_ins.latent_layer(vllm, ratio, memory if ratio == 2 else None)
    theirs, all_of_theirs = rings(capacity)
    world, written, apart, odd_starts = Requests(module, capacity, capacity + ratio), 0, 0, 0
    for i in range(20 if mode == "triton" else 200):
        turns, x, wanted = world.step()
        pad = world.rng.choice([0, 0, 3])
        metadata, positions = stand_ins.ring_metadata(turns, capacity, pad, named=bool(turns) and i % 2 == 0)
        if not positions.shape[0]:
            continue
        x = torch.cat([x, torch.full((pad, x.shape[1]), float("nan"))])
        (latent,) = stand_ins.latents(vllm, [module], [x], metadata, positions)
        assert (latent.shape, latent.dtype, latent.is_contiguous()) == ((len(x), 512), torch.bfloat16, True)
        if wanted:
            mine, exact = latent[list(wanted)].float(), torch.stack(list(wanted.values())).float()
            assert torch.allclose(mine, exact, rtol=2**-7, atol=2**-20), i
            written, apart = written + exact.numel(), apart + int((mine != exact).sum())
        odd_starts += sum(start % 2 for block, start, count in turns if block and count)
        if ratio == 2:
            as_vllm_keeps(theirs, turns, x)
            for block, start, count in turns:
                end = start + count
                if block and count >= capacity and end % 2:  # the oldest row, which ends a window, is not kept here
                    memory[block, (end - capacity) % capacity] = theirs[block, (end - capacity) % capacity]
            assert torch.equal(storage, all_of_theirs), i
            memory[:, 1::2] = theirs[:, 1::2] = 1e30  # nobody reads them again
    assert vllm.asked == []
    assert apart <= written // 4096, "few values lie beside a tie of bf16"
    assert odd_starts > 5
    assert written > 512 * 100


@pytest.mark.usefixtures("mode")
def test_one_plan_for_all_layers_of_a_ratio_and_a_group_of_rings(vllm, monkeypatch):
    made, whole = [], latents._plan
    monkeypatch.setattr(latents, "_plan", lambda *given: made.append(given) or whole(*given))
    memories = [rings(8, i)[0] for i in range(4)]
    modules = [stand_ins.latent_layer(vllm, 2, memory, f"layers.{i}") for i, memory in enumerate(memories)]
    modules += [stand_ins.latent_layer(vllm, 1, prefix=f"layers.{i}") for i in (4, 5)]
    found = stand_ins.ring_metadata([(3, 0, 5), (2, 0, 5)], 8)[0]
    caches = SimpleNamespace(slot_mapping=torch.arange(10))
    other = stand_ins.ring_metadata([(1, 0, 5), (5, 0, 5)], 8)[0]  # another group's rings: blocks of its own
    x = torch.randn(10, 1024)
    for start in (0, 5):  # vLLM may fill the same tensors anew between two passes
        made.clear()
        for one, turns in ((found, [(3, start, 5), (2, start, 5)]), (other, [(1, start, 5), (5, start, 5)])):
            fresh, positions = stand_ins.ring_metadata(turns, 8)
            one.slot_mapping.copy_(fresh.slot_mapping)
        told = {m.state_cache.prefix: other if m is modules[1] else found for m in modules[:4]}
        vllm.context = stand_ins.Context(told | {m.k_cache_prefix: caches for m in modules[4:]})
        given = [m.forward(x if m.state_cache else x[:, :512], positions) for m in modules]
        assert len(made) == 3
        ends = torch.nonzero(positions % 2)[:, 0]
        assert all(torch.equal(one[ends], given[0][ends]) for one in given[:4])
        assert not torch.equal(given[4][ends], given[0][ends])
    assert torch.equal(memories[1][[1, 5]], memories[0][[3, 2]])
    assert torch.equal(memories[2][[3, 2]], memories[0][[3, 2]]), "the plan of another group's rings is another one"
    assert vllm.asked == []


class NoValues(TorchDispatchMode):
    """Within, operators that wait for a value on the host fail, as while a graph is captured; copies are counted."""

    def __init__(self):
        super().__init__()
        self.copied = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        if func is torch.ops.aten.copy_.default:
            self.copied.append((args[0].data_ptr(), args[1].data_ptr()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["triton"], indirect=True)
@pytest.mark.parametrize("ratio", [1, 2])
def test_a_step_on_a_gpu_asks_for_no_value_and_widens_the_norm_again(vllm, mode, ratio):
    module = stand_ins.latent_layer(vllm, ratio, rings(8)[0] if ratio == 2 else None)
    assert mode == "triton"
    for start in (0, 3):
        told = stand_ins.ring_metadata([(1, start, 3), (2, start, 3)], 8, pad=2)
        with NoValues() as seen:
            stand_ins.latents(vllm, [module], [torch.randn(8, 512 * ratio)], *told)
        ours = layers._layers[module].bound.weights.norm
        assert (ours.data_ptr(), module.norm.weight.data_ptr()) in seen.copied
    assert vllm.asked == []


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("ratio", [1, 2])
def test_a_pass_without_metadata_or_without_tokens(vllm, ratio):
    memory, storage = rings(8)
    module, before = stand_ins.latent_layer(vllm, ratio, memory if ratio == 2 else None), storage.clone()
    for nothing in (None, []):
        vllm.context = stand_ins.Context(nothing)
        assert module.forward(torch.zeros(4, 512 * ratio), torch.arange(4)) is None
    assert vllm.asked == []
    stand_ins.latents(vllm, [module], [torch.zeros(0, 512 * ratio)], *stand_ins.ring_metadata([], 8))
    assert len(vllm.asked) == 1
    assert torch.equal(storage, before)


def _changed(how, vllm, monkeypatch):
    """A module that a step of ours does not do the same as, and why."""
    if how == "subclass":
        return {"kind": type("Rocm", (vllm.v41.DeepseekCompressor,), {})}, {}, "Rocm may write"
    if how == "decode ranks":
        group = SimpleNamespace(world_size=2)
        monkeypatch.setattr(sys.modules["vllm.distributed"], "get_dcp_group", lambda: group)
        return {}, {}, "over 2 ranks (decode"
    if how == "ROCm":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    changes = {
        "prefill ranks": ({"pcp_size": 4}, "over 4 ranks (prefill"), "ROCm": ({}, "not tried on ROCm"),
        "ratio": ({"compress_ratio": 4}, "compress_ratio: expected 1 or 2, got 4"),
        "size": ({"head_dim": 256}, "weights.norm: expected shape [256]"),
    }[how]  # fmt: skip
    return {}, *changes


@pytest.mark.parametrize("how", ["subclass", "decode ranks", "prefill ranks", "ROCm", "ratio", "size"])
def test_modules_that_are_none_of_ours_are_vllms(vllm, monkeypatch, caplog, how):
    options, attributes, why = _changed(how, vllm, monkeypatch)
    memory, storage = rings(8)
    module, before = stand_ins.latent_layer(vllm, 2, memory, **options), storage.clone()
    for name, value in attributes.items():
        setattr(module, name, value)
    for start in (0, 4):
        stand_ins.latents(vllm, [module], [torch.zeros(4, 1024)], *stand_ins.ring_metadata([(1, start, 4)], 8))
    assert len(vllm.asked) == 2
    assert [why in record.getMessage() for record in caplog.records].count(True) == 1
    assert torch.equal(storage, before)


def test_prefill_on_one_rank_is_ours(vllm):
    module = stand_ins.latent_layer(vllm, 1)
    module.pcp_size = 1
    stand_ins.latents(vllm, [module], [torch.zeros(4, 512)], *stand_ins.ring_metadata([(1, 0, 4)], 8))
    assert vllm.asked == []


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("ratio", [1, 2])
def test_rings_that_move_and_norms_that_are_loaded_anew(vllm, ratio):
    """The first pass is in inference mode, the later ones are not."""
    (first, _), (second, untouched) = rings(8, 0), rings(8, 1)
    module, x = stand_ins.latent_layer(vllm, ratio, first if ratio == 2 else None), torch.randn(6, 512 * ratio)
    told = stand_ins.ring_metadata([(2, 0, 6)], 8)
    with torch.inference_mode():
        (once,) = stand_ins.latents(vllm, [module], [x], *told)
    bound = layers._layers[module].bound
    module.norm.weight.data.mul_(2)
    (twice,) = stand_ins.latents(vllm, [module], [x], *told)
    assert torch.equal(twice[1::2], 2 * once[1::2])
    assert layers._layers[module].bound is bound, "captured graphs read its copy of the norm"
    if ratio == 2:
        before = untouched.clone()
        module.state_cache.kv_cache = second
        stand_ins.latents(vllm, [module], [x], *told)
        assert torch.equal(second[2, :6], x)
        assert not torch.equal(untouched, before)
    assert vllm.asked == []
