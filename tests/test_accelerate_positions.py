"""Positions that an accelerated model is called with: each gives the right rows, transformers' own, or an error."""

import pytest
import torch

from generation import cache_of, close, generate, ids, small_model
from kvcondense.errors import KvCondenseError
from kvcondense.integrations.transformers import accelerate

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def all_rows(model, monkeypatch):
    """Indexers that pick every row: ties among scores fall as the number of rows has it."""
    for layer in model.model.layers:
        if hasattr(layer.self_attn.compressor, "indexer"):
            monkeypatch.setattr(layer.self_attn.compressor.indexer, "index_topk", 512)


def documents(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])


OTHERS = {
    "packed documents": documents(140, 131, 29)[None],
    "packed documents, ragged": torch.stack([documents(140, 160), documents(300)]),
    "documents after one of a token": documents(2, 1, 297)[None],
    "a start that is not 0": torch.arange(7, 307)[None],
    "starts by row": torch.stack([torch.arange(300), torch.arange(5, 305)]),
    "a jump": torch.cat([torch.arange(150), torch.arange(160, 310)])[None],
    "right padding": torch.cat([torch.arange(290), torch.zeros(10, dtype=torch.long)])[None],
    "right padding of ones": torch.cat([torch.arange(290), torch.ones(10, dtype=torch.long)])[None],
    "falling": torch.arange(299, -1, -1)[None],
    "standing": torch.full((1, 300), 5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_positions_give_what_transformers_gives(model, name):
    """Without a cache. Its compressors do not keep documents apart, so that a document is not what it is alone."""
    positions = OTHERS[name]
    tokens = ids(positions.shape[0])
    expected = model(tokens, position_ids=positions, use_cache=False).logits
    with accelerate(model):
        assert torch.equal(model(tokens, position_ids=positions, use_cache=False).logits, expected)


@pytest.mark.usefixtures("all_rows")
def test_packed_documents_are_not_alone_in_transformers(model):
    """If this fails, transformers has learned it: so should accelerate."""
    tokens = ids(1)
    packed = model(tokens, position_ids=OTHERS["packed documents"], use_cache=False).logits
    assert close(packed[:, :140], model(tokens[:, :140], use_cache=False).logits)
    assert not close(packed[:, 140:271], model(tokens[:, 140:271], use_cache=False).logits)


@pytest.mark.parametrize("name", [n for n in OTHERS if not n.startswith("start") and "not 0" not in n])
def test_a_cache_that_begins_with_other_positions_is_transformers(model, name):
    positions = OTHERS[name]
    tokens, more = ids(positions.shape[0]), torch.full((positions.shape[0], 1), 9)

    def run():
        cache = cache_of(model)
        first = model(tokens, None, positions, cache).logits
        return first, model(more, None, positions[:, -1:] + 1, cache).logits

    expected = run()
    with accelerate(model):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@pytest.mark.usefixtures("all_rows")
@pytest.mark.parametrize("fill", [0, 1, -3])
def test_left_padding_is_skipped_without_a_cache_too(model, fill):
    tokens = ids(2)
    positions = torch.stack([torch.arange(300), torch.arange(-37, 263)])
    mask = (positions >= 0).long()
    if fill >= 0:
        positions = positions.masked_fill(positions < 0, fill)
    with accelerate(model):
        found = model(tokens, mask, positions, use_cache=False).logits
        assert close(found[:1], model(tokens[:1], use_cache=False).logits)
        assert close(found[1:, 37:], model(tokens[1:, 37:], use_cache=False).logits)


def test_a_tensor_of_positions_may_change_between_calls(model):
    tokens, positions = ids(1), torch.arange(300)[None].clone()
    expected = model(tokens, position_ids=OTHERS["packed documents"], use_cache=False).logits
    with accelerate(model):
        plain = model(tokens, position_ids=positions, use_cache=False).logits
        positions.copy_(OTHERS["packed documents"])
        assert torch.equal(model(tokens, position_ids=positions, use_cache=False).logits, expected)
        with torch.inference_mode():
            at = torch.arange(300)[None].clone()
            assert close(model(tokens, position_ids=at, use_cache=False).logits, plain)
            at.copy_(OTHERS["packed documents"])
            assert close(model(tokens, position_ids=at, use_cache=False).logits, expected)


WRONG = {
    "a start that is not 0": (None, torch.arange(4, 12)[None], "0 where"),
    "starts by row": (None, torch.stack([torch.arange(8), torch.arange(5, 13)]), "0 where"),
    "a gap": (40, torch.arange(41, 43)[None], "go on at"),
    "a repetition": (40, torch.arange(39, 41)[None], "go on at"),
    "a new document": (40, torch.arange(3)[None], "go on at"),
    "a jump": (40, torch.tensor([[40, 42]]), "follow one another"),
    "rows that differ": (40, torch.tensor([[40, 41], [41, 42]]), "go on at"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_positions_of_a_cache_raise_before_anything_is_written(model, name):
    begun, positions, message = WRONG[name]
    rows, tokens = positions.shape[0], ids(positions.shape[0])
    with accelerate(model):
        cache = cache_of(model)
        if begun:
            model(tokens[:, :begun], None, None, cache)
        with pytest.raises(KvCondenseError, match=message):
            model(tokens[:, : positions.shape[1]], None, positions, cache)
        assert cache.get_seq_length() == (begun or 0)
        rest = model(tokens[:, begun or 0 :], None, None, cache).logits
        assert close(rest[:, -1], model(tokens, use_cache=False).logits[:, -1])
    assert rows == tokens.shape[0]


def test_a_prompt_that_is_padded_at_the_right_is_generated_from_as_by_transformers(model):
    prompt, mask = ids(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, 50:] = 0
    expected = generate(model, prompt, attention_mask=mask)
    with accelerate(model):
        assert torch.equal(generate(model, prompt, attention_mask=mask), expected)
