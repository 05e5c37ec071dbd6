"""Models whose weights accelerate's hooks load: offloaded to memory or disk, dispatched; hooks that come and go."""

import pytest
import torch

from generation import close, generate, ids, small_model
from kvcondense.errors import UnsupportedError
from kvcondense.integrations.transformers import accelerate

hub = pytest.importorskip("accelerate")

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def model():
    return small_model()


def in_memory(model, _, **more):
    return hub.cpu_offload(model, execution_device="cpu", **more)


def on_disk(model, folder):
    return hub.disk_offload(model, str(folder), execution_device="cpu")


def with_buffers(model, folder):
    return in_memory(model, folder, offload_buffers=True)


def dispatched(model, folder):
    """As ``device_map`` does it: some layers stay, others are on disk, and one of the parts of a layer is."""
    places = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2.mlp": "cpu", "lm_head": "cpu"}
    rest = [
        *(f"model.layers.2.{name}" for name, _ in model.model.layers[2].named_children() if name != "mlp"),
        *(f"model.{name}" for name, _ in model.model.named_children() if name != "layers"),
    ]
    places.update({name: "disk" if "self_attn" in name else "cpu" for name in rest})
    return hub.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


WAYS = [in_memory, with_buffers, on_disk, dispatched]


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_is_the_same(model, way, tmp_path):
    prompt = ids(1, 140)
    expected, logits = generate(model, prompt), model(prompt).logits
    model = way(model, tmp_path)
    compressor = model.model.layers[1].self_attn.compressor
    assert compressor.indexer.position_bias.is_meta
    assert compressor.kv_norm.weight.is_meta
    with accelerate(model):
        assert close(model(prompt).logits, logits)
        assert torch.equal(generate(model, prompt), expected)
        assert compressor.indexer.position_bias.is_meta
        assert compressor.kv_norm.weight.is_meta
        with pytest.raises(UnsupportedError, match="accelerated"):
            accelerate(model)
    assert close(model(prompt).logits, logits)
    with accelerate(model):
        assert close(model(prompt, use_cache=False).logits, logits)


def test_hooks_come_and_go_while_accelerated(model):
    prompt = ids(1, 140)
    logits = model(prompt).logits
    done = accelerate(model)
    in_memory(model, None)
    assert close(model(prompt).logits, logits)
    done.undo()
    assert close(model(prompt).logits, logits)
    done = accelerate(model)
    hub.hooks.remove_hook_from_module(model, recurse=True)
    assert close(model(prompt).logits, logits)
    done.undo()
    assert torch.equal(model(prompt).logits, logits)
    with accelerate(model):
        assert close(model(prompt).logits, logits)
    assert torch.equal(model(prompt).logits, logits)
