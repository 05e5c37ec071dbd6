"""transformers' DeepSeek-V4 with its compressors replaced: same logits and tokens, padded batches, caches, undo."""

import pytest
import torch

from generation import cache_of, close, generate, ids, small_model
from kvcondense.errors import KvCondenseError, UnsupportedError
from kvcondense.integrations.transformers import accelerate


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(autouse=True)
def undone(model):
    with torch.no_grad():
        yield
    assert not any("forward" in vars(m) for m in model.modules())


def test_logits_and_tokens_are_the_same(model):
    names = list(model.state_dict())
    expected = model(ids()).logits
    greedy, beams = generate(model, ids()), generate(model, ids(), num_beams=3)
    with accelerate(model):
        assert list(model.state_dict()) == names
        assert close(model(ids()).logits, expected)
        assert close(model(ids(), use_cache=False).logits, expected)
        assert torch.equal(generate(model, ids()), greedy)
        assert torch.equal(generate(model, ids(), num_beams=3), beams)
    assert torch.equal(model(ids()).logits, expected)


def test_chunks_and_steps_are_the_same(model):
    """As transformers' own in the same chunks: ties among its scores fall differently in one call."""

    def in_chunks():
        cache, at, found = cache_of(model), 0, []
        for count in (3, 1, 127, 1, 1, 130, 37):
            found.append(model(ids()[:, at : at + count], None, None, cache).logits)
            at += count
        return torch.cat(found, dim=1)

    expected = in_chunks()
    with accelerate(model):
        assert close(in_chunks(), expected)


def test_a_padded_sequence_is_what_it_is_alone(model):
    """The difference from transformers, whose windows of a padded sequence begin in the padding."""
    prompt, lengths = ids(3), (300, 263, 5)
    padded, mask = torch.zeros_like(prompt), torch.zeros_like(prompt)
    for row, n in enumerate(lengths):
        padded[row, 300 - n :], mask[row, 300 - n :] = prompt[row, :n], 1
    alone = [generate(model, prompt[i : i + 1, :n])[0, n:] for i, n in enumerate(lengths)]
    theirs = generate(model, padded, attention_mask=mask)[:, 300:]
    with accelerate(model):
        ours = generate(model, padded, attention_mask=mask)[:, 300:]
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(theirs, alone, strict=True)), "transformers changed: say so"


def test_caches_are_reset_selected_and_repeated(model):
    prompt = ids()
    with accelerate(model):
        cache = cache_of(model)
        model(ids(seed=5), None, None, cache)
        for layer in cache.layers:
            layer.reset()
        first = model(prompt, None, None, cache).logits
        assert close(first, model(prompt).logits)
        cache.batch_repeat_interleave(2)
        token = torch.tensor([[7], [7], [9], [9]])
        logits = model(token, None, None, cache).logits
        assert close(logits[::2], logits[1::2])  # a library's GEMM may give equal rows of a batch other last bits
        rows = cache.layers[1].kvcondense["compressor"].visible
        assert torch.equal(rows[::2], rows[1::2])
        cache.batch_select_indices(torch.tensor([3, 0]))
        last = model(token[:2], None, None, cache).logits
        sequence = torch.cat([prompt[[1, 0]], torch.tensor([[9], [7]]), token[:2]], dim=1)
        assert close(last[:, -1], model(sequence).logits[:, -1])
        with pytest.raises(UnsupportedError, match="crop"):
            cache.layers[1].crop(-1)


def test_rows_are_not_copied_step_by_step(model):
    with accelerate(model):
        cache = cache_of(model)
        model(ids(1, 280), None, None, cache)
        memory = cache.layers[1].kvcondense["compressor"]
        places = set()
        for step in range(200):
            model(torch.full((1, 1), 1 + step % 9), None, None, cache)
            places.add(memory.rows.data_ptr())
        assert memory.seen == (480,)
        assert memory.visible.shape[1] == 120
        assert len(places) <= 2
        assert memory.pool.data.shape[0] == memory.spec.window


def test_what_needs_gradients_goes_the_original_way(model):
    prompt = ids(1, 40)
    with accelerate(model), torch.enable_grad():
        out = model(prompt, labels=prompt)
        out.loss.backward()
        assert model.model.layers[1].self_attn.compressor.kv_proj.weight.grad.abs().sum() > 0
        model.zero_grad()
        with torch.no_grad():
            cache = cache_of(model)
            model(prompt, None, None, cache)
        with pytest.raises(UnsupportedError, match="no_grad"):
            model(prompt[:, :1], None, None, cache)
        assert cache.get_seq_length() == 40


def test_half_precision_is_as_accurate(model):
    """Not equal: transformers rounds where kvcondense does not, and a router may decide otherwise by one rounding."""
    half = type(model)(model.config).to(torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    exact = type(model)(model.config).float().eval()
    exact.load_state_dict({name: p.float() for name, p in half.state_dict().items()})
    truth, theirs = exact(ids()).logits, half(ids()).logits.float()
    with accelerate(half):
        ours = half(ids()).logits.float()
    assert float((ours - theirs).abs().mean() / theirs.abs().mean()) < 0.01
    assert (ours - truth).abs().mean() < 1.05 * (theirs - truth).abs().mean()


def test_it_refuses(model):
    with pytest.raises(UnsupportedError, match="model"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="model"):
        accelerate("model")
    with accelerate(model) as done:
        with pytest.raises(UnsupportedError, match="accelerated"):
            accelerate(model)
        cache = cache_of(model)
        with pytest.raises(KvCondenseError, match="position_ids"):
            model(ids(1, 8), None, torch.arange(4, 12)[None], cache)
        cache = cache_of(model)
        model(ids(1, 8), None, None, cache)
        with pytest.raises(KvCondenseError, match="go on at"):
            model(ids(1, 2), None, torch.arange(9, 11)[None], cache)
        with pytest.raises(KvCondenseError, match="follow one another"):
            model(ids(1, 2), None, torch.tensor([[8, 10]]), cache)
    done.undo()  # once more is nothing


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_compressor_takes_its_cache_by_either_name(model, name):
    """transformers 5.24 calls ``cache`` what was ``past_key_values``."""
    index, attention = next(
        (i, a) for i, a in enumerate(layer.self_attn for layer in model.model.layers) if a.compressor
    )
    kinds = [type(layer.self_attn.compressor) for layer in model.model.layers]
    x = torch.randn(1, 140, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    residual, positions = torch.randn(1, 140, model.config.q_lora_rank), torch.arange(140)[None]
    cache, plain = cache_of(model), cache_of(model)
    compressor = attention.compressor
    expected, _ = compressor(x, residual, positions, plain, index)
    with accelerate(model):
        rows, _ = compressor(x, residual, positions, layer_idx=index, **{name: cache})
    assert [type(layer.self_attn.compressor) for layer in model.model.layers] == kinds
    assert close(rows, expected)
