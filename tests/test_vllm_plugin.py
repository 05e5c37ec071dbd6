"""The vLLM plugin beside stand-ins of vLLM's classes: what it replaces and what not, and every byte that a step leaves.

``make vllm`` runs it in vLLM itself.
"""

import functools
import json
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import kvcondense_vllm
import vllm_stand_ins as stand_ins
from engine_tensors import CSA, HCA, ROPE, UNROTATED, tokens, weights
from kvcondense import CompressorWeights, PagedCache, RaggedBatch, StatePool, condense
from kvcondense.cli import app
from kvcondense.integrations.vllm_plugin import install, steps, support
from vllm_stand_ins import BLOCKS, step

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed: make vllm")
SPECS = pytest.mark.parametrize("spec", [CSA, HCA, UNROTATED], ids=["csa", "hca", "indexer"])
# (starts, lengths, padding) of two requests: prefill, chunk, decode over a boundary, drafts, three of five rejected.
HISTORY = (
    ([0, 0], [131, 9], 0), ([131, 9], [1, 6], 3), ([132, 15], [1, 1], 0), ([133, 16], [5, 5], 6),
    ([135, 21], [121, 1], 0), ([256, 22], [0, 110], 2),
)  # fmt: skip


@pytest.fixture
def vllm(monkeypatch):
    made = stand_ins.install(monkeypatch)
    assert install().why == ""
    return made


def by_hand(spec, tables, history, inputs):
    """The memory that the same steps leave by ``condense`` of the reference on states and caches of their own."""
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    rows, many = 4 if spec.overlap else 8, 256 // spec.ratio
    w = weights(spec)
    w = CompressorWeights(norm=w.norm.bfloat16(), ape=w.ape)
    state = StatePool.wrap(torch.zeros(BLOCKS, rows, spec.state_dim), paged=True, keep_all=True)
    name = "fp8_indexer_pow2" if spec.head_dim == 128 else "fp8_model1"
    cache = PagedCache.allocate(spec.head_dim, BLOCKS, many, format=name)
    for (starts, lengths, pad), x in zip(history, inputs, strict=True):
        metadata, slots, _ = tables.metadata(starts, lengths, pad)
        batch = RaggedBatch.build(
            torch.tensor([0, *lengths]).cumsum(0), start_positions=starts, slot_mapping=slots,
            state_block_table=metadata.block_table,
        )  # fmt: skip
        condense(spec, x, w, ROPE, batch, state=state, cache=cache, impl="reference")
    for block in tables.state_table.flatten().tolist():
        raw = state.data[block].flatten().view(torch.uint8)
        memory[block, : raw.numel()] = raw
    for block in tables.cache_table.flatten().tolist():
        raw = cache.data[block].flatten()
        memory[block, : raw.numel()] = raw
    return memory


@SPECS
@pytest.mark.parametrize("static", [False, True], ids=["host", "static"])
def test_every_byte_of_the_shared_blocks(vllm, monkeypatch, spec, static):
    if static:
        stand_ins.as_on_a_gpu(monkeypatch)
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    module, rope = stand_ins.layer(vllm, spec, memory)
    tables = stand_ins.Engine.of(spec, 2, 264, BLOCKS)
    inputs = [tokens(spec, sum(lengths) + pad, i) for i, (_, lengths, pad) in enumerate(HISTORY)]
    for (starts, lengths, pad), x in zip(HISTORY, inputs, strict=True):
        step(vllm, module, rope, tables, x, starts, lengths, pad)
    assert vllm.asked == [], "vLLM's own forward was not needed"
    wanted = by_hand(spec, tables, HISTORY, inputs)
    assert int((wanted != 0).sum()) > 10_000
    rows = torch.zeros(BLOCKS, dtype=torch.bool)
    rows[tables.cache_table.flatten()] = True
    assert torch.equal(memory[~rows], wanted[~rows]), "states, and blocks of nobody"
    # Another order of sums: a code in 8192 may be a step away.
    assert int((memory[rows] != wanted[rows]).sum()) <= max(1, int((wanted[rows] != 0).sum()) // 8192)


def test_one_plan_for_all_layers_of_a_kind_and_a_new_one_each_time(vllm, monkeypatch):
    made = []
    whole = steps._plan
    monkeypatch.setattr(steps, "_plan", lambda *given: made.append(given) or whole(*given))
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    layers = [stand_ins.layer(vllm, CSA, memory.clone(), f"model.layers.{i}.attn.compressor") for i in range(3)]
    tables = stand_ins.Engine.of(CSA, 1, 64, BLOCKS)
    metadata, slots, positions = tables.metadata([0], [8])
    caches = SimpleNamespace(slot_mapping=slots)
    for _ in range(2):  # vLLM may fill the same tensors anew between two passes
        told = {m.state_cache.prefix: metadata for m, _ in layers} | {m.k_cache_prefix: caches for m, _ in layers}
        vllm.context = stand_ins.Context(told)
        for module, rope in layers:
            module.forward(tokens(CSA, 8), positions, rope)
        positions += 8
        fresh, new_slots, _ = tables.metadata([8], [8])
        metadata.slot_mapping.copy_(fresh.slot_mapping)
        slots.copy_(new_slots)
    assert len(made) == 2
    assert vllm.asked == []
    state = layers[0][0].state_cache.kv_cache
    used = tables.state_table[0, :4].tolist()
    assert all(bool(state[block].any()) for block in used), "the second pass wrote its own positions"


def test_a_profile_run_writes_nothing_and_asks_nobody(vllm):
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    module, rope = stand_ins.layer(vllm, CSA, memory)
    for nothing in (None, []):
        vllm.context = stand_ins.Context(nothing)
        assert module.forward(tokens(CSA, 4), torch.arange(4), rope) is None
    assert not memory.any()
    assert vllm.asked == []


@pytest.mark.parametrize("longer", ["states", "caches", "tokens"])
def test_padding_of_some_and_not_of_others(vllm, longer):
    """vLLM's second runner pads slots of states for its graphs, and not what says whose a token is."""
    memory, plain = (torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8) for _ in range(2))
    tables, x = stand_ins.Engine.of(CSA, 2, 64, BLOCKS), tokens(CSA, 16)
    for where, padded in ((memory, True), (plain, False)):
        module, rope = stand_ins.layer(vllm, CSA, where)
        metadata, slots, positions = tables.metadata([0, 0], [8, 8])
        pad = torch.full((7,), -1)
        if padded and longer == "states":
            metadata.slot_mapping = torch.cat([metadata.slot_mapping, pad])
        elif padded and longer == "caches":
            slots = torch.cat([slots, pad])
        elif padded:
            positions = torch.cat([positions, torch.zeros(7, dtype=torch.int64)])
        told = {module.state_cache.prefix: metadata, module.k_cache_prefix: SimpleNamespace(slot_mapping=slots)}
        vllm.context = stand_ins.Context(told)
        module.forward(x, positions, rope)
    assert vllm.asked == []
    assert torch.equal(memory, plain)
    assert bool(memory.any())


def test_a_first_pass_in_inference_mode_and_a_later_one_without(vllm):
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    module, rope = stand_ins.layer(vllm, CSA, memory)
    tables = stand_ins.Engine.of(CSA, 1, 64, BLOCKS)
    with torch.inference_mode():
        step(vllm, module, rope, tables, tokens(CSA, 8), [0], [8])
    step(vllm, module, rope, tables, tokens(CSA, 8), [8], [8])
    assert vllm.asked == []


def test_a_forward_that_vllm_wraps_itself_is_replaced(monkeypatch):
    made = stand_ins.install(monkeypatch)
    own = made.compressor.DeepseekCompressor.forward
    wrapped = functools.wraps(own)(lambda self, *given: own(self, *given))
    made.compressor.DeepseekCompressor.forward = wrapped
    assert install().why == ""
    assert made.compressor.DeepseekCompressor.forward is not wrapped


@pytest.mark.parametrize("what", ["a token without a slot amid others", "positions with a gap", "no token"])
def test_steps_that_are_none_of_ours_are_vllms(vllm, what):
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    module, rope = stand_ins.layer(vllm, CSA, memory)
    metadata, slots, positions = stand_ins.Engine.of(CSA, 2, 64, BLOCKS).metadata([0, 0], [8, 8])
    if what == "no token":
        metadata.slot_mapping, slots, positions = metadata.slot_mapping[:0], slots[:0], positions[:0]
    elif "slot" in what:
        metadata.slot_mapping[3] = -1
    else:
        positions[3:8] += 1
    told = {module.state_cache.prefix: metadata, module.k_cache_prefix: SimpleNamespace(slot_mapping=slots)}
    vllm.context = stand_ins.Context(told)
    x = tokens(CSA, positions.shape[0])
    module.forward(x, positions, rope)
    ((self, given, at, angles),) = vllm.asked
    assert self is module
    assert given is x
    assert at is positions
    assert angles is rope
    assert not memory.any()


class _Changed:
    """Modules that a step of ours does not do the same as."""

    @staticmethod
    def subclass(vllm, monkeypatch):  # noqa: ARG004
        class Rocm(vllm.compressor.DeepseekCompressor):
            pass

        return {"kind": Rocm}, "cache of its own"

    @staticmethod
    def ranks(vllm, monkeypatch):  # noqa: ARG004
        group = SimpleNamespace(world_size=2)
        monkeypatch.setattr(sys.modules["vllm.distributed"], "get_dcp_group", lambda: group)
        return {}, "2 ranks"


@pytest.mark.parametrize("how", ["subclass", "ranks"])
def test_modules_that_are_none_of_ours_are_vllms(vllm, monkeypatch, caplog, how):
    options, why = getattr(_Changed, how)(vllm, monkeypatch)
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    module, rope = stand_ins.layer(vllm, CSA, memory, **options)
    tables = stand_ins.Engine.of(CSA, 1, 64, BLOCKS)
    for start in (0, 4):
        step(vllm, module, rope, tables, tokens(CSA, 4), [start], [4])
    assert len(vllm.asked) == 2
    assert [r.getMessage() for r in caplog.records if why in r.getMessage()] == [caplog.records[-1].getMessage()]
    assert not memory.any()


@pytest.mark.parametrize("device", ["xpu", "cpu"])
def test_a_cache_or_a_device_that_is_not_known(monkeypatch, caplog, device):
    made = stand_ins.install(monkeypatch, device=device)
    install()
    memory = torch.zeros(BLOCKS, stand_ins.PAGE, dtype=torch.uint8)
    module, rope = stand_ins.layer(made, CSA, memory)
    if device == "cpu":
        cache = module._static_forward_context[module.k_cache_prefix]
        cache.kv_cache = cache.kv_cache[..., :100]
    step(made, module, rope, stand_ins.Engine.of(CSA, 1, 64, BLOCKS), tokens(CSA, 4), [0], [4])
    assert len(made.asked) == 1
    assert ("rows of" if device == "cpu" else "not tried on xpu") in caplog.text


@pytest.mark.parametrize("scales", [None, True, False])
def test_the_indexers_scales_are_those_that_vllms_kernel_writes(vllm, scales):
    from kvcondense.integrations.vllm_plugin.compressor import cache_of

    if scales is not None:
        vllm.kernels.mqa_logits_use_mx_scales = lambda: scales
    pages = SimpleNamespace(kv_cache=torch.zeros(2, 64, 132, dtype=torch.uint8))
    assert cache_of(pages).format.name == ("fp8_indexer_ue8m0" if scales else "fp8_indexer_pow2")


@pytest.mark.usefixtures("vllm")
def test_it_installs_once_and_keeps_vllms_own():
    classes = install().replaced
    before = [vars(c)["forward"] for c in classes]
    found = install().as_dict()
    assert found.pop("replaced") == [
        "vllm.models.deepseek_v4.compressor.DeepseekCompressor",
        "vllm.models.deepseek_v4.cpu.cpu_compressor.DeepseekV4CPUCompressor",
        "vllm.models.deepseek_v41.compressor.DeepseekCompressor",
    ]
    assert found == {"version": "0.32.0", "device": "cpu", "left": [], "why": ""}
    assert before == [vars(c)["forward"] for c in classes]
    assert not any(hasattr(one.__wrapped__, "kvcondense") for one in before)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0rc1", "1.0", "dev"])
def test_versions_that_nobody_read_are_left_alone(monkeypatch, caplog, version):
    made = stand_ins.install(monkeypatch, version=version)
    own = made.compressor.DeepseekCompressor.forward
    assert install().why == f"expected vLLM 0.32 or later, before 0.34, got {version}"
    assert made.compressor.DeepseekCompressor.forward is own
    assert version in caplog.text


@pytest.mark.parametrize("change", ["signature", "metadata", "class", "module"])
@pytest.mark.parametrize("family", ["V4", "V4.1", "V4 and V4.1"])
def test_classes_that_look_otherwise_are_left_alone(monkeypatch, caplog, family, change):
    """Each family by itself: what is wrong with one does not stop the other."""
    made = stand_ins.install(monkeypatch)
    modules = {"V4": made.compressor, "V4.1": made.v41}
    bases, wrong = {name: module.DeepseekCompressor for name, module in modules.items()}, family.split(" and ")
    for module in (modules[name] for name in wrong):
        if change == "signature":
            module.DeepseekCompressor.forward = lambda self, hidden_states, positions: None
        elif change == "metadata":
            module.CompressorMetadata = stand_ins.Context
        elif change == "class":
            del module.DeepseekCompressor
        else:
            monkeypatch.setitem(sys.modules, module.__name__, None)
    own = {name: base.forward for name, base in bases.items()}
    found = install()
    assert [name for name, base in bases.items() if base.forward is own[name]] == wrong
    assert list(found.classes) == [name for name in modules if name not in wrong]
    wanted = {"signature": "forward(self, kv_score", "metadata": "slot_mapping"}
    for name, text in zip(wrong, found.left, strict=True):
        assert text.startswith(f"{name}: ")
        assert wanted.get(change, f"{modules[name].__name__} cannot be imported") in text
        assert text in caplog.text
    assert found.why == ("; ".join(found.left) if len(wrong) == 2 else "")


def test_without_vllm():
    assert support().why == "vllm is not installed"


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("asked", [None, "1", "yes"])
def test_info_says_what_it_would_do(monkeypatch, tmp_path, there, asked):
    monkeypatch.delenv(kvcondense_vllm.VARIABLE, raising=False)
    if asked is not None:
        monkeypatch.setenv(kvcondense_vllm.VARIABLE, asked)
    if there:
        made = stand_ins.install(monkeypatch, version="0.33.0")
        if asked == "yes":
            del made.v41.DeepseekCompressor
    done = CliRunner().invoke(app, ["info", "--vllm", "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0
    found = json.loads((tmp_path / "found.json").read_text())["vllm"]
    assert found["on"] is (asked == "1")
    assert len(found["replaced"]) == there * (2 if asked == "yes" else 3)
    assert ("left alone     V4.1: " in done.output) is (there and asked == "yes")
    words = "0.33.0, on cpu" if there else "nothing: vllm is not installed"
    assert words in done.output
    assert ("would replace" in done.output) is (there and asked != "1")
    assert ("not '1'" in done.output) is (asked != "1")


def test_without_the_variable_nothing_is_imported():
    code = "import sys, kvcondense_vllm as k; k.register(); print('kvcondense' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
