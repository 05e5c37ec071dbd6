"""Time per generated token by context: transformers' DeepSeek-V4, small and random, as it is and accelerated.
Run: python examples/generate.py --contexts 1024 4096 16384 32768
"""

import argparse
import statistics
import time

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

from kvcondense.integrations.transformers import accelerate

CHUNK, STEPS = 512, 32


def small_model() -> DeepseekV4ForCausalLM:
    """Random weights, few and narrow layers; heads and ratios as they are, so that rows have their size."""
    config = DeepseekV4Config(
        vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, hc_mult=2,
        q_lora_rank=16, o_groups=2, o_lora_rank=16, num_experts_per_tok=1, n_routed_experts=2, index_n_heads=2,
        index_topk=16, mlp_layer_types=["moe"] * 3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(config).float().eval()
    for parameter in (p for name, p in model.named_parameters() if name.endswith("position_bias")):
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def per_token(model: DeepseekV4ForCausalLM, ids: torch.Tensor, contexts: list[int]) -> tuple[list, list]:
    """Median milliseconds of a step that follows each context, and the greedy tokens of all these steps."""
    cache, done, medians, tokens, logits = DynamicCache(config=model.config), 0, [], [], ids
    for context in contexts:
        for begin in range(done, context, CHUNK):
            logits = model(ids[:, begin : min(begin + CHUNK, context)], None, None, cache).logits
        times = []
        for _ in range(STEPS):
            tokens.append(int(logits[0, -1].argmax()))
            start = time.perf_counter()
            logits = model(torch.tensor([tokens[-1:]]), None, None, cache).logits
            times.append(1e3 * (time.perf_counter() - start))
        done, medians = context + STEPS, [*medians, statistics.median(times)]
    return medians, tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768], metavar="TOKENS")
    contexts, model = sorted(parser.parse_args().contexts), small_model()
    ids = torch.randint(1, 64, (1, contexts[-1]))
    theirs, expected = per_token(model, ids, contexts)
    with accelerate(model):
        ours, tokens = per_token(model, ids, contexts)
    for context, before, after in zip(contexts, theirs, ours, strict=True):
        print(f"context {context:>6}: {before:6.2f} ms per token, accelerated {after:6.2f}")
    print("greedy tokens:", "the same" if tokens == expected else "DIFFERENT")
