"""Caches that an accelerated model fills: copied, pickled, saved, and taken back by transformers' own compressors."""

import contextlib
import copy
import io
import pickle

import pytest
import torch

from generation import cache_of, close, generate, ids, small_model
from interrupting import interrupted_at
from kvcondense.errors import UnsupportedError
from kvcondense.integrations.transformers import accelerate

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    return small_model()


def pickled(cache):
    return pickle.loads(pickle.dumps(cache))


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": pickled, "torch.save": saved, "deepcopy": copy.deepcopy}
PROMPTS = [1, 3, 4, 7, 127, 128, 130, 261]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [3, 261])
def test_a_prompt_is_read_once_and_generated_from_often(model, way, count):
    """Accelerated or not, from the copy and from the cache that was copied."""
    tokens = ids(1)
    with accelerate(model):
        cache = cache_of(model)
        model(tokens[:, :count], None, None, cache)
        expected = generate(model, tokens[:, : count + 1])
        copies = [WAYS[way](cache) for _ in range(3)]
        assert torch.equal(generate(model, tokens[:, : count + 1], begun=copies[0]), expected)
        assert cache.get_seq_length() == count
        assert torch.equal(generate(model, tokens[:, : count + 1], begun=copies[1]), expected)
    assert torch.equal(generate(model, tokens[:, : count + 1]), expected)
    assert torch.equal(generate(model, tokens[:, : count + 1], begun=copies[2]), expected)
    assert torch.equal(generate(model, tokens[:, : count + 1], begun=WAYS[way](cache)), expected)


@pytest.mark.parametrize("count", PROMPTS)
def test_transformers_goes_on_with_what_kvcondense_began(model, count):
    tokens = ids(2)

    def rest(cache):
        """In steps and chunks across windows, as ties among scores fall."""
        steps = [model(tokens[:, i : i + 1], None, None, cache).logits for i in range(count, count + 6)]
        return torch.cat([*steps, model(tokens[:, count + 6 :], None, None, cache).logits], dim=1)

    theirs, ours = cache_of(model), cache_of(model)
    model(tokens[:, :count], None, None, theirs)
    with accelerate(model):
        model(tokens[:, :count], None, None, ours)
    assert close(rest(ours), rest(theirs))
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()
    with accelerate(model):  # what transformers has gone on with stays transformers'
        more = [model(tokens[:, :9], None, None, cache).logits for cache in (ours, theirs)]
        assert close(*more)


def test_sequences_of_several_lengths_are_not_taken_back(model):
    tokens, mask = ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    with accelerate(model):
        cache = generate(model, tokens, attention_mask=mask, return_dict_in_generate=True).past_key_values
    with pytest.raises(UnsupportedError, match="one length"):
        model(tokens[:, :1], None, None, cache)


def test_an_interrupt_while_sequences_change_places_is_noticed_or_harmless(model):
    """At any line: all of a layer is as before, or as after, or its next call raises."""
    with accelerate(model):
        begun = cache_of(model)
        model(ids(count=70), None, None, begun)
    ways = {
        "reorder_cache": torch.tensor([1, 0]),
        "batch_select_indices": torch.tensor([1, 0]),
        "batch_repeat_interleave": 2,
    }
    for way, argument in ways.items():
        line, noticed, seen = 0, 0, [10**9]
        while line <= seen[0]:
            line += 1
            (layer,) = [one for one in copy.deepcopy(begun).layers if len(getattr(one, "kvcondense", ())) == 2][:1]
            before = [memory.rows.clone() for memory in layer.kvcondense.values()]
            keys = layer.keys.clone()
            with contextlib.suppress(KeyboardInterrupt), interrupted_at(line) as seen:
                getattr(layer, way)(argument)
            memories = list(layer.kvcondense.values())
            if any(memory.torn for memory in memories):
                noticed += 1
                continue
            moved = [
                m.rows.shape != b.shape or not torch.equal(m.rows, b) for m, b in zip(memories, before, strict=True)
            ]
            assert set(moved) == {layer.keys.shape != keys.shape or not torch.equal(layer.keys, keys)}
        assert noticed > 5


def test_a_cache_that_is_reset_is_transformers_own(model):
    cache, tokens = cache_of(model), ids(1)
    with accelerate(model):
        model(tokens, None, None, cache)
        for layer in cache.layers:
            layer.reset()
    kinds = [type(layer) for layer in cache_of(model).layers]
    assert [type(layer) for layer in cache.layers] == kinds
    assert close(model(tokens, None, None, cache).logits, model(tokens).logits)


def test_a_prompt_in_inference_mode_is_generated_from_without_it(model):
    tokens = ids(1, 131)
    with accelerate(model):
        cache = cache_of(model)
        with torch.inference_mode():
            model(tokens[:, :130], None, None, cache)
        expected = generate(model, tokens)
        assert torch.equal(generate(model, tokens, begun=cache), expected)
