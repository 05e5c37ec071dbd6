"""Compressors with other projections than transformers': adapters, with gradients or without, quantised weights."""

import copy

import pytest
import torch
import torch.nn.utils.parametrize

from generation import cache_of, close, generate, ids, small_model
from kvcondense.errors import KvCondenseError, UnsupportedError
from kvcondense.integrations.transformers import accelerate


@pytest.fixture
def model():
    return small_model()


class Adapter(torch.nn.Module):
    """A base layer and B(A(x)), as adapters wrap layers; no attribute of a linear layer but forward."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a = torch.nn.Linear(base.in_features, 4, bias=False)
        self.b = torch.nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        assert x.dim() == 3  # as transformers calls it
        return self.base_layer(x) + self.b(self.a(x))


class Quantised(torch.nn.Module):
    """Integers and scales, multiplied when it is asked."""

    def __init__(self, base):
        super().__init__()
        weight = base.weight.detach()
        self.scale = torch.nn.Buffer(weight.abs().amax(1, keepdim=True) / 127)
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.float() * self.scale)


def compressors(model):
    for layer in model.model.layers:
        if layer.self_attn.compressor is not None:
            yield layer.self_attn.compressor
            if hasattr(layer.self_attn.compressor, "indexer"):
                yield layer.self_attn.compressor.indexer


def wrap(model, kind):
    model.requires_grad_(False)
    torch.manual_seed(3)
    for compressor in compressors(model):
        for name in ("kv_proj", "gate_proj"):
            setattr(compressor, name, kind(getattr(compressor, name)))
    return model


@pytest.mark.parametrize("kind", [Adapter, Quantised])
def test_projections_are_the_modules_own(model, kind):
    prompt = ids(1, 140)
    with torch.no_grad():
        plain = model(prompt).logits
        wrap(model, kind)
        expected, tokens = model(prompt).logits, generate(model, prompt)
        assert not close(plain, expected)
        with accelerate(model):
            assert close(model(prompt).logits, expected)
            assert torch.equal(generate(model, prompt), tokens)


def gradients(model, prompt, adapters, **more):
    for p in adapters:
        p.grad = None
    model(prompt, labels=prompt, **more).loss.backward()
    return [p.grad.clone() for p in adapters if p.grad is not None]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_adapters_get_transformers_gradients(model, use_cache, reentrant):
    prompt = ids(1, 140)
    wrap(model, Adapter)
    if reentrant is not None:
        model.train()
        name = "activation_checkpointing_enable"  # since transformers 5.24
        enable = getattr(model, name) if hasattr(model, name) else model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    adapters = [p for p in model.parameters() if p.requires_grad]
    expected = gradients(model, prompt, adapters, use_cache=use_cache)
    assert len(expected) == 8  # of the two compressors; nobody differentiates what an indexer picks
    with accelerate(model):
        found = gradients(model, prompt, adapters, use_cache=use_cache)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found, expected, strict=True))
    assert all(bool(g.any()) for g in expected)


def test_adapters_that_no_module_holds_get_them_too(model):
    """A forward that is patched, with tensors of its own: seen by what comes out of it."""
    model.requires_grad_(False)
    prompt, held = ids(1, 140), []
    for compressor in compressors(model):
        base = compressor.kv_proj
        a = (0.1 * torch.randn(base.out_features, base.in_features)).requires_grad_()
        base.forward = lambda x, base=base, a=a: torch.nn.functional.linear(x, base.weight + a)
        held.append(a)
    expected = gradients(model, prompt, held)
    assert len(expected) == 2
    with accelerate(model):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, prompt, held), expected, strict=True))
        with torch.no_grad():
            cache = cache_of(model)
            model(prompt, None, None, cache)
        before = copy.deepcopy(cache)
        with pytest.raises(UnsupportedError, match="no_grad"):
            model(prompt[:, :1], None, None, cache)
        with torch.no_grad():
            assert torch.isfinite(model(prompt[:, :1], None, None, before).logits).all()


def test_an_adapter_on_the_norm_goes_the_original_way(model):
    class Scaled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.weight = base, base.weight

        def forward(self, x):
            return 2 * self.base_layer(x)

    prompt = ids(1, 140)
    for compressor in compressors(model):
        compressor.kv_norm = Scaled(compressor.kv_norm)
    with torch.no_grad():
        expected, tokens = model(prompt).logits, generate(model, prompt)
        with accelerate(model):
            assert torch.equal(model(prompt).logits, expected)
            assert torch.equal(generate(model, prompt), tokens)


def test_a_forward_of_somebody_else_is_refused(model):
    compressor = next(compressors(model))
    compressor.forward = lambda *args: None
    with pytest.raises(UnsupportedError, match="forward of their class"):
        accelerate(model)
    del compressor.forward
    with accelerate(model):
        pass


def test_a_model_is_copied_while_it_is_accelerated(model):
    prompt = ids(1, 140)
    with torch.no_grad():
        expected = model(prompt).logits
        done = accelerate(model)
        other = copy.deepcopy(model)
        done.undo()
        assert torch.equal(model(prompt).logits, expected)
        cache = cache_of(other)
        assert close(other(prompt, None, None, cache).logits, expected)
        with pytest.raises(UnsupportedError, match="accelerated"):
            accelerate(other)
        with pytest.raises(KvCondenseError, match="go on at"):
            other(prompt[:, :1], None, torch.tensor([[3]]), cache)


def test_parametrised_compressors_are_compressors(model):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    prompt = ids(1, 140)
    for compressor in compressors(model):
        torch.nn.utils.parametrize.register_parametrization(compressor, "position_bias", Twice())
    with torch.no_grad():
        expected = model(prompt).logits
        with accelerate(model):
            cache = cache_of(model)
            assert close(model(prompt, None, None, cache).logits, expected)
            assert all(hasattr(layer, "kvcondense") for layer in cache.layers[1:])


def test_a_compressor_with_a_forward_of_its_class_own_is_left_alone(model):
    kind = type(next(compressors(model)))
    base = kind.forward

    class Zero(kind):
        def forward(self, *args, **kwargs):
            rows, bias = base(self, *args, **kwargs)
            return 0 * rows, bias

    prompt = ids(1, 140)
    next(compressors(model)).__class__ = Zero
    with torch.no_grad():
        expected = model(prompt).logits
        with accelerate(model):
            assert close(model(prompt).logits, expected)


def test_a_forward_that_was_wrapped_is_transformers_after_undo(model):
    """Somebody wraps the accelerated forward, and keeps it."""
    prompt = ids(1, 140)
    with torch.no_grad():
        expected, cache, theirs = model(prompt).logits, cache_of(model), cache_of(model)
        model(prompt[:, :100], None, None, theirs)
        with accelerate(model):
            model(prompt[:, :100], None, None, cache)
            for compressor in compressors(model):
                compressor.forward = lambda *args, held=compressor.forward: held(*args)
            assert close(model(prompt).logits, expected)
        assert torch.equal(model(prompt).logits, expected)
        ours, theirs = (model(prompt[:, 100:], None, None, held).logits for held in (cache, theirs))
        assert close(ours, theirs)
