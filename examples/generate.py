"""Time per generated token by context, transformers' DeepSeek-V4 as it is and accelerated: a small model, random text.

python examples/generate.py --contexts 1024 4096 16384 32768 --json build/generate.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from kvcondense.integrations.transformers import accelerate

CHUNK, STEPS = 512, 32


def small_model() -> Any:
    """Random weights; heads and ratios as they are, so that rows have their size."""
    config = transformers.DeepseekV4Config(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=16,
        num_experts_per_tok=1,
        n_routed_experts=2,
        mlp_layer_types=["moe"] * 3,
        index_n_heads=2,
        index_topk=16,
        hc_mult=2,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    )
    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("position_bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def per_token(model: Any, ids: torch.Tensor, contexts: list[int]) -> tuple[dict[int, float], list[int]]:
    """Median seconds of a step that follows each context, and the greedy tokens of all these steps."""
    cache = transformers.DynamicCache(config=model.config)
    done, medians, tokens = 0, {}, []
    logits = torch.zeros(1, 1, 64)
    for context in contexts:
        while done < context:
            end = min(done + CHUNK, context)
            logits = model(ids[:, done:end], past_key_values=cache).logits
            done = end
        times = []
        for _ in range(STEPS):
            token = logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            logits = model(token, past_key_values=cache).logits
            times.append(time.perf_counter() - start)
            tokens.append(int(token[0, 0]))
            done += 1
        medians[context] = statistics.median(times)
    return medians, tokens


def main() -> None:
    """Both ways, one after the other, on the same text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768], metavar="TOKENS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    arguments = parser.parse_args()
    contexts = sorted(arguments.contexts)
    model = small_model()
    ids = torch.randint(1, 64, (1, contexts[-1] + STEPS), generator=torch.Generator().manual_seed(1))
    print(f"{contexts[-1]} tokens through transformers' compressors ...", flush=True)
    theirs, expected = per_token(model, ids, contexts)
    print("and through kvcondense ...", flush=True)
    with accelerate(model):
        ours, tokens = per_token(model, ids, contexts)
    print(f"{'context':>8} {'transformers':>14} {'accelerated':>14}   ms per token")
    for context in contexts:
        print(f"{context:>8} {1e3 * theirs[context]:>14.2f} {1e3 * ours[context]:>14.2f}")
    same = sum(a == b for a, b in zip(tokens, expected, strict=True))
    print(f"greedy tokens: {same} of {len(tokens)} are the same")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "contexts": contexts,
            "transformers_s": theirs,
            "accelerated_s": ours,
            "same": same,
            "of": len(tokens),
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if same != len(tokens):
        raise SystemExit("the greedy tokens differ")


if __name__ == "__main__":
    main()
